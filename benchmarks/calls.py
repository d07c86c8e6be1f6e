"""`python -m benchmarks.calls`: what a call costs where there is nothing to compute.

Sixteen tokens, two heads of 16, one thread: all of the time is checks, dispatch and allocation. Contestants take turns;
a round is the mean of 50 calls. Writes results/calls/<device>.json.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

import cogview_ops as ops
from cogview_ops.bench import machine

from . import report

SHAPE, LOOPS = (1, 2, 16, 16), 50
Call = Callable[[], Any]


def calls(gradients: bool) -> dict[str, tuple[Call, dict[str, Call]]]:
    """By operator, ours and what torch has beside it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *SHAPE).requires_grad_(gradients)
    weight, bias = torch.randn(2, SHAPE[-1]).requires_grad_(gradients)
    pivots, lengths = torch.tensor([[0, 3]], dtype=torch.int32), torch.tensor([12], dtype=torch.int32)
    blocks: dict[str, Any] = {"block_size": 4, "window_blocks": 2}
    window: dict[str, Any] = {"grid": (4, 4), "kernel_size": (3, 3)}
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    ends = torch.tensor([0, SHAPE[2]], dtype=torch.int32)
    sdpa: dict[str, Call] = {"SDPA": partial(F.scaled_dot_product_attention, q, k, v)}
    norm: dict[str, Call] = {"F.layer_norm": partial(F.layer_norm, q, SHAPE[-1:], weight, bias)}
    root: dict[str, Call] = {"F.rms_norm": partial(F.rms_norm, q, SHAPE[-1:], weight)}
    found: dict[str, tuple[Call, dict[str, Call]]] = {
        "three_region_attention": (partial(ops.three_region_attention, q, k, v, pivots, **blocks), sdpa),
        "local_attention_2d": (partial(ops.local_attention_2d, q, k, v, **window), sdpa),
        "pb_relax_softmax": (partial(ops.pb_relax_softmax, q), {"torch.softmax": partial(torch.softmax, q, -1)}),
        "layer_norm": (partial(ops.layer_norm, q, weight, bias), norm),
        "sandwich_layer_norm": (partial(ops.sandwich_layer_norm, q, k, weight, bias, weight, bias), norm),
        "rms_norm": (partial(ops.rms_norm, q, weight), root),
        "sandwich_rms_norm": (partial(ops.sandwich_rms_norm, q, k, weight, weight), root),
        "three_region_attention_varlen": (
            partial(ops.three_region_attention_varlen, *packed, pivots, cu_seqlens=ends, max_seqlen=SHAPE[2], **blocks),
            sdpa,
        ),
    }
    if not gradients:
        last = q[:, :, 11:12].contiguous()
        sdpa = {"SDPA": partial(F.scaled_dot_product_attention, last, k, v)}
        decode = partial(ops.three_region_attention_decode, last, k, v, pivots, lengths, **blocks)
        found["three_region_attention_decode"] = decode, sdpa
        square = torch.randn(SHAPE[-1], SHAPE[-1])
        linear: dict[str, Call] = {"F.linear": partial(F.linear, last, square, bias)}
        found["linear_decode"] = partial(ops.linear_decode, last, square, bias), linear
        found["local_attention_2d_decode"] = partial(ops.local_attention_2d_decode, last, k, v, lengths, **window), sdpa
    return found


def seconds(call: Call) -> float:
    begin = perf_counter()
    for _ in range(LOOPS):
        call()
    return (perf_counter() - begin) / LOOPS


def row(op: str, ours: Call, others: dict[str, Call], rounds: int, gradients: bool) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    for _ in range(rounds):
        for name, call in {"ours": ours, **others}.items():
            call()
            times[name].append(seconds(call))
    mine = median(times["ours"])
    low, _, high = quantiles(times["ours"], n=4)
    baselines = {
        name: {"median_s": median(times[name]), "ratio": median(times[name]) / mine, "same_result": False}
        for name in others
    }
    case = {"op": op, "shape": "x".join(map(str, SHAPE)), "dtype": "fp32"}
    case["direction"] = "forward, recorded for a backward" if gradients else "forward"
    return case | machine.facts() | {"median_s": mine, "iqr_s": high - low, "rounds": rounds, "baselines": baselines}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "calls", help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=200, help="of each call (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for op, (ours, others) in calls(gradients).items():
                found = row(op, ours, others, options.rounds, gradients)
                report.save(found, options.out)
                print(f"{op:30} {found['direction']:33} {found['median_s'] * 1e6:6.1f} us", end="")
                print(*(f", {name} {x['median_s'] * 1e6:.1f} us" for name, x in found["baselines"].items()), sep="")


if __name__ == "__main__":
    main()
