"""Which keys a tile of queries sees, as runs of rows: shared by the kernels of three-region attention.

Query i sees pivots [0, rank[w(i)]) and keys [w(i), i], with w(i) the first key of its window and rank[j] the number of
pivots before j. Tiles that every row sees whole need no mask; they and the others, at an edge of the pattern, are two
loops, because the compiler turns a mask behind a branch into selects that all tiles then pay for. Edges come first,
because there always is one.
"""

import triton
import triton.language as tl

from ._tiles import gather_rows, kernel, load_rows, store_rows


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


@kernel
def rank_kernel(pivots, rank, num_pivots, seqlen, steps, ROWS: tl.constexpr):
    """rank[b, j] = number of pivots before j, for j in [0, seqlen]; 2**steps > num_pivots."""
    tiles = tl.cdiv(seqlen + 1, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    j = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + num_pivots
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        p = tl.load(pivots + b * num_pivots + middle, mask=middle < high, other=-1)
        before = (p >= 0) & (p < j)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    tl.store(rank + b * (seqlen + 1) + j, low, mask=j <= seqlen)


@kernel
def gather_kernel(
    k, v, pivots, pivot_k, pivot_v,
    k_b, k_h, k_s, v_b, v_h, v_s,
    kv_heads, num_pivots, room, seqlen,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies of the pivots' rows of k and v, [B, Hkv, room, BLOCK_D]; zeros where there is no pivot."""
    tiles = room // ROWS
    head = tl.program_id(0) // tiles
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    n = tl.program_id(0) % tiles * ROWS
    index, valid = valid_pivots(pivots + b * num_pivots, n + tl.arange(0, ROWS), num_pivots, seqlen)
    to = (head.to(tl.int64) * room + n) * BLOCK_D
    rows = gather_rows(k + b * k_b + h * k_h, k_s, index, valid, D, BLOCK_D)
    store_rows(pivot_k + to, BLOCK_D, rows, room - n, ROWS, BLOCK_D, BLOCK_D)
    rows = gather_rows(v + b * v_b + h * v_h, v_s, index, valid, D, BLOCK_D)
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
def edge_tiles(full_pivots, pivots, head, tail, window):
    """How many tiles are not full, and at least one: a loop that may be skipped zeroes the sums on a path of its own,
    for which ptxas makes every wgmma wait. That one lies behind the last query, its keys are not read."""
    return tl.maximum(pivots - full_pivots + head + window - tail, 1)


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
def between(x, low, count):
    """Whether x is one of `count` numbers from `low` on: one comparison, since those before `low` wrap around."""
    return (x - low).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def visible(pivot, j, start, seen, i, N: tl.constexpr):
    """Mask of an edge tile, [rows, N]."""
    low = tl.where(pivot, 0, start)
    count = tl.where(pivot, seen, i + 1) - low
    return between(j + tl.arange(0, N)[None, :], low[:, None], count[:, None])
