"""Times one case: correctness first, then ours and the baselines in turn, in one process, then memory.

Run through `python -m benchmarks`, which sets up the allocator. Baselines run in pytest-benchmark's untimed setup of
every round, so that all contestants see the same machine, hot or throttled.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor

from . import machine, report
from .cases import CASES, Case, Problem

# relative error in the 2-norm against float64; a baseline may be worse: it rounds scores to its dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BASELINE_SLACK = 5.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, benchmark: Any, capsys: Any) -> None:
    row = measure(case, benchmark)
    report.save(row)
    with capsys.disabled():
        print(report.line(row), flush=True)
    assert "failed" not in row, row["failed"]


def measure(case: Case, benchmark: Any) -> dict[str, Any]:
    problem = case.problem()
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": "forward+backward" if case.backward else "forward",
        **machine.facts(),
    }
    run = runner(problem, case.backward)
    expected = truth(problem, case.backward)
    tolerance = TOLERANCE[problem.inputs[0].dtype]
    wrong = mismatch(run(problem.ours), expected, problem, tolerance)
    if wrong:
        return row | {"failed": wrong}
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, function in (problem.baselines | problem.others).items():
        try:
            got = run(function)
        except Exception as error:  # a baseline that cannot run here says so in the table
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        wrong = mismatch(got, expected, problem, BASELINE_SLACK * tolerance) if name in problem.baselines else None
        if wrong:
            failed[name] = wrong
        else:
            calls[name] = partial(run, function)
    ours = partial(run, problem.ours)
    times = interleave(benchmark, ours, calls)
    stats = benchmark.stats.stats
    row |= {"median_s": stats.median, "iqr_s": stats.iqr, "rounds": stats.rounds}
    row |= floor(problem)
    row["extra_bytes"] = machine.peak_extra_bytes(ours)
    row["baselines"] = {name: {"failed": reason} for name, reason in failed.items()} | {
        name: {
            "median_s": median(times[name]),
            "ratio": median(times[name]) / row["median_s"],
            "extra_bytes": machine.peak_extra_bytes(calls[name]),
            "same_result": name in problem.baselines,
        }
        for name in calls
    }
    benchmark.extra_info.update(row)
    return row


def runner(problem: Problem, backward: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Calls a function on the problem's inputs; with backward returns outputs and gradients."""
    return partial(_run, problem.inputs, backward)


def _run(inputs: tuple[Tensor, ...], backward: bool, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    inputs = tuple(x.detach().requires_grad_(backward) for x in inputs)
    out = function(*inputs)
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    if not backward:
        return outs
    # the gradient of the output is the first input: any values would do, of that shape
    return outs + torch.autograd.grad(outs, inputs, [inputs[0].detach()] * len(outs))


def truth(problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    inputs = tuple(problem.sample(x).double() for x in problem.inputs)
    return _run(inputs, backward, partial(problem.ours, impl="reference"))


def mismatch(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], problem: Problem, tolerance: float) -> str | None:
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        error = float((problem.sample(x).detach().double() - y).norm() / y.norm())
        if not error <= tolerance:
            return f"result {i} is off by {error:.1e} of its norm, allowed {tolerance:.0e}"
    return None


def interleave(benchmark: Any, ours: Callable[[], Any], calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Times every call once per round; pytest-benchmark times ours."""
    times: dict[str, list[float]] = {name: [] for name in calls}

    def baselines() -> None:
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)

    start = perf_counter()
    baselines()  # warm, and as long as every round
    ours()
    rounds = int(benchmark._max_time / (perf_counter() - start))
    for values in times.values():
        values.clear()
    benchmark.pedantic(ours, setup=baselines, rounds=min(max(rounds, 3), 200))
    return times


def floor(problem: Problem) -> dict[str, Any]:
    """The least time this machine could take: moving the bytes or doing the matrix products, whichever is longer."""
    moving = problem.bytes / machine.copy_bandwidth()
    computing = problem.flops / machine.matmul_rate(problem.inputs[0].dtype) if problem.flops else 0.0
    return {
        "floor_s": max(moving, computing),
        "bound": "memory" if moving > computing else "matmul",
        "bytes": problem.bytes,
        "flops": problem.flops,
    }
