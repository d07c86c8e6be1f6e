"""What is timed, as data: operator, shape, dtype, direction, baselines, and the bytes, FLOPs and exponentials that no
method can avoid."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cogview_ops as ops
from cogview_ops import patterns

from . import baselines

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Contestant = Callable[..., Any] | str  # a string says why there is none


@dataclass(frozen=True)
class Problem:
    """One case made concrete. Every function takes `inputs` and returns a tensor or a tuple of them."""

    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]  # takes also impl=
    baselines: dict[str, Contestant]  # the same result
    others: dict[str, Contestant]  # another result: dense attention, a softmax without the relaxation
    bytes: int  # read and written at least, forward and backward
    flops: int = 0  # of matrix products
    exps: int = 0  # exponentials
    tokens: int = 0  # whose time is worth telling one by one
    sample: Callable[[Tensor], Tensor] = lambda x: x  # part that float64 can check in little memory
    truth: Callable[..., Any] | None = None  # in float64; by default ours with impl="reference"


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


def heads_of_one_key_head(kv_heads: int, x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // kv_heads]


def _attention(
    op: Callable[..., Any],
    pairs: int,
    shape: tuple[int, int, int],
    same: dict[str, Contestant],
    dense: dict[str, Contestant],
    dtype: torch.dtype,
    back: bool,
) -> Problem:
    """Self-attention over so many pairs a head: 2 matrix products forward, 5 backward, both with all exponentials."""
    heads, seqlen, dim = shape
    inputs = tuple(torch.randn(1, heads, seqlen, dim, dtype=dtype) for _ in range(3))
    return Problem(
        inputs,
        op,
        same,
        dense,
        bytes=(12 if back else 4) * inputs[0].nbytes,
        flops=(7 if back else 2) * 2 * pairs * heads * dim,
        exps=(2 if back else 1) * pairs * heads,
        tokens=seqlen,
        sample=partial(heads_of_one_key_head, heads),
    )


BLOCK, WINDOW = 128, 6
DENSE = 8448  # tokens up to which the baselines with a mask of all pairs are run
LEFT_OUT = f"left out above {DENSE} tokens, memory and time are quadratic"


def spread_pivots(seqlen: int, text: int, total: int) -> Tensor:
    """All text and a random sample of the image, `[1, total]`."""
    position = torch.arange(seqlen)[None]
    return ops.sample_pivots(position < text, position >= text, total)


def three_region(dtype: torch.dtype, back: bool, *, heads=16, seqlen=4224, dim=64, pivots=768, text=128) -> Problem:
    chosen = spread_pivots(seqlen, text, pivots)
    position = torch.arange(seqlen)
    window_start = (position // BLOCK + 1 - WINDOW).clamp(min=0) * BLOCK
    before = torch.searchsorted(chosen[0], window_start.int())
    is_pivot = torch.isin(position, chosen)

    def sees(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        near = patterns.three_region_window(i, j, BLOCK, WINDOW)
        return near | is_pivot[j] & patterns.three_region_pivot(i, j, BLOCK, WINDOW)

    published = baselines.published_three_region(chosen, BLOCK, WINDOW)
    same: dict[str, Contestant] = dict.fromkeys(("vanilla", "masked SDPA", "FlexAttention"), LEFT_OUT)
    if seqlen <= DENSE:
        mask = sees(0, 0, position[:, None], position)
        same = {"vanilla": baselines.vanilla_attention(mask), "masked SDPA": baselines.sdpa(mask)}
        same["FlexAttention"] = baselines.flex_attention(sees, seqlen)
    problem = _attention(
        partial(ops.three_region_attention, pivots=chosen),
        int((position + 1 - window_start + before).sum()),
        (heads, seqlen, dim),
        same | {"published formula": published},
        {"causal SDPA": baselines.sdpa(causal=True)},
        dtype,
        back,
    )
    return problem if seqlen <= 4224 else replace(problem, truth=published)  # the reference is quadratic


def three_region_decode(
    dtype: torch.dtype, back: bool, *, lengths=(4224,), heads=16, kv_heads=16, dim=64, pivots=768, text=128
) -> Problem:
    """The last token of every sample against its cache."""
    chosen = torch.cat([spread_pivots(length, text, pivots) for length in lengths])
    batch, room, ends = len(lengths), max(lengths), torch.tensor(lengths)
    window, pivot = patterns.three_region_masks(ends[:, None] - 1, room, chosen, BLOCK, WINDOW)
    mask = (window | pivot)[:, None]
    cached = None if min(lengths) == room else (torch.arange(room) < ends[:, None])[:, None, None]
    query = torch.randn(batch, heads, 1, dim, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, room, dim, dtype=dtype)
    keys = int(mask.sum())
    return Problem(
        (query, key, value),
        partial(ops.three_region_attention_decode, pivots=chosen, cache_seqlens=ends),
        {
            "vanilla": baselines.vanilla_attention(mask),
            "masked SDPA": baselines.sdpa(mask),
            "gathered SDPA": baselines.gathered_sdpa(mask),
        },
        {"SDPA over the cache": baselines.sdpa(cached)},
        bytes=2 * query.element_size() * (keys * kv_heads + batch * heads) * dim,
        flops=2 * 2 * keys * heads * dim,
        exps=keys * heads,
        tokens=batch,
        sample=partial(heads_of_one_key_head, kv_heads),
    )


def local_2d(dtype: torch.dtype, back: bool, *, heads=16, side=64, dim=64, kernel=9) -> Problem:
    i = torch.arange(side * side)
    pattern = partial(patterns.local_2d, width=side, kernel_size=(kernel, kernel), raster_causal=False)
    mask = pattern(i[:, None], i)
    same: dict[str, Contestant] = {"vanilla": baselines.vanilla_attention(mask), "masked SDPA": baselines.sdpa(mask)}
    if dtype == torch.bfloat16 and not back:  # compiling it takes longer than all the timing
        same["FlexAttention"] = baselines.flex_attention(lambda b, h, i, j: pattern(i, j), len(i))
    dense: dict[str, Contestant] = {"global SDPA": baselines.sdpa()}
    if not back:
        dense["global vanilla"] = baselines.vanilla_attention(None)
    op = partial(ops.local_attention_2d, grid=(side, side), kernel_size=(kernel, kernel))
    return _attention(op, int(mask.sum()), (heads, len(i), dim), same, dense, dtype, back)


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
        exps=scores.numel() if mask is None else int(mask.sum()) * heads,
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
    )


def _cases(op: str, shape: str, build: Callable[..., Problem], *runs: tuple[str, bool]) -> list[Case]:
    return [Case(op, shape, dtype, back, build) for dtype, back in runs]


BOTH = [("bf16", False), ("fp32", False), ("bf16", True), ("fp32", True)]
LENGTHS = (1088, 2112, 4224, 8448, 16896, 33792)
DECODE: dict[str, dict[str, Any]] = {
    "16x4224x64": {"lengths": (4224,)},
    "16x33792x64": {"lengths": (33792,)},
    "16/4x33792x64": {"lengths": (33792,), "kv_heads": 4},
    "4x16x33792x64-ragged": {"lengths": (33792, 16896, 8448, 4224)},
}
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
    *_cases("local_attention_2d", "16x64x64x64", local_2d, *BOTH[:3]),
    *_cases("pb_relax_softmax", "16x1088x1088", softmax, *BOTH[:3]),
    *_cases("pb_relax_softmax", "16x1088x1088-causal", partial(softmax, causal=True), ("bf16", False)),
    *_cases("layer_norm", "8704x2560", layer_norm, *BOTH[:3]),
    *_cases("sandwich_layer_norm", "8704x2560", sandwich, *BOTH[:3]),
]
