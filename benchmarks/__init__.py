"""One script per claim: `python -m benchmarks.NAME [--quick]` measures us and the peers side by side."""
