"""Which keys a tile of queries sees, as runs of rows: shared by the kernels of three-region attention.

Query i sees pivots [0, rank[w(i)]) and keys [w(i), i], with w(i) the first key of its window and rank[j] the number of
pivots before j. Tiles that every row sees whole need no mask; they and the others, at an edge of the pattern, are two
loops, because the compiler turns a mask behind a branch into selects that all tiles then pay for. Edges come first,
because there always is one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._three_region_place import (
    PIVOT_ROWS,
    Packed,
    Sequence,
    pivot_room,
    pivot_row,
    pivot_rows,
    rank_row,
    sequence_at,
    sequence_of,
)
from ._tiles import Keys, gather_rows, kernel, keys_of, load_rows, store_rows


class Window(NamedTuple):
    seqlen: Any
    block_size: Any
    blocks: Any


class Queries(NamedTuple):
    """Positions i; of each the first key of its window, how many keys there and how many pivots it sees."""

    i: Any
    start: Any
    keys: Any
    pivots: Any


class KeyTiles(NamedTuple):
    """Of the keys that queries see, in tiles; full are those that every query sees whole.

    Tiles of pivots are [0, pivots), `full_pivots` of them full; tiles of the window start at key `low`, and are
    [0, window), of which [head, tail) are full.
    """

    low: Any
    full_pivots: Any
    pivots: Any
    head: Any
    tail: Any
    window: Any


class Tile(NamedTuple):
    """Whether it is of pivots, and its first column."""

    pivot: Any
    j: Any


class Runs(NamedTuple):
    """Keys of one head, and copies of its pivots' rows, with `room` for so many."""

    keys: Keys
    copies: Keys
    seqlen: Any
    room: Any


