"""`python -m benchmarks.gpu --out FOLDER`: the cases on the GPU at hand, timed by CUDA events, without pytest.

Ceilings (device copy, bfloat16 product) are measured in the same run. Every call is replayed from a CUDA graph where it
can be captured, after the L2 cache was overwritten; contestants take turns. Rows go into FOLDER/<device>.json as they
come, those with a target first. A row says which implementation ours was; where there are kernels in both, the other of
CUDA C++ and Triton is timed beside it.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from cogview_ops.bench import machine, problems, row_problems
from cogview_ops.bench.clock import Call, Clock
from cogview_ops.bench.correctness import contestants
from cogview_ops.bench.measure import DTYPES, floor, timed, with_failed

from . import cases, implementations, report
from .cases import GPU_CASES, Case
from .targets import DENSE, TARGETS

LATE = "no time left"


def measure(
    row: dict[str, Any],
    case: Case,
    ceiling: dict[str, float],
    clock: Clock,
    seconds: float,
    only: tuple[str, ...] | None,
    lost: str,
) -> None:
    """Fills in what a case's row says beside its name. `only`: of the baselines, these; `lost`: why our other kernel is
    not to be run."""
    problem = case.problem("cuda" if clock.gpu else "cpu")
    if only is not None:
        problem = replace(problem.only(only), baselines={})
    mine, other = implementations.of(problem)
    row |= {"implementation": mine, "implementations": {other: {"failed": lost or "not timed"}} if other else {}}
    own: dict[str, Call] = {other: partial(problem.ours, impl=other)} if other and not lost else {}
    calls, failed = contestants(problem, case.backward, own)
    if "ours" in failed:
        row["failed"] = failed["ours"]
        return
    row["output_bytes"] = sum(x.nbytes for x in calls["ours"]())
    ours, results = timed(calls, clock, seconds)
    row |= ours | {"tokens": problem.tokens}
    row |= floor(problem, {"memory": ceiling["copy"], "matmul": ceiling["matmul"]})
    # our other kernel is no baseline: nobody has it instead
    row["implementations"] |= {name: results.pop(name) for name in own if name in results}
    row["implementations"] |= {name: {"failed": failed.pop(name)} for name in own if name in failed}
    row["implementations"][mine] = results.pop("ours")
    row["baselines"] = with_failed(results, failed, problem)


def rehearsal() -> list[Case]:
    """Small cases under the names of real ones, which need no GPU."""
    norm, attention = (
        partial(row_problems.layer_norm, rows=64, dim=64),
        partial(problems.three_region, heads=1, seqlen=256),
    )
    return [
        Case("layer_norm", "33792x2560", "bf16", False, norm),
        Case("layer_norm", "33792x2560", "bf16", True, norm),
        Case("three_region_attention", "160x4224x64", "bf16", False, partial(attention, pivots=64, text=32)),
    ]


def chosen(options: argparse.Namespace) -> list[Case]:
    aims = {(target.op, target.shape) for target in TARGETS}
    all_of_them = rehearsal() if options.rehearse else GPU_CASES
    offered = [case for case in all_of_them if not options.targets or (case.op, case.shape) in aims]
    return cases.select(offered, options.op, options.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--op", choices=sorted({c.op for c in GPU_CASES}), help="one operator (default: all)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="one dtype (default: all)")
    parser.add_argument("--targets", action="store_true", help="cases with a target, against dense causal SDPA alone")
    parser.add_argument("--rehearse", action="store_true", help="a few small cases, without a GPU too")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each case (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no case begins")
    parser.add_argument("--out", type=Path, help=f"folder (default: {report.RESULTS.name})")
    parser.add_argument("--begin", type=int, default=0, help="leave out so many cases; what is run after a fault")
    parser.add_argument("--lost", default="", help="why the first case is run without our other kernel; likewise")
    options = parser.parse_args()
    try:
        todo = chosen(options)
    except LookupError as error:
        parser.error(str(error))
    if options.rehearse and options.out is None:
        parser.error("--rehearse: give another folder than that of the results, --out")
    if not torch.cuda.is_available() and not options.rehearse:
        print("benchmarks.gpu: no GPU that torch can use")
        return 2
    stop, clock = monotonic() + options.budget, Clock(torch.cuda.is_available())
    ceiling = clock.ceilings
    out = options.out or report.RESULTS
    path, failed = out / f"{machine.slug(clock.facts()['device'])}.json", int(options.begin > 0)
    known = {report.key(row) for row in report.load(path)} if path.exists() else set()
    for i, case in enumerate(todo[options.begin :], options.begin):
        row = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "direction": case.direction, **clock.facts()}
        row["ceilings"] = ceiling
        begin, lost = monotonic(), options.lost if i == options.begin else ""
        if begin > stop:
            row["failed"] = LATE
        else:
            try:
                measure(row, case, ceiling, clock, options.seconds, DENSE if options.targets else None, lost)
            except Exception as error:  # one case that breaks does not end the others
                row["failed"] = f"{type(error).__name__}: {error}"
        print(report.line(row), f"({monotonic() - begin:.0f} s)", flush=True)
        failed += "failed" in row
        if row.get("failed") != LATE or report.key(row) not in known:
            report.save(row, out)
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after a fault no call of this process works again
            left = ["--begin", str(i + 1), "--budget", f"{max(stop - monotonic(), 0):.0f}"]
            if "failed" in row and row.get("implementations") and not lost:  # that one's fault, maybe: without it
                left, lost = ["--begin", str(i), *left[2:]], f"the GPU was lost: {row['failed']}"
            else:
                lost = ""
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], *left, "--lost", lost])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
