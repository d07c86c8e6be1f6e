"""`python -m cogview_ops.bench`: every operator against what there is instead, on the machine at hand.

`problems`, `row_problems` and `dalle_problems` say what is timed; `baselines` and `dalle_baselines` are what it is
compared with; `correctness` compares results before anything is timed; `clock` and `machine` time, and say what the
machine can do at most; `measure` makes a row of it. `operators` and `shapes` are the command's words, `peers` the
comparison with other packages, `figures` the plots. Nothing of this is loaded by `import cogview_ops`; it needs torch
alone, and matplotlib for plots.
"""