@triton.jit
def window_start(i, window):
    """First key in the window of query i."""
    return tl.maximum(i // window.block_size - window.blocks + 1, 0) * window.block_size


@triton.jit
def window_end(j, window):
    """First query that no longer has key j in its window, and so sees it as a pivot."""
    return (j // window.block_size + window.blocks) * window.block_size


@triton.jit
def valid_pivots(pivots, n, num_pivots, seqlen):
    """Positions of pivots n, and which of them there are. Contents are not trusted: others count as position 0."""
    p = tl.load(pivots + n, mask=n < num_pivots, other=-1)
    valid = (p >= 0) & (p < seqlen)
    return tl.where(valid, p, 0).to(tl.int32), valid


@kernel
def rank_kernel(pivots, rank, num_pivots, seqlen, steps, begins, sequences, tokens, ROWS: tl.constexpr):
    """rank[b, j] = number of pivots before j, for j in [0, seqlen] of sequence b; 2**steps > num_pivots."""
    packed = Packed(begins, sequences, tokens)
    if begins is None:
        tiles = tl.cdiv(seqlen + 1, ROWS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        sequence, first = Sequence(b, b, seqlen), tl.program_id(0) % tiles * ROWS
    else:
        sequence, first = sequence_at(tl.program_id(0) * ROWS, seqlen, packed, None, ROWS)
    j = first + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + num_pivots
    for _ in tl.range(0, steps):
        middle = (low + high) // 2
        p = tl.load(pivots + sequence.number * num_pivots + middle, mask=middle < high, other=-1)
        before = (p >= 0) & (p < j)
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    tl.store(rank + rank_row(sequence, packed) + j, low, mask=j <= sequence.seqlen)


@kernel
def gather_kernel(
    keys, pivots, copies, kv_heads, num_pivots, room, seqlen, begins, sequences, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies of the pivots' rows of k and v, [B, Hkv, room, BLOCK_D]; zeros where there is no pivot."""
    packed = Packed(begins, sequences, tokens)
    tiles = (pivot_rows(room, packed) // ROWS).to(tl.int32)
    head = tl.program_id(0) // tiles
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    sequence, n = sequence_of(b, tl.program_id(0) % tiles * ROWS, seqlen, packed, room, PIVOT_ROWS)
    if begins is not None:  # noqa: SIM102 (one is known to the compiler)
        if n >= pivot_room(sequence, room, packed):
            return
    own = pivots + sequence.number * num_pivots
    index, valid = valid_pivots(own, n + tl.arange(0, ROWS), num_pivots, sequence.seqlen)
    to = (pivot_row(head.to(tl.int64), sequence, room, packed) + n) * BLOCK_D
    keys = keys_of(keys, sequence.sample, h)
    rows = gather_rows(keys.k.at, keys.k.s, index, valid, D, BLOCK_D)
    store_rows(copies.k + to, BLOCK_D, rows, room - n, ROWS, BLOCK_D, BLOCK_D)
    rows = gather_rows(keys.v.at, keys.v.s, index, valid, D, BLOCK_D)
    store_rows(copies.v + to, BLOCK_D, rows, room - n, ROWS, BLOCK_D, BLOCK_D)


@triton.jit
def queries_of(first, rank, window, M: tl.constexpr, N: tl.constexpr):
    """M queries from the `first` one on, and the keys that these see, of N a tile."""
    last = tl.minimum(first + M, window.seqlen) - 1
    i = first + tl.arange(0, M)
    low, high = window_start(first, window), window_start(last, window)
    full_pivots = tl.load(rank + low) // N
    pivots = tl.cdiv(tl.load(rank + high), N)
    head = tl.cdiv(high - low, N)
    tail = tl.maximum(head, (first + 1 - low) // N)
    start = window_start(i, window)
    seen = tl.load(rank + start, mask=i <= last, other=0)
    tiles = KeyTiles(low, full_pivots, pivots, head, tail, tl.cdiv(last + 1 - low, N))
    return Queries(i, start, i + 1 - start, seen), tiles


@triton.jit
def runs_of(keys, copies, pair, sequence, kv, room, packed, BLOCK_D: tl.constexpr):
    """Of a sequence's head `kv`, and pair number `pair` of sample and kv head."""
    to = pivot_row(pair, sequence, room, packed) * BLOCK_D
    keys, copies = keys_of(keys, sequence.sample, kv), Keys(copies.k + to, copies.v + to)
    return Runs(keys, copies, sequence.seqlen, pivot_room(sequence, room, packed))


@triton.jit
def edge_count(tiles):
    """How many tiles are not full, and at least one: a loop that may be skipped zeroes the sums on a path of its own,
    for which ptxas makes every wgmma wait. That one lies behind the last query, its keys are not read."""
    return tl.maximum(tiles.pivots - tiles.full_pivots + tiles.head + tiles.window - tiles.tail, 1)


@triton.jit
def full_count(tiles):
    return tiles.full_pivots + tiles.tail - tiles.head


@triton.jit
def full_tile(t, tiles, N: tl.constexpr):
    """Of the full tiles number t."""
    pivot = t < tiles.full_pivots
    return Tile(pivot, tl.where(pivot, t * N, tiles.low + (t - tiles.full_pivots + tiles.head) * N))


@triton.jit
def edge_tile(t, tiles, N: tl.constexpr):
    """Of the other tiles number t."""
    pivots = tiles.pivots - tiles.full_pivots
    pivot = t < pivots
    u = t - pivots
    u = tl.where(u < tiles.head, u, u + tiles.tail - tiles.head)
    return Tile(pivot, tl.where(pivot, (tiles.full_pivots + t) * N, tiles.low + u * N))


@triton.jit
def key_rows(x, copy, runs, tile, EDGE: tl.constexpr, SHAPE: tl.constexpr):
    """A tile's rows of the keys (or values) x of one head, or of its pivots' copies."""
    stride = tl.where(tile.pivot, SHAPE.BLOCK_D, x.s)
    count = tl.where(tile.pivot, runs.room, runs.seqlen) - tile.j
    at = tl.where(tile.pivot, copy, x.at) + tile.j.to(tl.int64) * stride
    return load_rows(at, stride, count, SHAPE.N, SHAPE.D, SHAPE.BLOCK_D, SHAPE.WIDE, EDGE)


@triton.jit
def between(x, low, count):
    """Whether x is one of `count` numbers from `low` on: one comparison, since those before `low` wrap around."""
    return (x - low).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def visible(tile, queries, N: tl.constexpr):
    """Mask of an edge tile, [queries, N]."""
    low = tl.where(tile.pivot, 0, queries.start)
    count = tl.where(tile.pivot, queries.pivots, queries.keys)
    return between(tile.j + tl.arange(0, N)[None, :], low[:, None], count[:, None])
