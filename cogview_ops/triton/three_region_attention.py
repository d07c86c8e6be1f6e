"""Three-region attention in Triton: see cogview_ops/three_region_attention.py for what it computes.

A query tile's keys are two contiguous runs: the visible pivots, a prefix of a copy of their rows, and the window.
One loop goes over both; only tiles at an edge of the pattern are masked. Query i sees pivots [0, rank[w(i)]) and
keys [w(i), i], with w(i) the first key of its window and rank[j] the number of pivots before j.

Backward owns keys: a pivot's gradient is one program's sum over all queries that see it (or a few programs', over
fixed parts of them), a window key's likewise, and the second adds the first's float32 result before it rounds.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _registration
from ..three_region_attention import register
from . import configs
from ._tiles import (
    DEVICES,
    INTERPRETED,
    LOG2E,
    LOWEST,
    accumulator,
    block_d,
    exactly,
    gather_rows,
    heavy_first,
    launch,
    load_rows,
    log_sum,
    section,
    softmax_step,
    store_rows,
    strides,
    two_parts,
    wide,
)

LN2: tl.constexpr = tl.constexpr(math.log(2))
PIVOT_ROWS = 128  # copies of pivot rows are allocated in multiples of this, the most rows of a tile


@triton.jit
def window_start(i, block_size, window_blocks):
    """First key in the window of query i."""
    return tl.maximum(i // block_size - window_blocks + 1, 0) * block_size


@triton.jit
def window_end(j, block_size, window_blocks):
    """First query that no longer has key j in its window, and so sees it as a pivot."""
    return (j // block_size + window_blocks) * block_size


@triton.jit
def valid_pivots(pivots, n, num_pivots, seqlen):
    """Positions of pivots n, and which of them there are. Contents are not trusted: others count as position 0."""
    p = tl.load(pivots + n, mask=n < num_pivots, other=-1)
    valid = (p >= 0) & (p < seqlen)
    return tl.where(valid, p, 0).to(tl.int32), valid


@triton.jit
def rank_kernel(pivots, rank, num_pivots, seqlen, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """rank[b, j] = number of pivots before j, for j in [0, seqlen]; 2**STEPS > num_pivots."""
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + num_pivots
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        p = tl.load(pivots + b * num_pivots + middle, mask=middle < high, other=-1)
        before = (p >= 0) & (p < j)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    tl.store(rank + b * (seqlen + 1) + j, low, mask=j <= seqlen)


@triton.jit
def gather_kernel(
    k, v, pivots, pivot_k, pivot_v,
    k_b, k_h, k_s, v_b, v_h, v_s,
    kv_heads, num_pivots, room, seqlen,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies of the pivots' rows of k and v, [B, Hkv, room, BLOCK_D]; zeros where there is no pivot."""
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    h = tl.program_id(1) % kv_heads
    n = tl.program_id(0) * ROWS
    index, valid = valid_pivots(pivots + b * num_pivots, n + tl.arange(0, ROWS), num_pivots, seqlen)
    to = (tl.program_id(1).to(tl.int64) * room + n) * BLOCK_D
    rows = gather_rows(k + b * k_b + h.to(tl.int64) * k_h, k_s, index, valid, D, BLOCK_D)
    store_rows(pivot_k + to, BLOCK_D, rows, room - n, ROWS, BLOCK_D, BLOCK_D)
    rows = gather_rows(v + b * v_b + h.to(tl.int64) * v_h, v_s, index, valid, D, BLOCK_D)
    store_rows(pivot_v + to, BLOCK_D, rows, room - n, ROWS, BLOCK_D, BLOCK_D)


