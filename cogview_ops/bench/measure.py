"""A row of results: what one problem takes, ours and everybody else's."""

import math
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

from . import machine
from .clock import Clock
from .correctness import BASELINE_SLACK, contestants
from .problems import Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Results = dict[str, dict[str, Any]]  # by contestant
Rows = list[dict[str, Any]]


def made(build: Callable[..., Problem], dtype: str, backward: bool, device: str = "cpu") -> Problem:
    """The problem with tensors on that device, the same ones each time."""
    torch.manual_seed(0)
    torch.compiler.reset()  # it gives up compiling a function after so many shapes: those of earlier cases count
    with torch.device(device):
        return build(DTYPES[dtype], backward)


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells a row from the others of a machine."""
    return row["op"], row["shape"], row["direction"], row["dtype"]


def direction(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def measured(
    problem: Problem,
    backward: bool,
    clock: Clock,
    seconds: float,
    slack: float = BASELINE_SLACK,
    patience: float = math.inf,
) -> dict[str, Any]:
    """What a row says beside its name; only "failed", and why, where ours is wrong or cannot run here. `slack` and
    `patience` as in `contestants`."""
    calls, failed = contestants(problem, backward, slack=slack, patience=patience)
    if "ours" in failed:
        return {"failed": failed["ours"]}
    row, results = timed(calls, clock, seconds)
    del results["ours"]
    rates = ceilings(problem, clock)
    row |= {"tokens": problem.tokens, "input_bytes": sum(x.nbytes for x in problem.inputs), **floor(problem, rates)}
    return row | {"baselines": with_failed(results, failed, problem)}


def ceilings(problem: Problem, clock: Clock) -> dict[str, float]:
    """What the device does a second of the work that there is; of a GPU bytes and bfloat16 products."""
    if not clock.gpu:
        return machine.ceilings(problem.inputs[0].dtype, matmul=problem.flops > 0, exp=problem.exps > 0)
    return {"memory": clock.ceilings["copy"], "matmul": clock.ceilings["matmul"]}


def timed(calls: dict[str, Callable[[], Any]], clock: Clock, seconds: float) -> tuple[dict[str, Any], Results]:
    """Time and memory of "ours", and of every contestant beside it."""
    extra = {name: clock.extra_bytes(call) for name, call in calls.items()}
    attempts = {name: clock.captured(call, extra[name]) for name, call in calls.items()}
    times = clock.in_turn({name: call for name, (call, _) in attempts.items()}, seconds)
    ours = median(times["ours"])
    low, _, high = quantiles(times["ours"], n=4)
    row: dict[str, Any] = {"median_s": ours, "iqr_s": high - low, "rounds": len(times["ours"])}
    row["extra_bytes"] = extra["ours"]
    if clock.gpu:  # these are timed with their launches
        row["not_captured"] = {name: reason for name, (_, reason) in attempts.items() if reason is not None}
    return row, {name: against(values, ours, extra[name]) for name, values in times.items()}


def against(times: list[float], ours: float, extra_bytes: int | None) -> dict[str, Any]:
    """The result of a contestant; its ratio is how many times as fast ours is."""
    seconds = median(times)
    return {"median_s": seconds, "ratio": seconds / ours, "rounds": len(times), "extra_bytes": extra_bytes}


def with_failed(results: Results, failed: dict[str, str], problem: Problem) -> Results:
    """The baselines of a row: those that were timed, and why others were not."""
    same = {name: result | {"same_result": name in problem.baselines} for name, result in results.items()}
    return same | {name: {"failed": reason} for name, reason in failed.items()}


def floor(problem: Problem, rates: dict[str, float]) -> dict[str, Any]:
    """The least time this machine could take, were nothing done but what takes longest: moving the bytes ("memory"),
    doing the matrix products ("matmul") or the exponentials ("exp"), at `rates` of each a second."""
    work = {"memory": problem.bytes, "matmul": problem.flops, "exp": problem.exps}
    least = {name: work[name] / rate for name, rate in rates.items()}
    bound = max(least, key=least.__getitem__)
    counts = {"bytes": problem.bytes, "flops": problem.flops, "exps": problem.exps}
    return {"floor_s": least[bound], "bound": bound, "floors_s": least, **counts}
