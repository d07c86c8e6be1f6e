"""`python -m benchmarks.gpu --out rows.json`: the cases on the GPU at hand, timed by CUDA events, without pytest.

Ceilings (device copy, bfloat16 product) are measured in the same run. Every call is replayed from a CUDA graph where it
can be captured, after the L2 cache was overwritten; contestants take turns. Rows are written as they come.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import monotonic
from typing import Any

import torch

from . import machine, report
from .cases import GPU_CASES, Case
from .test_bench import contestants

FLUSH = 2**28  # bytes written before each timed call: more than the L2 cache of any GPU


def seconds_of(call: Callable[[], Any], flush: torch.Tensor) -> float:
    """One call, from the device's point of view."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()  # keeps the device busy until all is queued
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(call: Callable[[], Any]) -> tuple[Callable[[], Any], str | None]:
    """The call as a CUDA graph, or itself and why it cannot be captured (it waits for the device, say)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
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


def ceilings(flush: torch.Tensor) -> dict[str, float]:
    """Bytes per second of a copy, counting both directions, and FLOPs per second of a product."""
    source = torch.ones(2**30, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    copy = median(seconds_of(lambda: target.copy_(source), flush) for _ in range(9))
    product = median(seconds_of(lambda: a @ b, flush) for _ in range(9))
    return {"copy": 2 * source.nbytes / copy, "matmul": 2 * 8192**3 / product}


def measure(case: Case, ceiling: dict[str, float], flush: torch.Tensor, seconds: float) -> dict[str, Any]:
    problem = case.problem("cuda")
    direction = "forward+backward" if case.backward else "forward"
    facts = machine.facts() | {"device": torch.cuda.get_device_name()}
    row: dict[str, Any] = {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "direction": direction, **facts,
    }  # fmt: skip
    calls, failed = contestants(problem, case.backward)
    if "ours" in failed:
        return row | {"failed": failed["ours"]}
    row["extra_bytes"] = extra_bytes(calls["ours"])
    attempts = {name: captured(call) for name, call in calls.items()}
    graphs = {name: call for name, (call, _) in attempts.items()}
    # these are timed with their launches
    row["not_captured"] = {name: reason for name, (_, reason) in attempts.items() if reason is not None}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    stop = monotonic() + seconds
    while len(times["ours"]) < 5 or (monotonic() < stop and len(times["ours"]) < 100):
        for name, call in graphs.items():
            times[name].append(seconds_of(call, flush))
    mine = median(times["ours"])
    low, _, high = quantiles(times["ours"], n=4)
    floors = {"memory": problem.bytes / ceiling["copy"], "matmul": problem.flops / ceiling["matmul"]}
    bound = max(floors, key=floors.__getitem__)
    row |= {"median_s": mine, "iqr_s": high - low, "rounds": len(times["ours"]), "tokens": problem.tokens}
    row |= {"floor_s": floors[bound], "bound": bound, "floors_s": floors, "bytes": problem.bytes}
    row["baselines"] = {
        name: {
            "median_s": median(values), "ratio": median(values) / mine, "rounds": len(values), "extra_bytes": None,
            "same_result": name in problem.baselines,
        }
        for name, values in times.items() if name != "ours"
    } | {name: {"failed": reason} for name, reason in failed.items()}  # fmt: skip
    return row


def extra_bytes(call: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--op", choices=sorted({c.op for c in GPU_CASES}), help="one operator (default: all)")
    parser.add_argument("--dtype", help="one dtype (default: all)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing for each case (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which no case begins")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/benchmarks.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU that torch can use")
        return 2
    stop = monotonic() + options.budget
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    ceiling = ceilings(flush)
    rows: list[dict[str, Any]] = []
    for case in GPU_CASES:
        if options.op not in (None, case.op) or options.dtype not in (None, case.dtype):
            continue
        if monotonic() > stop:
            row = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "failed": "no time left"}
            rows.append(row | {"direction": "forward+backward" if case.backward else "forward"})
        else:
            try:
                rows.append(measure(case, ceiling, flush, options.seconds))
            except Exception as error:  # one case that breaks does not end the others
                row = {
                    "op": case.op,
                    "shape": case.shape,
                    "dtype": case.dtype,
                    "failed": f"{type(error).__name__}: {error}",
                }
                rows.append(row | {"direction": "forward+backward" if case.backward else "forward"})
            torch.cuda.empty_cache()
        print(report.line(rows[-1]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        beside = options.out.with_suffix(".tmp")
        beside.write_text(json.dumps({"ceilings": ceiling, "rows": rows}, indent=1) + "\n")
        os.replace(beside, options.out)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
