"""What the parts cost: `python -m tests.benchmarks` prints one table, `python -m tests.benchmarks.heads` a part of it."""
