"""Forward and decode kernels of three-region attention.

Memory. Tensors come with any strides but a last one of 1; copies of the pivots' rows and their ranks are contiguous.
Forward reads q once, the keys of its window and the pivots before it once a tile of queries, mostly from cache; writes
out and lse once. Decode reads the same for a few queries; a program leaves its share of the keys in `part` and
`part_lse`, which `combine_kernel` merges in their order.
"""

import math

import triton
import triton.language as tl

from ._three_region_pattern import (
    edge_tile,
    edge_tiles,
    full_tile,
    key_rows,
    key_tiles,
    valid_pivots,
    visible,
    window_start,
)
from ._tiles import LOWEST, exactly, gather_rows, heavy_first, kernel, load_rows, log_sum, softmax_step, store_rows

LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def forward_tile(
    acc, top, total, x, k, v, pivot_k, pivot_v, k_s, v_s, pivot, j, i, start, seen, room, seqlen, scale, bias,
    MASKED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    y = key_rows(k, pivot_k, k_s, pivot, j, room, seqlen, N, D, BLOCK_D, WIDE, MASKED)
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    if MASKED:
        s = tl.where(visible(pivot, j, start, seen, i, N), s, float("-inf"))
    z = key_rows(v, pivot_v, v_s, pivot, j, room, seqlen, N, D, BLOCK_D, WIDE, MASKED)
    return softmax_step(acc, top, total, s, z, scale, tl.where(pivot, bias, 0.0), ACC)


@kernel
def forward_kernel(
    q, k, v, pivot_k, pivot_v, rank, out, lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    heads, group, total_heads, section, seqlen, room, block_size, window_blocks, scale, scale_low, bias, bias_low,
    NEGATE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, head = heavy_first(tl.cdiv(seqlen, M), total_heads, section)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv = h // group
    scale = exactly(scale, scale_low, ACC)
    bias = exactly(bias, bias_low, ACC)
    first = tile * M
    last = tl.minimum(first + M, seqlen) - 1
    i = first + tl.arange(0, M)
    rank += b * (seqlen + 1)
    low, full_pivots, pivots, headed, tail, window = key_tiles(rank, first, last, block_size, window_blocks, N)
    at = first.to(tl.int64)
    x = load_rows(q + b * q_b + h * q_h + at * q_s, q_s, seqlen - first, M, D, BLOCK_D, WIDE, True)
    if NEGATE:  # the sign of `scale`, so that a larger score is a larger logit
        x = -x
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    copies = (b * (heads // group) + kv) * room * BLOCK_D
    pivot_k += copies
    pivot_v += copies
    start = window_start(i, block_size, window_blocks)
    seen = tl.load(rank + start, mask=i <= last, other=0)

    acc = tl.zeros([M, BLOCK_D], ACC)
    top = tl.full([M], LOWEST, ACC)
    total = tl.zeros([M], ACC)
    for t in tl.range(0, edge_tiles(full_pivots, pivots, headed, tail, window)):
        pivot, j = edge_tile(t, low, full_pivots, pivots, headed, tail, N)
        acc, top, total = forward_tile(
            acc, top, total, x, k, v, pivot_k, pivot_v, k_s, v_s, pivot, j, i, start, seen, room, seqlen, scale, bias,
            True, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip
    for t in tl.range(0, full_pivots + tail - headed):
        pivot, j = full_tile(t, low, full_pivots, headed, N)
        acc, top, total = forward_tile(
            acc, top, total, x, k, v, pivot_k, pivot_v, k_s, v_s, pivot, j, i, start, seen, room, seqlen, scale, bias,
            False, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out + b * out_b + h * out_h + at * out_s, out_s, acc, seqlen - first, M, D, BLOCK_D)
    value = log_sum(top, total) * LN2
    tl.store(lse + head.to(tl.int64) * seqlen + i, value, mask=i < seqlen)


@kernel
def decode_kernel(
    q, k, v, pivots, lengths, part, part_lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    kv_heads, group, steps, row_tiles, num_pivots, capacity, block_size, window_blocks, pivot_tiles, tiles, share_size,
    scale, scale_low, bias, bias_low,
    NEGATE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Row r of a kv head is query head r % group at step r // group; a program takes `share_size` tiles of its keys.

    Which tiles there are depends on shapes alone: what a tile's rows do not see is not read.
    """
    share = tl.program_id(1)
    row_tile = tl.program_id(0) % row_tiles
    head = tl.program_id(0) // row_tiles
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    scale = exactly(scale, scale_low, ACC)
    bias = exactly(bias, bias_low, ACC)
    r = row_tile * M + tl.arange(0, M)
    there = r < steps * group
    step = tl.minimum(r // group, steps - 1)
    h = kv * group + r % group
    # clamped: contents are not trusted
    offset = tl.maximum(tl.minimum(tl.load(lengths + b), capacity) - steps, 0).to(tl.int32)
    i = offset + step
    start = window_start(i, block_size, window_blocks)
    low = window_start(tl.min(i, 0), block_size, window_blocks)
    last = tl.minimum(tl.max(i, 0), capacity - 1)
    high = window_start(last, block_size, window_blocks)
    cols = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (cols[None, :] < D)
    x = tl.load(q + b * q_b + (h * q_h + step.to(tl.int64) * q_s)[:, None] + cols[None, :], mask=mask, other=0.0)
    if NEGATE:
        x = -x
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h

    acc = tl.zeros([M, BLOCK_D], ACC)
    top = tl.full([M], LOWEST, ACC)
    total = tl.zeros([M], ACC)
    for t in tl.range(share * share_size, tl.minimum((share + 1) * share_size, tiles)):
        pivot = t < pivot_tiles
        n = t * N + tl.arange(0, N)
        j = low + (t - pivot_tiles) * N + tl.arange(0, N)
        p, valid = valid_pivots(pivots + b * num_pivots, n, tl.where(pivot, num_pivots, 0), high)
        read = tl.where(pivot, valid, j <= last)
        j = tl.where(pivot, p, j)
        y = gather_rows(k, k_s, j, read, D, BLOCK_D)
        z = gather_rows(v, v_s, j, read, D, BLOCK_D)
        s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
        from_row = tl.where(pivot, 0, start)
        to_row = tl.where(pivot, start, i + 1)
        seen = read[None, :] & (j[None, :] >= from_row[:, None]) & (j[None, :] < to_row[:, None])
        s = tl.where(seen, s, float("-inf"))
        acc, top, total = softmax_step(acc, top, total, s, z, scale, tl.where(pivot, bias, 0.0), ACC)

    row = (share * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * M
    store_rows(part + row * BLOCK_D, BLOCK_D, acc / tl.where(total > 0, total, 1.0)[:, None], M, M, BLOCK_D, BLOCK_D)
    tl.store(part_lse + row + tl.arange(0, M), log_sum(top, total))