@triton.jit
def key_tiles(rank, first, last, block_size, window_blocks, N: tl.constexpr):
    """Tiles of the keys that queries [first, last] see, of N each; `full` are those that every query sees whole.

    Tiles of pivots are [0, pivots), `full_pivots` of them full; tiles of the window start at key `low`, and are
    [0, window), of which [head, tail) are full.
    """
    low = window_start(first, block_size, window_blocks)
    high = window_start(last, block_size, window_blocks)
    full_pivots = tl.load(rank + low) // N
    pivots = tl.cdiv(tl.load(rank + high), N)
    head = tl.cdiv(high - low, N)
    tail = tl.maximum(head, (first + 1 - low) // N)
    return low, full_pivots, pivots, head, tail, tl.cdiv(last + 1 - low, N)


@triton.jit
def full_tile(t, low, full_pivots, head, N: tl.constexpr):
    """Of the full tiles number t: whether it is of pivots, and its first column."""
    pivot = t < full_pivots
    return pivot, tl.where(pivot, t * N, low + (t - full_pivots + head) * N)


@triton.jit
def edge_tile(t, low, full_pivots, pivots, head, tail, N: tl.constexpr):
    """Of the other tiles number t, likewise."""
    pivot = t < pivots - full_pivots
    u = t - (pivots - full_pivots)
    u = tl.where(u < head, u, u + tail - head)
    return pivot, tl.where(pivot, (full_pivots + t) * N, low + u * N)


@triton.jit
def key_rows(
    x, copies, stride, pivot, j, room, seqlen,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [j, j + N) of the keys (or values) of one head, or of its pivots' copies."""
    stride = tl.where(pivot, BLOCK_D, stride)
    count = tl.where(pivot, room, seqlen) - j
    return load_rows(
        tl.where(pivot, copies, x) + j.to(tl.int64) * stride, stride, count, N, D, BLOCK_D, WIDE, MASKED
    )  # fmt: skip


@triton.jit
def visible(pivot, j, start, seen, i, N: tl.constexpr):
    """Mask of an edge tile, [rows, N]."""
    column = j + tl.arange(0, N)[None, :]
    return (column >= tl.where(pivot, 0, start)[:, None]) & (column < tl.where(pivot, seen, i + 1)[:, None])


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


@triton.jit
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
    for t in tl.range(0, full_pivots + tail - headed):
        pivot, j = full_tile(t, low, full_pivots, headed, N)
        acc, top, total = forward_tile(
            acc, top, total, x, k, v, pivot_k, pivot_v, k_s, v_s, pivot, j, i, start, seen, room, seqlen, scale, bias,
            False, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip
    for t in tl.range(0, pivots - full_pivots + headed + window - tail):
        pivot, j = edge_tile(t, low, full_pivots, pivots, headed, tail, N)
        acc, top, total = forward_tile(
            acc, top, total, x, k, v, pivot_k, pivot_v, k_s, v_s, pivot, j, i, start, seen, room, seqlen, scale, bias,
            True, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out + b * out_b + h * out_h + at * out_s, out_s, acc, seqlen - first, M, D, BLOCK_D)
    value = log_sum(top, total) * LN2
    tl.store(lse + head.to(tl.int64) * seqlen + i, value, mask=i < seqlen)


@triton.jit
def grad_query_tile(
    acc, x, dx, k, v, pivot_k, pivot_v, k_s, v_s, row_lse, row_delta, pivot, j, i, start, seen, room, seqlen,
    scale, bias,
    MASKED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    y = key_rows(k, pivot_k, k_s, pivot, j, room, seqlen, N, D, BLOCK_D, WIDE, MASKED)
    z = key_rows(v, pivot_v, v_s, pivot, j, room, seqlen, N, D, BLOCK_D, WIDE, MASKED)
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    p = tl.exp2(s * scale - (row_lse - tl.where(pivot, bias, 0.0))[:, None])
    if MASKED:
        p = tl.where(visible(pivot, j, start, seen, i, N), p, 0.0)
    dp = tl.dot(dx, tl.trans(z), input_precision="ieee", out_dtype=ACC)
    ds = p * (dp - row_delta[:, None])
    return tl.dot(ds.to(y.dtype), y, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def grad_query_kernel(
    q, k, v, pivot_k, pivot_v, rank, out, lse, dout, dlse, delta, dq,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s, dout_b, dout_h, dout_s, dq_b, dq_h, dq_s,
    heads, group, total_heads, section, seqlen, room, block_size, window_blocks,
    scale, scale_low, step, step_low, bias, bias_low,
    HAS_DLSE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dout * out) - dlse for the kernels that own keys."""
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
    rows = seqlen - first
    x = load_rows(q + b * q_b + h * q_h + at * q_s, q_s, rows, M, D, BLOCK_D, WIDE, True)
    dx = load_rows(dout + b * dout_b + h * dout_h + at * dout_s, dout_s, rows, M, D, BLOCK_D, WIDE, True)
    o = load_rows(out + b * out_b + h * out_h + at * out_s, out_s, rows, M, D, BLOCK_D, WIDE, True)
    stat = head.to(tl.int64) * seqlen + i
    row_delta = tl.sum(o.to(ACC) * dx.to(ACC), 1)
    if HAS_DLSE:
        row_delta -= tl.load(dlse + stat, mask=i < seqlen, other=0.0)
    tl.store(delta + stat, row_delta, mask=i < seqlen)
    row_lse = tl.load(lse + stat, mask=i < seqlen, other=float("inf")) * LOG2E
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    copies = (b * (heads // group) + kv) * room * BLOCK_D
    pivot_k += copies
    pivot_v += copies
    start = window_start(i, block_size, window_blocks)
    seen = tl.load(rank + start, mask=i <= last, other=0)

    acc = tl.zeros([M, BLOCK_D], ACC)
    for t in tl.range(0, full_pivots + tail - headed):
        pivot, j = full_tile(t, low, full_pivots, headed, N)
        acc = grad_query_tile(
            acc, x, dx, k, v, pivot_k, pivot_v, k_s, v_s, row_lse, row_delta, pivot, j, i, start, seen, room, seqlen,
            scale, bias, False, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip
    for t in tl.range(0, pivots - full_pivots + headed + window - tail):
        pivot, j = edge_tile(t, low, full_pivots, pivots, headed, tail, N)
        acc = grad_query_tile(
            acc, x, dx, k, v, pivot_k, pivot_v, k_s, v_s, row_lse, row_delta, pivot, j, i, start, seen, room, seqlen,
            scale, bias, True, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip

    acc *= exactly(step, step_low, ACC)
    store_rows(dq + b * dq_b + h * dq_h + at * dq_s, dq_s, acc, rows, M, D, BLOCK_D)


@triton.jit
def grad_key_tile(
    sum_k, sum_v, y, z, q, dout, lse, delta, q_s, dout_s, i, begin, end, seqlen, scale, bias,
    MASKED: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Adds queries [i, i + M) of one head to the sums of keys y, values z; row r is seen by [begin[r], end[r])."""
    at = i.to(tl.int64)
    x = load_rows(q + at * q_s, q_s, seqlen - i, M, D, BLOCK_D, WIDE, MASKED)
    dx = load_rows(dout + at * dout_s, dout_s, seqlen - i, M, D, BLOCK_D, WIDE, MASKED)
    rows = i + tl.arange(0, M)
    if MASKED:
        row_lse = tl.load(lse + rows, mask=rows < seqlen, other=0.0)
        row_delta = tl.load(delta + rows, mask=rows < seqlen, other=0.0)
    else:
        row_lse = tl.load(lse + rows)
        row_delta = tl.load(delta + rows)
    s = tl.dot(y, tl.trans(x), input_precision="ieee", out_dtype=ACC)
    p = tl.exp2(s * scale - (row_lse * LOG2E - bias)[None, :])
    if MASKED:
        p = tl.where((rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None]), p, 0.0)
    sum_v = tl.dot(p.to(dx.dtype), dx, sum_v, input_precision="ieee", out_dtype=ACC)
    dp = tl.dot(z, tl.trans(dx), input_precision="ieee", out_dtype=ACC)
    ds = p * (dp - row_delta[None, :])
    return tl.dot(ds.to(x.dtype), x, sum_k, input_precision="ieee", out_dtype=ACC), sum_v


@triton.jit
def grad_key_kernel(
    q, k, v, pivots, rank, dout, lse, delta, part_k, part_v, dk, dv,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    kv_heads, section, seqlen, num_pivots, room, block_size, window_blocks, total_kv_heads, splits,
    scale, scale_low, step, step_low, bias, bias_low,
    PIVOT: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys, from all queries of the group's heads that see them.

    PIVOT: the keys are pivots, each program takes one of `splits` equal runs of the queries behind their window, and
    leaves its float32 sums in part_k and part_v [splits, B, Hkv, room, BLOCK_D]. Otherwise they are window keys, and
    the sums of those that are also pivots start from these parts.
    """
    tiles = tl.cdiv(num_pivots if PIVOT else seqlen, N)
    tile, head = heavy_first(tiles, total_kv_heads, section)
    share = tl.program_id(1)
    if PIVOT:  # the first pivots, which most queries see, first
        tile = tiles - 1 - tile
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    scale = exactly(scale, scale_low, ACC)
    bias = exactly(bias if PIVOT else 0.0, bias_low if PIVOT else 0.0, ACC)
    n = tile * N
    columns = n + tl.arange(0, N)
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    # row r is seen by queries [begin[r], end[r]), all by [from_all, to_all), any by [low, high)
    if PIVOT:
        position, valid = valid_pivots(pivots + b * num_pivots, columns, num_pivots, seqlen)
        y = gather_rows(k, k_s, position, valid, D, BLOCK_D)
        z = gather_rows(v, v_s, position, valid, D, BLOCK_D)
        begin = tl.where(valid, window_end(position, block_size, window_blocks), seqlen)
        end = tl.zeros([N], tl.int32) + seqlen
        from_all = tl.max(tl.where(valid, begin, 0), 0)
        to_all = seqlen
        low = tl.min(begin, 0)
        high = seqlen
    else:
        at = n.to(tl.int64)
        y = load_rows(k + at * k_s, k_s, seqlen - n, N, D, BLOCK_D, WIDE, True)
        z = load_rows(v + at * v_s, v_s, seqlen - n, N, D, BLOCK_D, WIDE, True)
        begin = columns
        from_all = n + N - 1
        to_all = tl.minimum(window_end(n, block_size, window_blocks), seqlen)
        low = n
        high = tl.minimum(window_end(tl.minimum(n + N, seqlen) - 1, block_size, window_blocks), seqlen)
        end = tl.minimum(window_end(columns, block_size, window_blocks), high)
    # query tiles [0, queries) start at `low`; those of [headed, tail) are seen whole by every row
    queries = tl.cdiv(tl.maximum(high - low, 0), M)
    headed = tl.minimum(tl.cdiv(tl.maximum(from_all - low, 0), M), queries)
    tail = tl.maximum(headed, (to_all - low) // M)
    full, edges = tail - headed, queries - tail + headed
    full_share, edge_share = full * GROUP, edges * GROUP
    if PIVOT:
        full_share, edge_share = tl.cdiv(full_share, splits), tl.cdiv(edge_share, splits)
    q += b * q_b + kv * GROUP * q_h
    dout += b * dout_b + kv * GROUP * dout_h
    stat = (b * kv_heads + kv) * GROUP * seqlen
    lse += stat
    delta += stat

    sum_k = tl.zeros([N, BLOCK_D], ACC)
    sum_v = tl.zeros([N, BLOCK_D], ACC)
    if not PIVOT:
        ranks = rank + b * (seqlen + 1) + columns
        slot = tl.load(ranks, mask=columns < seqlen, other=0)
        is_pivot = tl.load(ranks + 1, mask=columns < seqlen, other=0) > slot
        for s in tl.range(0, splits):
            part = (s * total_kv_heads + head).to(tl.int64) * room * BLOCK_D
            sum_k += gather_rows(part_k + part, BLOCK_D, slot, is_pivot, BLOCK_D, BLOCK_D)
            sum_v += gather_rows(part_v + part, BLOCK_D, slot, is_pivot, BLOCK_D, BLOCK_D)
    for t in tl.range(share * full_share, tl.minimum((share + 1) * full_share, full * GROUP)):
        g = (t // full).to(tl.int64)
        i = low + (t % full + headed) * M
        sum_k, sum_v = grad_key_tile(
            sum_k, sum_v, y, z, q + g * q_h, dout + g * dout_h, lse + g * seqlen, delta + g * seqlen, q_s, dout_s,
            i, begin, end, seqlen, scale, bias, False, WIDE, ACC, D, BLOCK_D, M,
        )  # fmt: skip
    for t in tl.range(share * edge_share, tl.minimum((share + 1) * edge_share, edges * GROUP)):
        g = (t // edges).to(tl.int64)
        u = t % edges
        i = low + tl.where(u < headed, u, u + full) * M
        sum_k, sum_v = grad_key_tile(
            sum_k, sum_v, y, z, q + g * q_h, dout + g * dout_h, lse + g * seqlen, delta + g * seqlen, q_s, dout_s,
            i, begin, end, seqlen, scale, bias, True, WIDE, ACC, D, BLOCK_D, M,
        )  # fmt: skip

    if PIVOT:
        part = ((share * total_kv_heads + head).to(tl.int64) * room + n) * BLOCK_D
        store_rows(part_k + part, BLOCK_D, sum_k, room - n, N, BLOCK_D, BLOCK_D)
        store_rows(part_v + part, BLOCK_D, sum_v, room - n, N, BLOCK_D, BLOCK_D)
    else:
        sum_k *= exactly(step, step_low, ACC)
        at = n.to(tl.int64)
        store_rows(dk + b * dk_b + kv * dk_h + at * dk_s, dk_s, sum_k, seqlen - n, N, D, BLOCK_D)
        store_rows(dv + b * dv_b + kv * dv_h + at * dv_s, dv_s, sum_v, seqlen - n, N, D, BLOCK_D)


@triton.jit
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
    share = tl.program_id(0)
    row_tile = tl.program_id(1) % row_tiles
    head = tl.program_id(1) // row_tiles
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

    row = (share * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * M
    store_rows(part + row * BLOCK_D, BLOCK_D, acc / tl.where(total > 0, total, 1.0)[:, None], M, M, BLOCK_D, BLOCK_D)
    tl.store(part_lse + row + tl.arange(0, M), log_sum(top, total))


@triton.jit
def combine_kernel(
    part, part_lse, out, out_b, out_h, out_s, kv_heads, group, steps, row_tiles, shares,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SHARES: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Joins the shares of one row, in their order."""
    r, head = tl.program_id(0), tl.program_id(1)
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    share = tl.arange(0, SHARES)
    row = ((share * tl.num_programs(1) + head) * row_tiles + r // M).to(tl.int64) * M + r % M
    lse = tl.load(part_lse + row, mask=share < shares, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), LOWEST)
    weight = tl.exp2(lse - top)
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(part + row[:, None] * BLOCK_D + cols[None, :], mask=(share < shares)[:, None], other=0.0)
    total = tl.sum(weight, 0)
    x = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    at = b * out_b + (kv * group + r % group) * out_h + (r // group).to(tl.int64) * out_s
    tl.store(out + at + cols, x.to(out.dtype.element_ty), mask=cols < D)


# --- host ------------------------------------------------------------------------------------------------------------


class _Call:
    """What the kernels of one call share: clamped sizes, the rank table, the pivots' copies."""

    def __init__(self, q: Tensor, k: Tensor, pivots: Tensor, block_size: int, window_blocks: int) -> None:
        if INTERPRETED and q.dtype == torch.bfloat16:
            raise NotImplementedError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16 with it")
        self.arch = configs.chip(q.device)
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads, self.seqlen = k.shape[1], k.shape[2]
        # larger ones mean the same, and products stay below 2**31; a pivot beyond the first S is no pivot
        self.block_size = min(block_size, self.seqlen)
        self.window_blocks = min(window_blocks, triton.cdiv(self.seqlen, self.block_size))
        self.pivots = pivots[:, : self.seqlen].contiguous()
        self.num_pivots = self.pivots.shape[1]
        self.pattern = {"block_size": self.block_size, "window_blocks": self.window_blocks}
        self.shape = {"D": self.dim, "BLOCK_D": block_d(self.dim), "ACC": accumulator(q.dtype)}

    def config(self, kernel: str, q: Tensor) -> configs.Config:
        return configs.lookup(kernel, self.arch, q.element_size(), block_d(self.dim))

    def rank(self) -> Tensor:
        rank = torch.empty(self.batch, self.seqlen + 1, dtype=torch.int32, device=self.pivots.device)
        steps, rows = self.num_pivots.bit_length(), 256
        launch(
            rank_kernel, (triton.cdiv(self.seqlen + 1, rows), self.batch), configs.SMALL,
            pivots=self.pivots, rank=rank, num_pivots=self.num_pivots, seqlen=self.seqlen, STEPS=steps, ROWS=rows,
        )  # fmt: skip
        return rank

    def copies(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Rows of k and v at the pivots, contiguous, and how many there is room for.

        A copy moves 4 * P * D * size bytes per head, once; every query tile behind the window then reads runs of rows
        as it does in the window, not one row at an address that it must first load.
        """
        seen = self.num_pivots if self.block_size * self.window_blocks < self.seqlen else 0
        room = triton.cdiv(seen, PIVOT_ROWS) * PIVOT_ROWS
        shape = (self.batch, self.kv_heads, room, self.shape["BLOCK_D"])
        pivot_k, pivot_v, rows = k.new_empty(shape), v.new_empty(shape), 32
        if room:
            launch(
                gather_kernel, (room // rows, self.batch * self.kv_heads), configs.SMALL,
                k=k, v=v, pivots=self.pivots, pivot_k=pivot_k, pivot_v=pivot_v, **strides(k=k, v=v),
                kv_heads=self.kv_heads, num_pivots=self.num_pivots, room=room, seqlen=self.seqlen,
                D=self.dim, BLOCK_D=self.shape["BLOCK_D"], ROWS=rows,
            )  # fmt: skip
        return pivot_k, pivot_v, room


def forward(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor,
    block_size: int, window_blocks: int, pivot_bias: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _registration.attention_fake(q)
    if not q.numel():
        return out, lse
    call = _Call(q, k, pivots, block_size, window_blocks)
    config = call.config("forward", q)
    pivot_k, pivot_v, room = call.copies(k, v)
    group, total = call.heads // call.kv_heads, call.batch * call.heads
    launch(
        forward_kernel, (triton.cdiv(call.seqlen, config.m) * total,), config,
        q=q, k=k, v=v, pivot_k=pivot_k, pivot_v=pivot_v, rank=call.rank(), out=out, lse=lse,
        **strides(q=q, k=k, v=v, out=out), heads=call.heads, group=group, total_heads=total,
        section=section(total, group, k), seqlen=call.seqlen, room=room, **call.pattern,
        **_logits(abs(scale), pivot_bias), NEGATE=scale < 0, WIDE=wide(q, k, v), **call.shape, M=config.m, N=config.n,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pivots: Tensor,
    block_size: int, window_blocks: int, pivot_bias: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (_registration.empty_rows(x) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    call = _Call(q, k, pivots, block_size, window_blocks)
    config = call.config("grad_query", q)
    pivot_k, pivot_v, room = call.copies(k, v)
    rank, delta = call.rank(), torch.empty_like(lse)
    group, total = call.heads // call.kv_heads, call.batch * call.heads
    numbers = {**_logits(scale, pivot_bias), **two_parts(step=scale)}
    shared: dict[str, Any] = {
        "q": q, "k": k, "v": v, "rank": rank, "dout": dout, "lse": lse, "delta": delta,
        "section": section(total, group, k), "seqlen": call.seqlen, "room": room, **call.pattern, **numbers,
        "WIDE": wide(q, k, v, dout, out), **call.shape,
    }  # fmt: skip
    launch(
        grad_query_kernel, (triton.cdiv(call.seqlen, config.m) * total,), config,
        **shared, pivot_k=pivot_k, pivot_v=pivot_v, out=out, dlse=lse if dlse is None else dlse.contiguous(), dq=dq,
        **strides(q=q, k=k, v=v, out=out, dout=dout, dq=dq), heads=call.heads, group=group, total_heads=total,
        HAS_DLSE=dlse is not None, M=config.m, N=config.n,
    )  # fmt: skip
    del pivot_k, pivot_v
    pairs = call.batch * call.kv_heads
    pivot_config = call.config("grad_pivot", q)
    pivot_programs = triton.cdiv(min(room, call.num_pivots), pivot_config.n) * pairs
    splits = configs.splits(pivot_programs, triton.cdiv(call.seqlen, pivot_config.m) * group, 8, q.device)
    parts = [torch.empty(splits, pairs, room, block_d(call.dim), dtype=lse.dtype, device=q.device) for _ in "kv"]
    shared |= {
        "pivots": call.pivots, "part_k": parts[0], "part_v": parts[1], "dk": dk, "dv": dv,
        **strides(q=q, k=k, v=v, dout=dout, dk=dk, dv=dv), "section": section(pairs, 1, q),
        "kv_heads": call.kv_heads, "total_kv_heads": pairs, "num_pivots": call.num_pivots,
        "splits": splits, "GROUP": group,
    }  # fmt: skip
    if room:
        grid = (pivot_programs, splits)
        launch(grad_key_kernel, grid, pivot_config, **shared, PIVOT=True, M=pivot_config.m, N=pivot_config.n)
    config = call.config("grad_key", q)
    shared["splits"] = splits if room else 0
    grid = (triton.cdiv(call.seqlen, config.n) * pairs, 1)
    launch(grad_key_kernel, grid, config, **shared, PIVOT=False, M=config.m, N=config.n)
    return dq, dk, dv


def decode(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, cache_seqlens: Tensor,
    block_size: int, window_blocks: int, pivot_bias: float, scale: float,
) -> Tensor:  # fmt: skip
    out = _registration.decode_fake(q)
    if not q.numel():
        return out
    call = _Call(q, k, pivots, block_size, window_blocks)
    config = call.config("decode", q)
    steps, group, pairs = q.shape[2], call.heads // call.kv_heads, call.batch * call.kv_heads
    row_tiles = triton.cdiv(steps * group, config.m)
    # the window of a tile's rows is at most that of one row and the steps between them
    window = call.block_size * call.window_blocks + min(steps, triton.cdiv(config.m, group) + 1)
    pivot_tiles = triton.cdiv(call.num_pivots, config.n)
    tiles = pivot_tiles + triton.cdiv(min(window, call.seqlen), config.n)
    shares = configs.splits(pairs * row_tiles, tiles, 64, q.device)
    share_size = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, share_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    part = torch.empty(shares, pairs, row_tiles * config.m, block_d(call.dim), dtype=dtype, device=q.device)
    part_lse = torch.empty(part.shape[:3], dtype=dtype, device=q.device)
    launch(
        decode_kernel, (shares, pairs * row_tiles), config,
        q=q, k=k, v=v, pivots=call.pivots, lengths=cache_seqlens.contiguous(), part=part, part_lse=part_lse,
        **strides(q=q, k=k, v=v), kv_heads=call.kv_heads, group=group, steps=steps, row_tiles=row_tiles,
        num_pivots=call.num_pivots, capacity=call.seqlen, **call.pattern, pivot_tiles=pivot_tiles, tiles=tiles,
        share_size=share_size, **_logits(abs(scale), pivot_bias), NEGATE=scale < 0, **call.shape,
        M=config.m, N=config.n,
    )  # fmt: skip
    launch(
        combine_kernel, (steps * group, pairs), configs.SMALL,
        part=part, part_lse=part_lse, out=out, **strides(out=out), kv_heads=call.kv_heads, group=group, steps=steps,
        row_tiles=row_tiles, shares=shares, D=call.dim, BLOCK_D=block_d(call.dim),
        SHARES=triton.next_power_of_2(shares), M=config.m,
    )  # fmt: skip
    return out


def _logits(scale: float, pivot_bias: float) -> dict[str, float]:
    """`scale` and `bias` in base 2. Not quite 0: masked scores, -inf, must stay below all others."""
    return two_parts(scale=scale / math.log(2) or 1e-30, bias=pivot_bias / math.log(2))


register("cogview_ops_triton")
_registration.implement("three_region_attention_fwd", forward, DEVICES)
_registration.implement("three_region_attention_bwd", backward, DEVICES)
_registration.implement("three_region_attention_decode", decode, DEVICES)
