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
from .cases import CASES, Case
from .problems import Problem

# relative error in the 2-norm against float64; a baseline may be worse: it rounds scores to its dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BASELINE_SLACK = 5.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, benchmark: Any, capsys: Any, pytestconfig: pytest.Config) -> None:
    row = measure(case, benchmark, float(pytestconfig.getoption("benchmark_max_time")))
    report.save(row)
    with capsys.disabled():
        print(f"\n{report.line(row)}", end=" ", flush=True)
    assert "failed" not in row, row["failed"]


def measure(case: Case, benchmark: Any, seconds: float) -> dict[str, Any]:
    """The row of one case, timed for about `seconds`; a row with "failed" was not timed."""
    problem = case.problem()
    row = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "direction": case.direction, **machine.facts()}
    calls, failed = contestants(problem, case.backward)
    if "ours" in failed:
        return row | {"failed": failed["ours"]}
    times = interleave(benchmark, calls, seconds)
    stats = benchmark.stats.stats
    row |= {"median_s": stats.median, "iqr_s": stats.iqr, "rounds": stats.rounds, **floor(problem)}
    row["tokens"], row["input_bytes"] = problem.tokens, sum(x.nbytes for x in problem.inputs)
    row["extra_bytes"] = machine.peak_extra_bytes(calls["ours"])
    row["baselines"] = {
        name: {
            "median_s": median(values),
            "ratio": median(values) / stats.median,
            "rounds": len(values),
            "extra_bytes": machine.peak_extra_bytes(calls[name]),
            "same_result": name in problem.baselines,
        }
        for name, values in times.items()
    } | {name: {"failed": reason} for name, reason in failed.items()}
    benchmark.extra_info.update(row)
    return row


def contestants(
    problem: Problem, backward: bool, kernels: dict[str, Callable[..., Any]] | None = None
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Calls to time, "ours" last, and the reasons why others are not: wrong here, or cannot run here. `kernels` are
    others of our own, which must be as good as "ours"."""
    own = {**(kernels or {}), "ours": problem.ours}
    run = partial(results, problem.inputs, backward)
    sampled = tuple(problem.sample(x).double() for x in problem.inputs)
    expected = results(sampled, backward, problem.truth or partial(problem.ours, impl="reference"))
    tolerance = TOLERANCE[problem.inputs[0].dtype]
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, function in (problem.baselines | problem.others | own).items():
        if isinstance(function, str):
            failed[name] = function
            continue
        try:
            got = run(function)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if name not in problem.others:
            wrong = mismatch(got, expected, problem, tolerance * (1 if name in own else BASELINE_SLACK))
            if wrong:
                failed[name] = wrong
                continue
        calls[name] = partial(run, function)
    return calls, failed


def results(inputs: tuple[Tensor, ...], backward: bool, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    """Outputs, and with backward the gradients of all inputs."""
    inputs = tuple(x.detach().requires_grad_(backward) for x in inputs)
    out = function(*inputs)
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    if not backward:
        return outs
    # the gradient of the output is the first input: any values would do, of that shape
    return outs + torch.autograd.grad(outs, inputs, [inputs[0].detach()] * len(outs))


def mismatch(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], problem: Problem, tolerance: float) -> str | None:
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        error = float((problem.sample(x.detach()).double() - y.detach()).norm() / y.detach().norm())
        if not error <= tolerance:
            return f"result {i} is off by {error:.1e} of its norm, allowed {tolerance:.0e}"
    return None


SHORT = 0.01  # seconds: what takes less is run untimed before, since it would find its code and data in no cache


def interleave(benchmark: Any, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Runs every call once per round; pytest-benchmark times ours, the times of the others are returned.

    A baseline that has had `seconds` sits out the later rounds.
    """
    ours = calls["ours"]
    others = {name: call for name, call in calls.items() if name != "ours"}
    times: dict[str, list[float]] = {name: [] for name in others}

    def timed(call: Callable[[], Any]) -> float:
        start = perf_counter()
        call()
        return perf_counter() - start

    def prepare() -> None:
        for name, call in others.items():
            if sum(times[name]) < seconds or not times[name]:
                if short[name]:
                    call()
                times[name].append(timed(call))
        if short["ours"]:
            ours()

    short = {name: timed(call) < SHORT for name, call in calls.items()}
    rounds = int(seconds / (timed(prepare) + timed(ours)))  # they last as long as this one
    benchmark.pedantic(ours, setup=prepare, rounds=min(max(rounds, 3), 200))
    return times


def floor(problem: Problem) -> dict[str, Any]:
    """The least time this machine could take, were nothing done but what takes longest: moving the bytes, doing the
    matrix products or the exponentials."""
    work = {"bytes": problem.bytes, "flops": problem.flops, "exps": problem.exps}
    least = {
        "memory": problem.bytes / machine.copy_bandwidth(),
        "matmul": problem.flops / machine.matmul_rate(problem.inputs[0].dtype) if problem.flops else 0.0,
        "exp": problem.exps / machine.exp_rate() if problem.exps else 0.0,
    }
    bound = max(least, key=least.__getitem__)
    return {"floor_s": least[bound], "bound": bound, "floors_s": least, **work}
