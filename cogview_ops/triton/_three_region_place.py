"""Which sequence a program works on, and where what belongs to it lies: of a batch, and of packed sequences.

In a batch every sequence has as many tiles, and programs divide. Packed ones have tiles of their sequence too, and a
program finds its sequence by a search of where they begin: number n, from token `begin` on, has rows from
(begin // SIZE + n) * SIZE on, a multiple of SIZE and, since n grows by one for each of them, far enough from the one
before. So tokens // SIZE + sequences programs do for all lengths, of which one a sequence may find nothing to do, and
neither the host nor a scan has to look at them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

PIVOT_ROWS: tl.constexpr = tl.constexpr(128)  # copies of pivot rows come in multiples of this, the most rows of a tile


class Packed(NamedTuple):
    """Sequences one after another; all None: a batch."""

    begins: Any  # the first token of each, and the end of the last one: ascending, at most `tokens`
    sequences: Any
    tokens: Any


class Sequence(NamedTuple):
    number: Any
    sample: Any  # times Rows.b this is where its rows begin: of packed ones the first token
    seqlen: Any


@triton.jit
def spaced(number, begin, most, SIZE: tl.constexpr):
    """The first of the rows that a packed sequence has; `most`: of so many at most each."""
    row = (begin // SIZE + number) * SIZE
    if most is not None:
        row = tl.minimum(row, number.to(tl.int64) * most)
    return row


@triton.jit
def sequence_at(row, seqlen, packed, most, SIZE: tl.constexpr):
    """Of packed sequences the one that has this of all rows, none longer than seqlen, and which of its rows it is."""
    low = tl.full((), 0, tl.int32)
    high = low + packed.sequences
    while high - low > 1:
        middle = (low + high) // 2
        there = spaced(middle, tl.load(packed.begins + middle), most, SIZE) <= row
        low = tl.where(there, middle, low)
        high = tl.where(there, high, middle)
    begin = tl.load(packed.begins + low, mask=low > 0, other=0)
    length = tl.minimum(tl.load(packed.begins + low + 1) - begin, seqlen).to(tl.int32)
    return Sequence(low.to(tl.int64), begin.to(tl.int64), length), (row - spaced(low, begin, most, SIZE)).to(tl.int32)


@triton.jit
def sequence_of(b, row, seqlen, packed, most, SIZE: tl.constexpr):
    """The sequence that has this row of sample b, or of all that are packed, and which of its rows it is."""
    if packed.begins is None:
        sequence = Sequence(b, b, seqlen)
    else:
        sequence, row = sequence_at(row, seqlen, packed, most, SIZE)
    return sequence, row


@triton.jit
def token_tiles(seqlen, packed, SIZE: tl.constexpr):
    """How many tiles of tokens a head has."""
    if packed.begins is None:
        tiles = tl.cdiv(seqlen, SIZE)
    else:
        tiles = packed.tokens // SIZE + packed.sequences
    return tiles


@triton.jit
def pivot_rows(room, packed):
    """How many rows for copies of pivots a head has."""
    if packed.begins is None:
        rows = room
    else:
        rows = spaced(packed.sequences, packed.tokens, room, PIVOT_ROWS)
    return rows


@triton.jit
def pivot_row(pair, sequence, room, packed):
    """Where the copies of a sequence's pivots begin, of pair number `pair` of sample and kv head."""
    if packed.begins is None:
        row = pair * room
    else:
        row = pair * pivot_rows(room, packed) + spaced(sequence.number, sequence.sample, room, PIVOT_ROWS)
    return row


@triton.jit
def pivot_room(sequence, room, packed):
    """How many pivots a sequence can have, at most `room`."""
    if packed.begins is None:
        count = room
    else:
        count = tl.minimum(room, sequence.seqlen)
    return count


@triton.jit
def rank_row(sequence, packed):
    """Where a sequence's ranks begin, of which it has one more than tokens."""
    if packed.begins is None:
        row = sequence.number * (sequence.seqlen + 1)
    else:
        row = sequence.sample + sequence.number
    return row


@triton.jit
def statistics_row(head, sequence, packed):
    """Where the statistics of a head's rows begin, of all heads of all samples."""
    if packed.begins is None:
        row = head.to(tl.int64) * sequence.seqlen
    else:
        row = head.to(tl.int64) * packed.tokens + sequence.sample
    return row


@triton.jit
def statistics_pitch(sequence, packed):
    """From the statistics of a head to those of the next."""
    if packed.begins is None:
        pitch = sequence.seqlen
    else:
        pitch = packed.tokens
    return pitch
