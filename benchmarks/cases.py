"""What is timed, as data: operator, shape, dtype, direction, and the problem (*problems.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cogview_ops.bench.dalle_problems import dalle, dalle_schedule
from cogview_ops.bench.measure import direction, made
from cogview_ops.bench.problems import (
    Problem,
    cogview2,
    cross_resolution,
    local_2d,
    local_2d_bias,
    local_2d_decode,
    neighborhood,
    three_region,
    three_region_decode,
    three_region_varlen,
    upsampling,
)
from cogview_ops.bench.row_problems import add_layer_norm, layer_norm, linear, rms_norm, sandwich, sandwich_rms, softmax


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: str
    backward: bool
    build: Callable[[torch.dtype, bool], Problem] = field(repr=False)

    @property
    def direction(self) -> str:
        return direction(self.backward)

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}-{self.direction}"

    def problem(self, device: str = "cpu") -> Problem:
        return made(self.build, self.dtype, self.backward, device)


def select(cases: Sequence[Case], op: str | None, dtype: str | None) -> list[Case]:
    """Those of one operator or dtype, or of all. LookupError says what there is."""
    found = [case for case in cases if op in (None, case.op) and dtype in (None, case.dtype)]
    if not found:
        there = ", ".join(sorted({f"{case.op} in {case.dtype}" for case in cases}))
        raise LookupError(f"no case of {op or 'any operator'} in {dtype or 'any dtype'}, but of {there}")
    return found


def _cases(op: str, shape: str, build: Callable[..., Problem], *runs: tuple[str, bool]) -> list[Case]:
    return [Case(op, shape, dtype, back, build) for dtype, back in runs]


def widths(elements: int) -> list[Case]:
    """Rows from very short to very long, of as many elements together."""
    return [
        Case("layer_norm", f"{elements // n}x{n}", "bf16", False, partial(layer_norm, rows=elements // n, dim=n))
        for n in (64, 1024, 8192, 65536)
    ]


SLOW = ("F.unfold", "global vanilla")  # timed at 64x64 without dilation, which is enough
BOTH = [("bf16", False), ("fp32", False), ("bf16", True), ("fp32", True)]
LENGTHS = (1088, 2112, 4224, 8448, 16896, 33792)
DECODE: dict[str, dict[str, Any]] = {
    "16x4224x64": {"lengths": (4224,)},
    "16x33792x64": {"lengths": (33792,)},
    "16/4x33792x64": {"lengths": (33792,), "kv_heads": 4},
    "4x16x33792x64-ragged": {"lengths": (33792, 16896, 8448, 4224)},
}
PACKED: dict[str, tuple[int, ...]] = {
    "4x1024x8x64": (1024,) * 4,
    "6x8x64-of-128-to-2048": (2048, 128, 1024, 256, 128, 512),
    "200x20x8x64": (20,) * 200,
}
ITERATIVE: dict[str, Any] = {"text": 16, "coarse": None}
CASES = [
    *_cases("three_region_attention", "16x4224x64", three_region, *BOTH),
    *(
        Case("three_region_attention", f"4x{n}x64", "bf16", back, partial(three_region, heads=4, seqlen=n))
        for n in LENGTHS
        for back in (False, True)
    ),
    *(
        Case("three_region_attention_decode", shape, dtype, False, partial(three_region_decode, **how))
        for shape, how in DECODE.items()
        for dtype in ("bf16", "fp32")
    ),
    *(
        case
        for shape, lengths in PACKED.items()
        for case in _cases(
            "three_region_attention_varlen",
            shape,
            partial(three_region_varlen, lengths=lengths),
            *(BOTH if max(lengths) > 20 else BOTH[::2]),
        )
    ),
    *_cases("local_attention_2d", "16x64x64x64", local_2d, *BOTH),
    *_cases(
        "local_attention_2d",
        "4x128x128x64-13x13",
        partial(local_2d, heads=4, grid=(128, 128), kernel=(13, 13)),
        *BOTH[:3],
    ),
    *_cases("local_attention_2d", "16x64x64x64-17x9-causal-coarse-7x7", cross_resolution, *BOTH[:3]),
    *_cases(
        "local_attention_2d",
        "16x64x64x64-7x7-dilation-4",
        partial(local_2d, kernel=(7, 7), dilation=(4, 4), without=("vanilla", *SLOW)),
        *BOTH[::2],
    ),
    *_cases("local_attention_2d", "8x56x56x32-7x7-shift", neighborhood, *BOTH),
    *_cases("local_attention_2d", "8x56x56x32-7x7-bias", local_2d_bias, *BOTH),
    *_cases("local_attention_2d", "4x64x64x64-of-16x16-5x5", upsampling, *BOTH),
    *_cases("local_attention_2d", "16x50x50x64", partial(local_2d, grid=(50, 50), without=SLOW), *BOTH[:3]),
    *(
        Case(
            "local_attention_2d",
            f"4x{n}x{n}x64-alone",
            "bf16",
            back,
            partial(local_2d, heads=4, grid=(n, n), alone=True),
        )
        for n in (32, 64, 128, 256)
        for back in (False, True)[: 1 if n == 256 else 2]
    ),
    *(
        Case(
            "local_attention_2d_decode",
            f"16x{n}x{n}x64-17x9-text-coarse-7x7",
            dtype,
            False,
            partial(local_2d_decode, grid=(n, n)),
        )
        for n in (64, 128)
        for dtype in ("bf16", "fp32")
    ),
    *(
        Case(
            "local_attention_2d_decode",
            f"16x{n}x{n}x64-17x9-text-coarse-7x7-alone",
            "bf16",
            False,
            partial(local_2d_decode, grid=(n, n), alone=True),
        )
        for n in (64, 128, 256)
    ),
    *(
        case
        for kind in ("row", "column", "convolutional")
        for case in _cases("dalle_attention", f"16x1280x64-{kind}", partial(dalle, kind=kind), *BOTH[:3])
    ),
    *_cases("dalle_attention", "8x16x1280x64-schedule", dalle_schedule, BOTH[0], *BOTH[2:]),
    *_cases("cogview2_attention", "4x4096x64-direct", cogview2, *BOTH),
    *_cases("cogview2_attention", "4x3616x64-iterative", partial(cogview2, **ITERATIVE), *BOTH),
    *_cases("pb_relax_softmax", "16x1088x1088", softmax, *BOTH[:3]),
    *_cases("pb_relax_softmax", "16x1088x1088-causal", partial(softmax, causal=True), ("bf16", False)),
    *_cases("pb_relax_softmax", "2x4224x4224", partial(softmax, heads=2, seqlen=4224), ("bf16", False)),
    *_cases("layer_norm", "8704x2560", layer_norm, *BOTH[:3]),
    *_cases("layer_norm", "33792x2560", partial(layer_norm, rows=33792), ("bf16", False)),
    *widths(2**24),
    *_cases("sandwich_layer_norm", "8704x2560", sandwich, *BOTH[:3]),
    *_cases("sandwich_layer_norm", "33792x2560", partial(sandwich, rows=33792), ("bf16", False)),
    *_cases("sandwich_layer_norm", "8704x2560-pre", add_layer_norm, *BOTH),
    *(
        case
        for rows in (1, 8)
        for case in (
            *_cases("linear_decode", f"{rows}-by-16384x4096", partial(linear, rows=rows), *BOTH[:2]),
            *_cases("linear_decode", f"{rows}-by-16384x4096-int8", partial(linear, rows=rows, int8=True), BOTH[0]),
        )
    ),
    *_cases("rms_norm", "2048x4096", rms_norm, *BOTH),
    *(
        case
        for norms, runs in (("both", BOTH), ("pre", BOTH), ("post", BOTH[::2]))
        for case in _cases("sandwich_rms_norm", f"2048x4096-{norms}", partial(sandwich_rms, norms=norms), *runs)
    ),
]
# where a GPU is at hand: sizes of the published models, batches of eight as more heads; first those with a target
GPU_CASES = [
    *_cases("layer_norm", "33792x2560", partial(layer_norm, rows=33792), *BOTH[::2]),
    *_cases("sandwich_layer_norm", "33792x2560", partial(sandwich, rows=33792), *BOTH[::2]),
    *_cases("pb_relax_softmax", "320x1088x1088-causal", partial(softmax, heads=320, causal=True), *BOTH[::2]),
    *_cases("pb_relax_softmax", "16x4224x4224", partial(softmax, seqlen=4224), *BOTH[::2]),
    *_cases("three_region_attention", "160x4224x64", partial(three_region, heads=160), *BOTH[::2]),
    *_cases("three_region_attention", "40x33792x64", partial(three_region, heads=40, seqlen=33792), *BOTH[::2]),
    *_cases("local_attention_2d", "320x64x64x64", partial(local_2d, heads=320), *BOTH[::2]),
    *_cases("cogview2_attention", "48x4096x64-direct", partial(cogview2, heads=48), *BOTH[::2]),
    *_cases("dalle_attention", "8x496x1280x64-schedule", partial(dalle_schedule, heads=496), *BOTH[::2]),
    Case(
        "three_region_attention_decode",
        "8x40x4224x64",
        "bf16",
        False,
        partial(three_region_decode, lengths=(4224,) * 8, heads=40, kv_heads=40),
    ),
    *_cases("local_attention_2d", "16x128x128x64-13", partial(local_2d, grid=(128, 128), kernel=(13, 13)), *BOTH[::2]),
    *_cases("cogview2_attention", "48x3616x64-iterative", partial(cogview2, heads=48, **ITERATIVE), *BOTH[::2]),
    *widths(2**27),
    *(
        case
        for case in CASES  # linear_decode is for CPUs, CogView2's and DALL-E's schedule have more heads above
        if case.shape not in ("33792x2560", "8x16x1280x64-schedule")
        and case.op not in ("linear_decode", "cogview2_attention")
    ),
]
