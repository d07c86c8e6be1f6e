"""What is a pivot of three-region attention where there is only text: a choice by position.

A choice that looks at nothing else is the same in prefill and decode, and whatever stands beside a sequence.
"""

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

Policy = Callable[[int, torch.device], Tensor]


def block_pivots(
    length: int, device: torch.device | str | None = None, *, block_size: int = 128, pivots_per_block: int = 8
) -> Tensor:
    """All of the first block, and `pivots_per_block` tokens of each later one, one in each of as many equal parts.

    Which token of a part, says a hash of the part's number: pivots do not stand at the same place of every block, but
    are the same in every call. With the defaults a 16th of the tokens behind the first 128 are pivots.

    Returns:
        int64 `[P]`, ascending, below length; then -1 for what would stand behind the end in the last block.
    """
    part = torch.arange(pivots_per_block, -(-length // block_size) * pivots_per_block, device=device)
    block, part_of_block = part // pivots_per_block * block_size, part % pivots_per_block
    begin, end = (k * block_size // pivots_per_block for k in (part_of_block, part_of_block + 1))
    drawn = block + begin + _hash(part) % (end - begin)
    first = torch.arange(min(block_size, length), device=device)
    return torch.cat([first, torch.where(drawn < length, drawn, -1)])


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of each number below 2**32 (Wellons' hash-prospector, "16 21f0aaad 15 735a2d97 15")."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ (x >> 15)


class Pivots:
    """A policy's choice for sequences of all lengths; outside of graphs it is asked once for each power of two."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._known: dict[torch.device, tuple[int, Tensor, list[int]]] = {}  # capacity, row, the same as a list

    def __call__(self, length: int, device: torch.device) -> Tensor:
        """`[P]`, the pivots of a sequence of that many tokens."""
        if torch.compiler.is_compiling():
            return self.policy(length, device)
        capacity, row, positions = self._known.get(device, (0, torch.empty(0), []))
        if capacity < length:
            capacity = 1 << (length - 1).bit_length()
            with torch.inference_mode(False):  # it may be of use in training later
                row, before = self.policy(capacity, device), positions
            positions = [i for i in row.tolist() if i >= 0]
            if positions[: len(before)] != before or positions != sorted({i for i in positions if i < capacity}):
                raise ValueError(
                    "pivots: expected ascending positions below length, of which those of a shorter length are the "
                    f"first, got {positions} for length {capacity} and {before} for a shorter one"
                )
            self._known[device] = capacity, row, positions
        return row[: bisect_left(positions, length)]
