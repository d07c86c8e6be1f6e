"""Backward kernels of three-region attention: one owns queries, the other owns keys, so that nothing is added twice.

Memory. Tensors come with any strides but a last one of 1; lse, dlse and delta are contiguous. grad_query reads q, out,
dout, lse, dlse and its keys; writes delta and dq once. The kernels that own keys read q, dout, lse, delta of all
queries that see them: the pivots' write sums in accumulators, from which the window keys' start; these write dk and dv
once.
"""

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
    window_end,
    window_start,
)
from ._tiles import LOG2E, exactly, first_tile, gather_rows, heavy_first, kernel, load_rows, next_tile, store_rows


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


@kernel
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
    for t in tl.range(0, edge_tiles(full_pivots, pivots, headed, tail, window)):
        pivot, j = edge_tile(t, low, full_pivots, pivots, headed, tail, N)
        acc = grad_query_tile(
            acc, x, dx, k, v, pivot_k, pivot_v, k_s, v_s, row_lse, row_delta, pivot, j, i, start, seen, room, seqlen,
            scale, bias, True, WIDE, ACC, D, BLOCK_D, N,
        )  # fmt: skip
    for t in tl.range(0, full_pivots + tail - headed):
        pivot, j = full_tile(t, low, full_pivots, headed, N)
        acc = grad_query_tile(
            acc, x, dx, k, v, pivot_k, pivot_v, k_s, v_s, row_lse, row_delta, pivot, j, i, start, seen, room, seqlen,
            scale, bias, False, WIDE, ACC, D, BLOCK_D, N,
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


@kernel
def grad_key_kernel(
    q, k, v, pivots, rank, dout, lse, delta, part_k, part_v, dk, dv,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    kv_heads, group, section, seqlen, num_pivots, room, block_size, window_blocks, total_kv_heads, splits,
    scale, scale_low, step, step_low, bias, bias_low,
    PIVOT: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
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
    full_share, edge_share = full * group, edges * group
    if PIVOT:
        full_share, edge_share = tl.cdiv(full_share, splits), tl.cdiv(edge_share, splits)
    q += b * q_b + kv * group * q_h
    dout += b * dout_b + kv * group * dout_h
    stat = (b * kv_heads + kv) * group * seqlen
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
    u, g = first_tile(share * full_share, full)
    for _ in tl.range(share * full_share, tl.minimum((share + 1) * full_share, full * group)):
        i = low + (u + headed) * M
        sum_k, sum_v = grad_key_tile(
            sum_k, sum_v, y, z, q + g * q_h, dout + g * dout_h, lse + g * seqlen, delta + g * seqlen, q_s, dout_s,
            i, begin, end, seqlen, scale, bias, False, WIDE, ACC, D, BLOCK_D, M,
        )  # fmt: skip
        u, g = next_tile(u, g, full)
    u, g = first_tile(share * edge_share, edges)
    for _ in tl.range(share * edge_share, tl.minimum((share + 1) * edge_share, edges * group)):
        i = low + tl.where(u < headed, u, u + full) * M
        sum_k, sum_v = grad_key_tile(
            sum_k, sum_v, y, z, q + g * q_h, dout + g * dout_h, lse + g * seqlen, delta + g * seqlen, q_s, dout_s,
            i, begin, end, seqlen, scale, bias, True, WIDE, ACC, D, BLOCK_D, M,
        )  # fmt: skip
        u, g = next_tile(u, g, edges)

    if PIVOT:
        part = ((share * total_kv_heads + head).to(tl.int64) * room + n) * BLOCK_D
        store_rows(part_k + part, BLOCK_D, sum_k, room - n, N, BLOCK_D, BLOCK_D)
        store_rows(part_v + part, BLOCK_D, sum_v, room - n, N, BLOCK_D, BLOCK_D)
    else:
        sum_k *= exactly(step, step_low, ACC)
        at = n.to(tl.int64)
        store_rows(dk + b * dk_b + kv * dk_h + at * dk_s, dk_s, sum_k, seqlen - n, N, D, BLOCK_D)
        store_rows(dv + b * dv_b + kv * dv_h + at * dv_s, dv_s, sum_v, seqlen - n, N, D, BLOCK_D)
