"""Where a model runs, and in which file: one file, one runtime."""
