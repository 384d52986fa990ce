"""Is it still good, is it faster: scores and times with intervals, and the verdict against the goal."""
