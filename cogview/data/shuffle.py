"""Permutations and draws that are the same on every machine, library version and number of processes.

NumPy and torch may change what their generators produce between versions; an order that a saved
state points into must not change, so it comes from a hash (SplitMix64; Steele, Lea, Flood, 2014).
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser: a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(n: int, *key: int) -> np.ndarray:
    """`n` distinct uint64 hashes, a function of the integers in `key` alone."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + np.uint64((part + _GOLDEN) & _MASK))
    return _mix(state + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64, a function of n and the integers in `key` alone."""
    return np.argsort(hashes(n, *key), kind="stable").astype(np.int64)


def draws(n: int, bound: int, *key: int) -> np.ndarray:
    """`n` integers in [0, bound), int64; the bias is below bound / 2^64."""
    return (hashes(n, *key) % np.uint64(bound)).astype(np.int64)
