"""The benchmark suite, `python -m statescan.bench`: every operator against what this machine can do
and against what else a user could call. docs/benchmarks.md says how the numbers are made.
"""
