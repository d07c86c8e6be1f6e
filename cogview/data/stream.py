"""One epoch of pairs as one rank sees it, read by threads ahead; its state resumes it exactly."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image


class Pair(NamedTuple):
    key: str
    image: Image.Image  # RGB
    captions: dict[str, str]  # by the fields asked for, in that order


class Position(NamedTuple):
    epoch: int
    samples_seen: int  # positions of the epoch's order that all ranks together are done with


class PairStream(Iterator[Pair]):
    """One epoch of one rank. `state` is what to resume from after the pairs handed out so far.

    Iterating skips unreadable samples. With several ranks use `take`, which keeps them in step.
    """

    def __init__(
        self,
        read: Callable[[int], Pair | None],
        order: Iterator[np.ndarray],
        state: Position,
        *,
        rank: int,
        world_size: int,
        threads: int,
    ):
        """read: the pair of a sample number, None if it is unreadable. order: those of the epoch, window by window."""
        self._read, self._start, self._world_size, self._taken = read, state, world_size, 0
        self._numbers = self._positions(order, state.samples_seen + rank, world_size)
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = deque(self._pool.submit(read, number) for number in islice(self._numbers, 4 * threads))

    @staticmethod
    def _positions(order: Iterator[np.ndarray], position: int, step: int) -> Iterator[int]:
        for window in order:
            yield from map(int, window[position::step])
            position -= len(window)  # now counted from the start of the next window
            if position < 0:
                position %= step

    @property
    def state(self) -> Position:
        """With several ranks, save rank 0's: it is the last to finish an epoch."""
        if not self._ahead:
            return Position(self._start.epoch + 1, 0)
        return Position(self._start.epoch, self._start.samples_seen + self._taken * self._world_size)

    def take(self, n: int) -> list[Pair]:
        """The readable ones of this rank's next n positions; the epoch is over when `state.epoch` grows."""
        pairs = []
        for _ in range(n):
            if not self._ahead:
                break
            pair = self._ahead.popleft().result()
            for number in islice(self._numbers, 1):
                self._ahead.append(self._pool.submit(self._read, number))
            self._taken += 1
            if pair is not None:
                pairs.append(pair)
        return pairs

    def __next__(self) -> Pair:
        while self._ahead:
            if pairs := self.take(1):
                return pairs[0]
        self._pool.shutdown()
        raise StopIteration
