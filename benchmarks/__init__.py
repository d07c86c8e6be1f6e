"""Speed of every operator against its baselines: `python -m benchmarks`, then `python -m benchmarks.report`.

`cases` are data, `test_bench` times them on pytest-benchmark, `report` keeps the results and prints them, `plots` draws
them, `readme` writes README's tables, without what `outliers` finds. What is timed, and how, is in cogview_ops/bench,
which users have as well.
"""
