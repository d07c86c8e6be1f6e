"""What attention kernels share: loading rows, a step of the online softmax, a step of its derivative.

Scores are kept in base 2: `scale` and `bias` come multiplied by log2(e), and exp2 is one instruction.
"""

import ctypes
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import Config

LN2: tl.constexpr = tl.constexpr(math.log(2))
LOG2E: tl.constexpr = tl.constexpr(1 / math.log(2))
# Integers that are compiled for any value, not anew for 1 and for multiples of 16 as Triton does it unasked. Strides
# and the columns of rows are not among them, for wide accesses, nor are block_size and splits, which cost registers.
SIZES = (
    "above", "before", "bits", "capacity", "coarse_height", "coarse_kernel_h", "coarse_kernel_w", "coarse_width",
    "columns", "count", "dilation_h", "dilation_w", "first_head", "group", "heads", "height", "kernel_h", "kernel_w",
    "key_height", "key_width", "kv_heads", "num_pivots", "pitch", "pivot_tiles", "prefix_len", "room", "row_tiles",
    "rows", "rows_per_matrix", "rows_per_seed", "section", "seqlen", "sequences", "share_size", "shares", "steps",
    "threshold", "tiles", "tokens", "total_heads", "total_kv_heads", "width", "window_blocks",
)  # fmt: skip
LOWEST: tl.constexpr = tl.constexpr(-3.4e38)  # the maximum of nothing: finite, so that differences stay numbers


class Rows(NamedTuple):
    """A tensor [B, H, S, D], contiguous in D: where it starts, and its strides."""

    at: Any
    b: Any
    h: Any
    s: Any


class Keys(NamedTuple):
    """Keys and values, or their gradients."""

    k: Any  # Rows, or where rows start that are contiguous
    v: Any


class Number(NamedTuple):
    """A float of the host: arguments are float32, float64 comes in two of them."""

    high: float
    low: float


class Shape(NamedTuple):
    """What tiles are compiled for."""

    D: int  # columns
    BLOCK_D: int  # the next power of 2
    M: int  # queries
    N: int  # keys
    WIDE: bool = False  # offsets inside a tile may pass 31 bits


def kernel(fn: Any) -> Any:
    """`triton.jit` of what is launched."""
    return triton.jit(fn, do_not_specialize=SIZES)


@triton.jit
def exactly(number, ACC: tl.constexpr):
    """A `Number` in ACC."""
    return tl.full((), 0.0, ACC) + number.high + number.low


@triton.jit
def head_of(x, b, h):
    """Rows of one head."""
    return Rows(x.at + b * x.b + h * x.h, x.b, x.h, x.s)


@triton.jit
def rows_from(x, first):
    """From row `first` on."""
    return Rows(x.at + first.to(tl.int64) * x.s, x.b, x.h, x.s)


@triton.jit
def keys_of(keys, b, h):
    """Of one head."""
    return Keys(head_of(keys.k, b, h), head_of(keys.v, b, h))


