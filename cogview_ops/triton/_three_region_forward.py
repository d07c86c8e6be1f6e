"""Forward and decode kernels of three-region attention.

Memory. Tensors come with any strides but a last one of 1; copies of the pivots' rows and their ranks are contiguous.
Forward reads q once, the keys of its window and the pivots before it once a tile of queries, mostly from cache; writes
out and lse once. Decode reads the same for a few queries; a program leaves its share of the keys in `part` and
`part_lse`, which `combine_kernel` merges in their order.
"""

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
    window_start,
)
from ._three_region_place import Packed, rank_row, sequence_of, statistics_row, token_tiles
from ._tiles import (
    LN2,
    LOWEST,
    Keys,
    exactly,
    gather_rows,
    head_of,
    heavy_first,
    kernel,
    keys_of,
    load_rows,
    log_sum,
    rows_from,
    softmax_step,
    store_rows,
)


@triton.jit
def forward_tile(
    acc, top, total, x, runs, tile, queries, scale, bias, EDGE: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr
):
    y = key_rows(runs.keys.k, runs.copies.k, runs, tile, EDGE, SHAPE)
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    if EDGE:
        s = tl.where(visible(tile, queries, SHAPE.N), s, float("-inf"))
    z = key_rows(runs.keys.v, runs.copies.v, runs, tile, EDGE, SHAPE)
    return softmax_step(acc, top, total, s, z, scale, tl.where(tile.pivot, bias, 0.0), ACC)


@kernel
def forward_kernel(
    q, keys, copies, rank, out, lse,
    heads, group, total_heads, section, seqlen, room, begins, sequences, tokens, block_size, window_blocks, scale, bias,
    NEGATE: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
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
    rows, at = sequence.seqlen - first, first.to(tl.int64)
    x = load_rows(q.at + at * q.s, q.s, rows, M, D, BLOCK_D, SHAPE.WIDE, True)
    if NEGATE:  # the sign of `scale`, so that a larger score is a larger logit
        x = -x
    runs = runs_of(keys, copies, b * (heads // group) + kv, sequence, kv, room, packed, BLOCK_D)

    acc = tl.zeros([M, BLOCK_D], ACC)
    top = tl.full([M], LOWEST, ACC)
    total = tl.zeros([M], ACC)
    for t in tl.range(0, edge_count(tiles)):
        seen = edge_tile(t, tiles, N)
        acc, top, total = forward_tile(acc, top, total, x, runs, seen, queries, scale, bias, True, ACC, SHAPE)
    for t in tl.range(0, full_count(tiles)):
        seen = full_tile(t, tiles, N)
        acc, top, total = forward_tile(acc, top, total, x, runs, seen, queries, scale, bias, False, ACC, SHAPE)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(out.at + at * out.s, out.s, acc, rows, M, D, BLOCK_D)
    value = log_sum(top, total) * LN2
    tl.store(lse + statistics_row(head, sequence, packed) + queries.i, value, mask=queries.i < sequence.seqlen)


@kernel
def decode_kernel(
    q, keys, pivots, lengths, leftpad, part, part_lse,
    kv_heads, group, steps, row_tiles, num_pivots, capacity, block_size, window_blocks, pivot_tiles, tiles, share_size,
    scale, bias, NEGATE: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Row r of a kv head is query head r % group at step r // group; a program takes `share_size` tiles of its keys.

    Which tiles there are depends on shapes alone: what a tile's rows do not see is not read.
    """
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    window = Window(capacity, block_size, window_blocks)
    share = tl.program_id(1)
    row_tile = tl.program_id(0) % row_tiles
    head = tl.program_id(0) // row_tiles
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    scale = exactly(scale, ACC)
    bias = exactly(bias, ACC)
    r = row_tile * M + tl.arange(0, M)
    there = r < steps * group
    step = tl.minimum(r // group, steps - 1)
    h = kv * group + r % group
    # clamped: contents are not trusted
    offset = tl.maximum(tl.minimum(tl.load(lengths + b), capacity) - steps, 0).to(tl.int32)
    if leftpad is not None:  # all counts from where the sequence begins; queries before that see nothing
        begin = tl.maximum(tl.minimum(tl.load(leftpad + b), capacity), 0).to(tl.int32)
        offset, capacity = offset - begin, capacity - begin
    i = offset + step
    start = window_start(i, window)
    low = window_start(tl.min(i, 0), window)
    last = tl.minimum(tl.max(i, 0), capacity - 1)
    high = window_start(last, window)
    cols = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (cols[None, :] < D)
    at = h * q.h + step.to(tl.int64) * q.s
    x = tl.load(q.at + b * q.b + at[:, None] + cols[None, :], mask=mask, other=0.0)
    if NEGATE:
        x = -x
    keys = keys_of(keys, b, kv)
    if leftpad is not None:
        keys = Keys(rows_from(keys.k, begin), rows_from(keys.v, begin))

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
        y = gather_rows(keys.k.at, keys.k.s, j, read, D, BLOCK_D)
        z = gather_rows(keys.v.at, keys.v.s, j, read, D, BLOCK_D)
        s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
        from_row = tl.where(pivot, 0, start)
        to_row = tl.where(pivot, start, i + 1)
        seen = read[None, :] & (j[None, :] >= from_row[:, None]) & (j[None, :] < to_row[:, None])
        s = tl.where(seen, s, float("-inf"))
        acc, top, total = softmax_step(acc, top, total, s, z, scale, tl.where(pivot, bias, 0.0), ACC)

    row = (share * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * M
    store_rows(part + row * BLOCK_D, BLOCK_D, acc / tl.where(total > 0, total, 1.0)[:, None], M, M, BLOCK_D, BLOCK_D)
    tl.store(part_lse + row + tl.arange(0, M), log_sum(top, total))
