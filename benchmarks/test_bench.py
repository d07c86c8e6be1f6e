"""Times one case: correctness first, then ours and the baselines in turn, in one process, then memory.

Run through `python -m benchmarks`, which sets up the allocator. Baselines run in pytest-benchmark's untimed setup of
every round, so that all contestants see the same machine, hot or throttled.
"""

from collections.abc import Callable
from typing import Any

import pytest

from cogview_ops.bench import machine
from cogview_ops.bench.clock import SHORT, Turns, wall
from cogview_ops.bench.correctness import contestants
from cogview_ops.bench.measure import against, floor, with_failed

from . import report
from .cases import CASES, Case


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
    rates = machine.ceilings(problem.inputs[0].dtype, matmul=problem.flops > 0, exp=problem.exps > 0)
    row |= {"median_s": stats.median, "iqr_s": stats.iqr, "rounds": stats.rounds, **floor(problem, rates)}
    row["tokens"], row["input_bytes"] = problem.tokens, sum(x.nbytes for x in problem.inputs)
    row["extra_bytes"] = machine.peak_extra_bytes(calls["ours"])
    found = {
        name: against(values, stats.median, machine.peak_extra_bytes(calls[name])) for name, values in times.items()
    }
    row["baselines"] = with_failed(found, failed, problem)
    benchmark.extra_info.update(row)
    return row


def interleave(benchmark: Any, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Runs every call once per round; pytest-benchmark times ours, the times of the others are returned.

    A baseline that has had `seconds` sits out the later rounds.
    """
    ours = calls["ours"]
    turns = Turns({name: call for name, call in calls.items() if name != "ours"}, wall, share=seconds, short=SHORT)
    short = wall(ours) < SHORT

    def prepare() -> None:
        turns.round()
        if short:
            ours()

    rounds = int(seconds / (wall(prepare) + wall(ours)))  # they last as long as this one
    benchmark.pedantic(ours, setup=prepare, rounds=min(max(rounds, 3), 200))
    return turns.times
