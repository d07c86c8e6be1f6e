"""Backward kernels of three-region attention: one owns queries, the other owns keys, so that nothing is added twice.

Memory. Tensors come with any strides but a last one of 1; lse, dlse and delta are contiguous. grad_query reads q, out,
dout, lse, dlse and its keys; writes delta and dq once. The kernels that own keys read q, dout, lse, delta of all
queries that see them: the pivots' write sums in accumulators, from which the window keys' start; these write dk and dv
once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._three_region_pattern import (
    Window,
    edge_count,
    edge_tile,
    full_count,
    full_tile,
    key_rows,
    queries_of,
    runs_of,
    valid_pivots,
    visible,
    window_end,
)
from ._three_region_place import (
    PIVOT_ROWS,
    Packed,
    pivot_room,
    pivot_row,
    pivot_rows,
    rank_row,
    sequence_of,
    statistics_pitch,
    statistics_row,
    token_tiles,
)
from ._tiles import (
    LOG2E,
    Rows,
    exactly,
    first_tile,
    gather_rows,
    head_of,
    heavy_first,
    kernel,
    key_gradient_step,
    keys_of,
    load_rows,
    next_tile,
    query_gradient_step,
    store_rows,
)


@triton.jit
def grad_query_tile(
    acc, x, dx, lse, delta, runs, tile, queries, scale, bias, EDGE: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr
):
    y = key_rows(runs.keys.k, runs.copies.k, runs, tile, EDGE, SHAPE)
    z = key_rows(runs.keys.v, runs.copies.v, runs, tile, EDGE, SHAPE)
    seen = visible(tile, queries, SHAPE.N) if EDGE else None
    bias = tl.where(tile.pivot, bias, 0.0)
    return query_gradient_step(acc, x, dx, y, z, lse, delta, seen, scale, bias, ACC)


@kernel
def grad_query_kernel(
    q, keys, copies, rank, out, lse, dout, dlse, delta, dq,
    heads, group, total_heads, section, seqlen, room, begins, sequences, tokens, block_size, window_blocks,
    scale, step, bias, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dout * out) - dlse for the kernels that own keys."""
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    packed = Packed(begins, sequences, tokens)
    tile, head = heavy_first(token_tiles(seqlen, packed, M), total_heads, section)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv = h // group
    scale = exactly(scale, ACC)
    bias = exactly(bias, ACC)
    sequence, first = sequence_of(b, tile * M, seqlen, packed, None, M)
    if begins is not None:  # noqa: SIM102 (one is known to the compiler)
        if first >= sequence.seqlen:
            return
    window = Window(sequence.seqlen, block_size, window_blocks)
    queries, tiles = queries_of(first, rank + rank_row(sequence, packed), window, M, N)
    q, out = head_of(q, sequence.sample, h), head_of(out, sequence.sample, h)
    dout, dq = head_of(dout, sequence.sample, h), head_of(dq, sequence.sample, h)
    rows, at = sequence.seqlen - first, first.to(tl.int64)
    x = load_rows(q.at + at * q.s, q.s, rows, M, D, BLOCK_D, SHAPE.WIDE, True)
    dx = load_rows(dout.at + at * dout.s, dout.s, rows, M, D, BLOCK_D, SHAPE.WIDE, True)
    o = load_rows(out.at + at * out.s, out.s, rows, M, D, BLOCK_D, SHAPE.WIDE, True)
    stat, there = statistics_row(head, sequence, packed) + queries.i, queries.i < sequence.seqlen
    row_delta = tl.sum(o.to(ACC) * dx.to(ACC), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + stat, mask=there, other=0.0)
    tl.store(delta + stat, row_delta, mask=there)
    row_lse = tl.load(lse + stat, mask=there, other=float("inf")) * LOG2E
    runs = runs_of(keys, copies, b * (heads // group) + kv, sequence, kv, room, packed, BLOCK_D)

    acc = tl.zeros([M, BLOCK_D], ACC)
    for t in tl.range(0, edge_count(tiles)):
        seen = edge_tile(t, tiles, N)
        acc = grad_query_tile(acc, x, dx, row_lse, row_delta, runs, seen, queries, scale, bias, True, ACC, SHAPE)
    for t in tl.range(0, full_count(tiles)):
        seen = full_tile(t, tiles, N)
        acc = grad_query_tile(acc, x, dx, row_lse, row_delta, runs, seen, queries, scale, bias, False, ACC, SHAPE)

    acc *= exactly(step, ACC)
    store_rows(dq.at + at * dq.s, dq.s, acc, rows, M, D, BLOCK_D)


class QueryRows(NamedTuple):
    """What gradients of keys take of a head's queries."""

    q: Rows
    dout: Rows
    lse: Any
    delta: Any
    seqlen: Any
    pitch: Any  # of lse and delta, between heads


class Span(NamedTuple):
    """Queries [begin, end) see a key."""

    begin: Any
    end: Any


@triton.jit
def rows_on(x, g):
    """Of the head g further on."""
    q = Rows(x.q.at + g * x.q.h, x.q.b, x.q.h, x.q.s)
    dout = Rows(x.dout.at + g * x.dout.h, x.dout.b, x.dout.h, x.dout.s)
    return QueryRows(q, dout, x.lse + g * x.pitch, x.delta + g * x.pitch, x.seqlen, x.pitch)


@triton.jit
def grad_key_tile(
    sum_k, sum_v, y, z, asking, i, span, scale, bias, EDGE: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr
):
    """Adds queries [i, i + M) of one head to the sums of keys y, values z, whose spans are given."""
    M: tl.constexpr = SHAPE.M
    q, dout, at, count = asking.q, asking.dout, i.to(tl.int64), asking.seqlen - i
    x = load_rows(q.at + at * q.s, q.s, count, M, SHAPE.D, SHAPE.BLOCK_D, SHAPE.WIDE, EDGE)
    dx = load_rows(dout.at + at * dout.s, dout.s, count, M, SHAPE.D, SHAPE.BLOCK_D, SHAPE.WIDE, EDGE)
    rows = i + tl.arange(0, M)
    if EDGE:
        row_lse = tl.load(asking.lse + rows, mask=rows < asking.seqlen, other=0.0)
        row_delta = tl.load(asking.delta + rows, mask=rows < asking.seqlen, other=0.0)
    else:
        row_lse = tl.load(asking.lse + rows)
        row_delta = tl.load(asking.delta + rows)
    row_lse *= LOG2E
    seen = (rows[None, :] >= span.begin[:, None]) & (rows[None, :] < span.end[:, None]) if EDGE else None
    return key_gradient_step(sum_k, sum_v, x, dx, y, z, row_lse, row_delta, seen, scale, bias, ACC)


@kernel
def grad_key_kernel(
    q, keys, pivots, rank, dout, lse, delta, parts, grads,
    kv_heads, group, total_kv_heads, section, seqlen, num_pivots, room, begins, sequences, tokens,
    block_size, window_blocks, splits, scale, step, bias, PIVOT: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys, from all queries of the group's heads that see them.

    PIVOT: the keys are pivots, each program takes one of `splits` equal runs of the queries behind their window, and
    leaves its float32 sums in `parts`, [splits, B, Hkv, room, BLOCK_D]. Otherwise they are window keys, and
    the sums of those that are also pivots start from these parts.
    """
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    packed = Packed(begins, sequences, tokens)
    if not PIVOT:
        tiles = token_tiles(seqlen, packed, N)
    elif begins is None:
        tiles = tl.cdiv(num_pivots, N)
    else:
        tiles = (pivot_rows(room, packed) // N).to(tl.int32)
    tile, head = heavy_first(tiles, total_kv_heads, section)
    share = tl.program_id(1)
    if PIVOT:  # the first pivots, which most queries see, first
        tile = tiles - 1 - tile
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    sequence, n = sequence_of(b, tile * N, seqlen, packed, room if PIVOT else None, PIVOT_ROWS if PIVOT else N)
    if begins is not None:
        behind = sequence.seqlen > window_blocks * block_size  # some queries see keys as pivots
        if PIVOT:
            if (n >= pivot_room(sequence, room, packed)) | (not behind):
                return
        else:
            splits = tl.where(behind, splits, 0)
            if n >= sequence.seqlen:
                return
    seqlen = sequence.seqlen
    window = Window(seqlen, block_size, window_blocks)
    scale = exactly(scale, ACC)
    bias = exactly(bias, ACC) if PIVOT else 0.0
    columns = n + tl.arange(0, N)
    keys = keys_of(keys, sequence.sample, kv)
    # row r is seen by queries [begin[r], end[r]), all by [from_all, to_all), any by [low, high)
    if PIVOT:
        position, valid = valid_pivots(pivots + sequence.number * num_pivots, columns, num_pivots, seqlen)
        y = gather_rows(keys.k.at, keys.k.s, position, valid, D, BLOCK_D)
        z = gather_rows(keys.v.at, keys.v.s, position, valid, D, BLOCK_D)
        begin = tl.where(valid, window_end(position, window), seqlen)
        end = tl.zeros([N], tl.int32) + seqlen
        from_all = tl.max(tl.where(valid, begin, 0), 0)
        to_all = seqlen
        low = tl.min(begin, 0)
        high = seqlen
    else:
        at = n.to(tl.int64)
        y = load_rows(keys.k.at + at * keys.k.s, keys.k.s, seqlen - n, N, D, BLOCK_D, SHAPE.WIDE, True)
        z = load_rows(keys.v.at + at * keys.v.s, keys.v.s, seqlen - n, N, D, BLOCK_D, SHAPE.WIDE, True)
        begin = columns
        from_all = n + N - 1
        to_all = tl.minimum(window_end(n, window), seqlen)
        low = n
        high = tl.minimum(window_end(tl.minimum(n + N, seqlen) - 1, window), seqlen)
        end = tl.minimum(window_end(columns, window), high)
    # query tiles [0, queries) start at `low`; those of [headed, tail) are seen whole by every row
    queries = tl.cdiv(tl.maximum(high - low, 0), M)
    headed = tl.minimum(tl.cdiv(tl.maximum(from_all - low, 0), M), queries)
    tail = tl.maximum(headed, (to_all - low) // M)
    full, edges = tail - headed, queries - tail + headed
    full_share, edge_share = full * group, edges * group
    if PIVOT:
        full_share, edge_share = tl.cdiv(full_share, splits), tl.cdiv(edge_share, splits)
    stat = statistics_row((b * kv_heads + kv) * group, sequence, packed)
    q, dout = head_of(q, sequence.sample, kv * group), head_of(dout, sequence.sample, kv * group)
    asking = QueryRows(q, dout, lse + stat, delta + stat, seqlen, statistics_pitch(sequence, packed))
    span = Span(begin, end)

    sum_k = tl.zeros([N, BLOCK_D], ACC)
    sum_v = tl.zeros([N, BLOCK_D], ACC)
    if not PIVOT:
        ranks = rank + rank_row(sequence, packed) + columns
        slot = tl.load(ranks, mask=columns < seqlen, other=0)
        is_pivot = tl.load(ranks + 1, mask=columns < seqlen, other=0) > slot
        for s in tl.range(0, splits):
            part = pivot_row((s * total_kv_heads + head).to(tl.int64), sequence, room, packed) * BLOCK_D
            sum_k += gather_rows(parts.k + part, BLOCK_D, slot, is_pivot, BLOCK_D, BLOCK_D)
            sum_v += gather_rows(parts.v + part, BLOCK_D, slot, is_pivot, BLOCK_D, BLOCK_D)
    u, g = first_tile(share * full_share, full)
    for _ in tl.range(share * full_share, tl.minimum((share + 1) * full_share, full * group)):
        i = low + (u + headed) * M
        own = rows_on(asking, g)
        sum_k, sum_v = grad_key_tile(sum_k, sum_v, y, z, own, i, span, scale, bias, False, ACC, SHAPE)
        u, g = next_tile(u, g, full)
    u, g = first_tile(share * edge_share, edges)
    for _ in tl.range(share * edge_share, tl.minimum((share + 1) * edge_share, edges * group)):
        i = low + tl.where(u < headed, u, u + full) * M
        own = rows_on(asking, g)
        sum_k, sum_v = grad_key_tile(sum_k, sum_v, y, z, own, i, span, scale, bias, True, ACC, SHAPE)
        u, g = next_tile(u, g, edges)

    if PIVOT:
        part = (pivot_row((share * total_kv_heads + head).to(tl.int64), sequence, room, packed) + n) * BLOCK_D
        store_rows(parts.k + part, BLOCK_D, sum_k, room - n, N, BLOCK_D, BLOCK_D)
        store_rows(parts.v + part, BLOCK_D, sum_v, room - n, N, BLOCK_D, BLOCK_D)
    else:
        sum_k *= exactly(step, ACC)
        at, grads = n.to(tl.int64), keys_of(grads, sequence.sample, kv)
        store_rows(grads.k.at + at * grads.k.s, grads.k.s, sum_k, seqlen - n, N, D, BLOCK_D)
        store_rows(grads.v.at + at * grads.v.s, grads.v.s, sum_v, seqlen - n, N, D, BLOCK_D)
