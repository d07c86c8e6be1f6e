"""Seconds of calls that take turns, in one process, so that all see the same machine, hot or throttled."""

import math
from collections.abc import Callable
from functools import cached_property
from statistics import median
from time import monotonic, perf_counter
from typing import Any

import torch

from . import machine
from .words import why

Call = Callable[[], Any]
LARGE = 2**33  # bytes of a call beyond which it is not captured: a graph keeps them for itself
FLUSH = 2**28  # bytes written before each timed call: more than the L2 cache of any GPU
SHORT = 0.01  # seconds: what takes less is run untimed before, since it would find its code and data in no cache


def wall(call: Call) -> float:
    """Seconds of a call on a CPU."""
    begin = perf_counter()
    call()
    return perf_counter() - begin


class Turns:
    """Rounds in which every call is timed once. One that has had `share` seconds sits out the later rounds, but for
    "ours"; one that takes less than `short` is run untimed before."""

    def __init__(self, calls: dict[str, Call], seconds: Callable[[Call], float], share: float, short: float) -> None:
        self.calls, self.seconds, self.share = calls, seconds, share
        self.times: dict[str, list[float]] = {name: [] for name in calls}
        self.warmed: set[str] = set()
        for name, call in calls.items() if short else ():
            first = seconds(call)
            if first < short:
                self.warmed.add(name)
            else:  # of what takes seconds no call is wasted
                self.times[name].append(first)

    def round(self) -> None:
        for name, call in self.calls.items():
            times = self.times[name]
            if times and sum(times) >= self.share and name != "ours":
                continue
            if name in self.warmed:
                call()
            times.append(self.seconds(call))


class Clock:
    """Times calls, on a GPU from the device's point of view."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.device = torch.device("cuda" if gpu else "cpu")
        self.flush = torch.empty(FLUSH if gpu else 1, dtype=torch.uint8, device=self.device)

    def seconds(self, call: Call) -> float:
        if not self.gpu:
            return wall(call)
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
            return call, why(error)
        return graph.replay, None

    def in_turn(self, calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
        """Seconds of each call, round by round, for about so long: at least 5 rounds on a GPU, else 3."""
        if self.gpu:
            turns, least, most = Turns(calls, self.seconds, share=math.inf, short=0), 5, 100
        else:
            turns, least, most = Turns(calls, self.seconds, share=seconds, short=SHORT), 3, 200
        stop = monotonic() + seconds
        for done in range(most):
            if done >= least and monotonic() >= stop:
                break
            turns.round()
        return turns.times

    @cached_property
    def ceilings(self) -> dict[str, float]:
        """Bytes per second of a copy, counting both directions, and FLOPs per second of a bfloat16 product. Without a
        GPU, of so little that it only rehearses; `machine.ceilings` has those of a CPU."""
        size = 8192 if self.gpu else 64
        most = torch.cuda.get_device_properties(0).total_memory // 32 if self.gpu else 16 * size * size
        source = torch.ones(min(16 * size * size, most), device=self.device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=self.device)
        copy = median(self.seconds(lambda: target.copy_(source)) for _ in range(9))
        product = median(self.seconds(lambda: a @ b) for _ in range(9))
        return {"copy": 2 * source.nbytes / copy, "matmul": 2 * size**3 / product}

    def extra_bytes(self, call: Call) -> int | None:
        """Growth of the device's memory at its peak during one call, results included."""
        if not self.gpu:
            return machine.peak_extra_bytes(call)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def facts(self) -> dict[str, Any]:
        return machine.facts_of(self.device)
