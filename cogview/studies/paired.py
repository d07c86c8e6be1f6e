"""Whether one way to choose is better than another, both asked the same questions."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

_ROUNDS = 10_000  # of the bootstrap


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Exact two-sided p of McNemar's test for two that answer the same questions, right or not, bool [N]: of those that
    one alone has right a fair coin would give either as many."""
    only = [int((a & ~b).sum()) for a, b in ((first, second), (second, first))]
    total = sum(only)
    tail = sum(math.comb(total, k) for k in range(min(only) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(first: Tensor, second: Tensor, seed: int = 0) -> dict[str, Any]:
    """The difference of the means of two scores [N] of the same questions, and its 95 % interval by the bootstrap over
    questions."""
    differences = (first.double() - second.double()).numpy()
    draws = np.random.default_rng(seed).integers(len(differences), size=(_ROUNDS, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return {"difference": float(differences.mean()), "interval": [float(low), float(high)]}


_T = (math.nan, 12.706, 4.303, 3.182, 2.776)  # quantiles 0.975 of Student's t, of 1 to 4 degrees of freedom


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean of one to five values, one of each seed, and its 95 % interval by Student's t; None of a single one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean, "interval": None}
    error = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "interval": [mean - error, mean + error]}


def best_of(scores: Tensor, values: Tensor, count: int) -> Tensor:
    """float [N]: the mean value of the candidate of the lowest of `count` scores, over all groups that the candidates
    [N, M] fall into, one after the other; M a multiple of count. Values: whether it is right, say."""
    shape = (len(scores), -1, count)
    picks = scores.reshape(shape).argmin(dim=2, keepdim=True)
    return values.reshape(shape).gather(2, picks)[..., 0].float().mean(dim=1)


def order_right(scores: Tensor, right: Tensor) -> float:
    """Share of the pairs of a right and a wrong candidate of the same question of which the right one has the lower of
    scores [N, M], ties a half; nan without any."""
    pairs = right[:, :, None] & ~right[:, None, :]
    lower = (scores[:, :, None] < scores[:, None, :]).float() + 0.5 * (scores[:, :, None] == scores[:, None, :])
    return float(lower[pairs].mean()) if bool(pairs.any()) else math.nan
