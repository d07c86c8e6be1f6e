"""`python -m benchmarks.gpu --out FOLDER`: the cases on the GPU at hand, timed by CUDA events, without pytest.

Ceilings (device copy, bfloat16 product) are measured in the same run. Every call is replayed from a CUDA graph where it
can be captured, after the L2 cache was overwritten; contestants take turns. Rows go into FOLDER/<device>.json as they
come, those with a target first. A row says which implementation ours was; where there are kernels in both, the other of
CUDA C++ and Triton is timed beside it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter
from typing import Any

import torch

from . import cases, implementations, machine, problems, report, row_problems
from .cases import DTYPES, GPU_CASES, Case
from .targets import DENSE, TARGETS
from .test_bench import contestants

LATE = "no time left"
LARGE = 2**33  # bytes of a call beyond which it is not captured: a graph keeps them for itself
FLUSH = 2**28  # bytes written before each timed call: more than the L2 cache of any GPU
Call = Callable[[], Any]


class Clock:
    """Times calls, on the GPU from the device's point of view."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.flush = torch.empty(FLUSH if gpu else 1, dtype=torch.uint8, device="cuda" if gpu else "cpu")

    def seconds(self, call: Call) -> float:
        if not self.gpu:
            begin = perf_counter()
            call()
            return perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()  # keeps the device busy until all is queued
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def captured(self, call: Call, extra_bytes: int | None) -> tuple[Call, str | None]:
        """The call as a CUDA graph, or itself and why it is not captured (it waits for the device, say)."""
        if not self.gpu:
            return call, "no GPU"
        if extra_bytes is not None and extra_bytes > LARGE:
            return call, f"takes {extra_bytes / 1e9:.0f} GB"
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                call()
        except Exception as error:
            torch.cuda.synchronize()
            return call, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return graph.replay, None

    def in_turn(self, calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
        """Seconds of each call in at least 5 rounds, for so long."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        stop = monotonic() + seconds
        for rounds in range(100):
            if rounds >= 5 and monotonic() >= stop:
                break
            for name, call in calls.items():
                times[name].append(self.seconds(call))
        return times

    def ceilings(self) -> dict[str, float]:
        """Bytes per second of a copy, counting both directions, and FLOPs per second of a product."""
        size = 8192 if self.gpu else 64
        source = torch.ones(16 * size * size, device=self.flush.device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=self.flush.device)
        copy = median(self.seconds(lambda: target.copy_(source)) for _ in range(9))
        product = median(self.seconds(lambda: a @ b) for _ in range(9))
        return {"copy": 2 * source.nbytes / copy, "matmul": 2 * size**3 / product}

    def extra_bytes(self, call: Call) -> int | None:
        """Growth of the device's memory at its peak during one call, results included."""
        if not self.gpu:
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, Any]:
        return machine.facts() | ({"device": torch.cuda.get_device_name()} if self.gpu else {})


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
        kept = {name: f for name, f in problem.others.items() if name in only}
        problem = replace(problem, baselines={}, others=kept)
    mine, other = implementations.of(problem)
    row |= {"implementation": mine, "implementations": {other: {"failed": lost or "not timed"}} if other else {}}
    own: dict[str, Call] = {other: partial(problem.ours, impl=other)} if other and not lost else {}
    calls, failed = contestants(problem, case.backward, own)
    if "ours" in failed:
        row["failed"] = failed["ours"]
        return
    row["output_bytes"] = sum(x.nbytes for x in calls["ours"]())
    extra = {name: clock.extra_bytes(call) for name, call in calls.items()}
    attempts = {name: clock.captured(call, extra[name]) for name, call in calls.items()}
    # these are timed with their launches
    row["not_captured"] = {name: reason for name, (_, reason) in attempts.items() if reason is not None}
    times = clock.in_turn({name: call for name, (call, _) in attempts.items()}, seconds)
    ours = median(times["ours"])
    low, _, high = quantiles(times["ours"], n=4)
    floors = {"memory": problem.bytes / ceiling["copy"], "matmul": problem.flops / ceiling["matmul"]}
    bound = max(floors, key=floors.__getitem__)
    row |= {"median_s": ours, "iqr_s": high - low, "rounds": len(times["ours"]), "tokens": problem.tokens}
    row |= {"floor_s": floors[bound], "bound": bound, "floors_s": floors, "bytes": problem.bytes}
    row |= {"flops": problem.flops, "extra_bytes": extra["ours"]}
    results: dict[str, dict[str, Any]] = {
        name: {
            "median_s": median(values),
            "ratio": median(values) / ours,
            "rounds": len(values),
            "extra_bytes": extra[name],
        }
        for name, values in times.items()
    } | {name: {"failed": reason} for name, reason in failed.items()}
    # our other kernel is no baseline: nobody has it instead
    row["implementations"] |= {name: results.pop(name) for name in own if name in results}
    row["implementations"][mine] = results.pop("ours")
    row["baselines"] = {
        name: result if "failed" in result else result | {"same_result": name in problem.baselines}
        for name, result in results.items()
    }


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
    ceiling = clock.ceilings()
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