@triton.jit
def load_rows(
    at, s, count, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr
):
    """Rows [0, ROWS) at a pointer, and zeros behind column D; if MASKED there are `count` rows, then zeros."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    steps = rows.to(tl.int64) if WIDE else rows
    at = at + steps[:, None] * s + cols[None, :]
    if MASKED:
        return tl.load(at, mask=(rows[:, None] < count) & (cols[None, :] < D), other=0.0)
    elif D != BLOCK_D:
        return tl.load(at, mask=cols[None, :] < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def gather_rows(at, stride, index, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `index` of a matrix; where not `valid` zeros, and nothing is read."""
    cols = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (cols[None, :] < D)
    return tl.load(at + index[:, None].to(tl.int64) * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(at, stride, x, count, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < count) & (cols[None, :] < D)
    tl.store(at + rows[:, None].to(tl.int64) * stride + cols[None, :], x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def scatter_rows(at, stride, index, valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `gather_rows`."""
    cols = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (cols[None, :] < D)
    tl.store(at + index[:, None].to(tl.int64) * stride + cols[None, :], x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(acc, top, total, s, v, scale, bias, ACC: tl.constexpr):
    """Adds keys with raw scores s (masked: -inf) and values v to rows with maximum `top` and sum `total`. scale > 0."""
    new_top = tl.maximum(top, tl.max(s, 1) * scale + bias)
    p = tl.exp2(s * scale - (new_top - bias)[:, None])
    keep = tl.exp2(top - new_top)
    total = total * keep + tl.sum(p, 1)
    acc = acc * keep[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=ACC)
    return acc, new_top, total


@triton.jit
def query_gradient_step(acc, x, dx, y, z, lse, delta, seen, scale, bias, ACC: tl.constexpr):
    """Adds keys y with values z to the gradient of queries x, dx that of their outputs; `seen` None: all of them."""
    ds = score_gradients(x, dx, y, z, lse, delta, seen, scale, bias, ACC)
    return tl.dot(ds.to(y.dtype), y, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def score_gradients(x, dx, y, z, lse, delta, seen, scale, bias, ACC: tl.constexpr):
    """`bias`: one, or one for each score."""
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    p = tl.exp2(s * scale - (lse[:, None] - bias))
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(dx, tl.trans(z), input_precision="ieee", out_dtype=ACC)
    return p * (dp - delta[:, None])


@triton.jit
def key_gradient_step(sum_k, sum_v, x, dx, y, z, lse, delta, seen, scale, bias, ACC: tl.constexpr):
    """Adds queries x to the gradients of keys y and values z, likewise; tiles are [keys, queries]."""
    s = tl.dot(y, tl.trans(x), input_precision="ieee", out_dtype=ACC)
    p = tl.exp2(s * scale - (lse[None, :] - bias))
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    sum_v = tl.dot(p.to(dx.dtype), dx, sum_v, input_precision="ieee", out_dtype=ACC)
    dp = tl.dot(z, tl.trans(dx), input_precision="ieee", out_dtype=ACC)
    ds = p * (dp - delta[None, :])
    return tl.dot(ds.to(x.dtype), x, sum_k, input_precision="ieee", out_dtype=ACC), sum_v


@triton.jit
def log_sum(top, total):
    """log2 of the sum of a row's exponentials; -inf for a row without keys."""
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def heavy_first(tiles, heads, section):
    """(tile, head) of this program: `section` heads at a time, whose keys fit in the L2 cache together; in a
    section the last tiles, which have most keys, first."""
    pid = tl.program_id(0)
    group = pid // (section * tiles)
    size = tl.minimum(section, heads - group * section)
    rest = pid - group * section * tiles
    return tiles - 1 - rest // size, group * section + rest % size


@kernel
def combine_kernel(
    part, part_lse, out, lse, kv_heads, group, pitch, steps, row_tiles, shares,
    SHARES: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Joins the shares of one row, in their order. The rows of a step are `pitch` apart from those of the next. `lse`
    may be None."""
    rows = steps * group
    r, head = tl.program_id(0) % rows, tl.program_id(0) // rows
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    share = tl.arange(0, SHARES)
    of_share = (share * (tl.num_programs(0) // rows) + head).to(tl.int64) * row_tiles * SHAPE.M
    row = of_share + r // group * pitch + r % group
    logs = tl.load(part_lse + row, mask=share < shares, other=float("-inf"))
    top = tl.maximum(tl.max(logs, 0), LOWEST)
    weight = tl.exp2(logs - top)
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(part + row[:, None] * BLOCK_D + cols[None, :], mask=(share < shares)[:, None], other=0.0)
    total = tl.sum(weight, 0)
    x = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    at = b * out.b + (kv * group + r % group) * out.h + (r // group).to(tl.int64) * out.s
    tl.store(out.at + at + cols, x.to(out.at.dtype.element_ty), mask=cols < SHAPE.D)
    if lse is not None:
        tl.store(lse + (head * group + r % group) * steps + r // group, log_sum(top, total) * LN2)


@triton.jit
def first_tile(t, tiles):
    """Of `tiles` tiles a head number t in all: (number in its head, head)."""
    tiles = tl.maximum(tiles, 1)
    return t % tiles, (t // tiles).to(tl.int64)


@triton.jit
def next_tile(u, head, tiles):
    """Without a division, which takes 24 instructions."""
    last = u + 1 >= tiles
    return tl.where(last, 0, u + 1), head + last.to(tl.int64)


# --- host ------------------------------------------------------------------------------------------------------------

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in NumPy, on CPU tensors too
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")


def check_interpreter(x: torch.Tensor) -> None:
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16 with it")


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    first = next(iter(arguments.values()))
    while isinstance(first, tuple):
        first = first[0]
    with torch.cuda.device_of(first):  # Triton launches on the current device
        kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def rows_of(x: torch.Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


def readable(dout: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension; zeros where only lse has a gradient."""
    if dout is None:
        return torch.zeros_like(out)
    return dout if dout.stride(-1) == 1 else dout.contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """Of numbers that kernels read by their place: a shard of them may be a slice."""
    return None if x is None else x.contiguous()


def number(x: float) -> Number:
    high = ctypes.c_float(x).value
    return Number(high, x - high)


def logit(value: float) -> Number:
    """In base 2."""
    return number(value / math.log(2))


def scale_of(scale: float) -> Number:
    """Not quite 0: masked scores, -inf, must stay below all others."""
    return number(scale / math.log(2) or 1e-30)


def wide(*tensors: torch.Tensor) -> bool:
    """Whether offsets inside a tile (at most 256 rows) can pass 31 bits."""
    return any(x.stride(2) >= 2**23 for x in tensors)


def section(heads: int, group: int, key: torch.Tensor) -> int:
    """Query heads to work on at a time: their keys and values take 32 MB, half of an H100's L2 cache."""
    pairs = 2**25 // max(2 * key.shape[2] * key.shape[3] * key.element_size(), 1)
    return min(heads, max(pairs, 1) * group)


def block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def power_of_4(n: int) -> int:
    """At least n: a constant of kernels that takes few values."""
    return 4 ** math.ceil(math.log2(n) / 2)


def accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
