"""Speed of every operator against its baselines: `python -m benchmarks`, then `python -m benchmarks.report`.

`cases` are data, `test_bench` times them on pytest-benchmark, `machine` says what they are measured on and what the
machine can do at most, `report` keeps the results and prints them.
"""
