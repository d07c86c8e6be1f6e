"""What is timed, as data: operator, shape, dtype, direction, baselines, and the bytes and FLOPs no method can avoid."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cogview_ops as ops
from cogview_ops import patterns

from . import baselines

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """One case made concrete. Every function takes `inputs` and returns a tensor or a tuple of them."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]  # takes also impl=
    baselines: dict[str, Callable[..., Any]]  # the same result
    others: dict[str, Callable[..., Any]]  # another result: dense attention, a softmax without the relaxation
    bytes: int  # read and written at least, forward and backward
    flops: int
    sample: Callable[[Tensor], Tensor] = lambda x: x  # part that float64 can check in little memory


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: str
    backward: bool
    build: Callable[[torch.dtype, bool], Problem] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}-{'forward+backward' if self.backward else 'forward'}"

    def problem(self) -> Problem:
        torch.manual_seed(0)
        return self.build(DTYPES[self.dtype], self.backward)


def first_head(x: Tensor) -> Tensor:
    return x[:, :1]


def _attention(
    op: Callable[..., Any], mask: Tensor, heads: int, dim: int, dense: dict[str, Any], dtype: torch.dtype, back: bool
) -> Problem:
    """Self-attention over the pairs of `mask`: 2 matrix products forward, 5 backward (the scores again)."""
    inputs = tuple(torch.randn(1, heads, mask.shape[0], dim, dtype=dtype) for _ in range(3))
    same = {"vanilla": baselines.vanilla_attention(mask), "masked SDPA": baselines.sdpa(mask)}
    if dtype == torch.bfloat16 and not back:  # compiling it takes longer than all the timing
        same["FlexAttention"] = baselines.flex_attention(mask)
    return Problem(
        inputs,
        op,
        same,
        dense,
        bytes=(12 if back else 4) * inputs[0].nbytes,
        flops=(7 if back else 2) * 2 * int(mask.sum()) * heads * dim,
        sample=first_head,
    )


def spread_pivots(seqlen: int, text: int, total: int) -> Tensor:
    """All text and a random sample of the image, `[1, total]`."""
    position = torch.arange(seqlen)[None]
    return ops.sample_pivots(position < text, position >= text, total)


def three_region(dtype: torch.dtype, back: bool, *, heads=16, seqlen=4224, dim=64, pivots=768, text=128) -> Problem:
    chosen = spread_pivots(seqlen, text, pivots)
    window, pivot = patterns.three_region_masks(torch.arange(seqlen)[None], seqlen, chosen, 128, 6)
    op = partial(ops.three_region_attention, pivots=chosen)
    dense = {"causal SDPA": baselines.sdpa(causal=True)}
    return _attention(op, (window | pivot)[0], heads, dim, dense, dtype, back)


def three_region_decode(dtype: torch.dtype, back: bool, *, heads=16, seqlen=4224, dim=64, pivots=768, text=128):
    """The last token against the cache."""
    chosen = spread_pivots(seqlen, text, pivots)
    window, pivot = patterns.three_region_masks(torch.tensor([[seqlen - 1]]), seqlen, chosen, 128, 6)
    mask = (window | pivot)[0]
    lengths = torch.tensor([seqlen], dtype=torch.int32)
    query = torch.randn(1, heads, 1, dim, dtype=dtype)
    key, value = torch.randn(2, 1, heads, seqlen, dim, dtype=dtype)
    keys = int(mask.sum())
    return Problem(
        (query, key, value),
        partial(ops.three_region_attention_decode, pivots=chosen, cache_seqlens=lengths),
        {"vanilla": baselines.vanilla_attention(mask), "masked SDPA": baselines.sdpa(mask)},
        {"SDPA over the cache": baselines.sdpa()},
        bytes=2 * (keys + 1) * heads * dim * query.element_size(),
        flops=2 * 2 * keys * heads * dim,
        sample=first_head,
    )


def local_2d(dtype: torch.dtype, back: bool, *, heads=16, side=64, dim=64, kernel=9) -> Problem:
    i = torch.arange(side * side)
    kernel_size = (kernel, kernel)
    mask = patterns.local_2d(i[:, None], i, width=side, kernel_size=kernel_size, raster_causal=False)
    op = partial(ops.local_attention_2d, grid=(side, side), kernel_size=kernel_size)
    dense = {"global SDPA": baselines.sdpa()} | ({} if back else {"global vanilla": baselines.vanilla_attention(None)})
    return _attention(op, mask, heads, dim, dense, dtype, back)


def softmax(dtype: torch.dtype, back: bool, *, heads=16, seqlen=1088, causal=False, alpha=32.0) -> Problem:
    scores = torch.randn(1, heads, seqlen, seqlen, dtype=dtype) / alpha
    mask = torch.ones(seqlen, seqlen, dtype=torch.bool).tril() if causal else None
    formula = baselines.relaxed_softmax(alpha, mask)
    return Problem(
        (scores,),
        partial(ops.pb_relax_softmax, alpha=alpha, causal=causal),
        {"eager formula": formula, "torch.compile": baselines.compile_formula(formula)},
        {"torch.softmax": baselines.torch_softmax},
        bytes=(5 if back else 2) * scores.nbytes,
        flops=0,
    )


def _norm_weights(count: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple((torch.randn(dim) * 0.1 + (i % 2 == 0)).to(dtype) for i in range(2 * count))


def layer_norm(dtype: torch.dtype, back: bool, *, rows=8704, dim=2560) -> Problem:
    x = torch.randn(rows, dim, dtype=dtype)
    return Problem(
        (x, *_norm_weights(1, dim, dtype)),
        ops.layer_norm,
        {
            "eager formula": baselines.relaxed_layer_norm,
            "torch.compile": baselines.compile_formula(baselines.relaxed_layer_norm),
        },
        {"F.layer_norm": baselines.layer_norm},
        bytes=(5 if back else 2) * x.nbytes,
        flops=0,
    )


def sandwich(dtype: torch.dtype, back: bool, *, rows=8704, dim=2560) -> Problem:
    branch, residual = torch.randn(2, rows, dim, dtype=dtype)
    formula = baselines.sandwich(baselines.relaxed_layer_norm)
    return Problem(
        (branch, residual, *_norm_weights(2, dim, dtype)),
        ops.sandwich_layer_norm,
        {"eager formula": formula, "torch.compile": baselines.compile_formula(formula)},
        {"F.layer_norm": baselines.sandwich(baselines.layer_norm)},
        bytes=(10 if back else 4) * branch.nbytes,
        flops=0,
    )


def _cases(op: str, shape: str, build: Callable[..., Problem], *runs: tuple[str, bool]) -> list[Case]:
    return [Case(op, shape, dtype, back, build) for dtype, back in runs]


BOTH = [("bf16", False), ("fp32", False), ("bf16", True), ("fp32", True)]
CASES = [
    *_cases("three_region_attention", "16x4224x64", three_region, *BOTH),
    *_cases("three_region_attention_decode", "16x4224x64", three_region_decode, ("bf16", False), ("fp32", False)),
    *_cases("local_attention_2d", "16x64x64x64", local_2d, *BOTH[:3]),
    *_cases("pb_relax_softmax", "16x1088x1088", softmax, *BOTH[:3]),
    *_cases("pb_relax_softmax", "16x1088x1088-causal", partial(softmax, causal=True), ("bf16", False)),
    *_cases("layer_norm", "8704x2560", layer_norm, *BOTH[:3]),
    *_cases("sandwich_layer_norm", "8704x2560", sandwich, *BOTH[:3]),
]
