"""Permutations and draws that are the same on every machine, library version and number of processes.

NumPy and torch may change what their generators produce between versions; an order that a saved
state points into must not change, so it comes from a hash (SplitMix64; Steele, Lea, Flood, 2014).
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser, in place: a bijection of uint64."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def hashes(n: int, *key: int) -> np.ndarray:
    """`n` distinct uint64 hashes, a function of the integers in `key` alone."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part + _GOLDEN) & _MASK))
    numbers = np.arange(1, n + 1, dtype=np.uint64)
    numbers *= np.uint64(_GOLDEN)
    numbers += state
    return _mix(numbers)


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64, a function of n and the integers in `key` alone: by their hashes.

    Numbers are sorted with the high bits of their hashes above them, which takes a third of the time of an argsort;
    those few that are alike there are then put right.
    """
    known, low = hashes(n, *key), np.uint64((1 << n.bit_length()) - 1)
    order = known & ~low
    order |= np.arange(n, dtype=np.uint64)
    order.sort()
    alike = np.flatnonzero(order[1:] ^ order[:-1] <= low)
    order &= low
    if len(alike):
        places = np.union1d(alike, alike + 1)
        order[places] = order[places[np.argsort(known[order[places]])]]
    return order.view(np.int64)


def draws(n: int, bound: int, *key: int) -> np.ndarray:
    """`n` integers in [0, bound), int64; the bias is below bound / 2^64."""
    return (hashes(n, *key) % np.uint64(bound)).astype(np.int64)
