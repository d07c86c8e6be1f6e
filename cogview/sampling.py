"""How one token is drawn from logits, and the random numbers that rows of a batch have of their own."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.clusters import Clusters
from cogview.config import require

_GREEDY, _UNIFORM = 1e-30, 1e30  # temperatures beyond which only the largest logit counts, or none does


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Published CogView: temperature 1, top_k 200."""

    temperature: float = 1.0
    """Close to 0: nearly always the likeliest token."""
    top_k: int = 200
    """Only so many of the likeliest tokens are drawn; 1 is greedy."""
    top_p: float = 1.0
    """And of those only the likeliest whose probabilities come to this share."""
    guidance: float = 1.0
    """g of classifier-free guidance (arXiv 2207.12598): logits are u + g (c - u), c with the caption, u without. 1: c
    alone. It is for models that were trained with some captions dropped (train --drop-text)."""
    batch_size: int = 32
    """Rows at once."""
    text_attention: float = 0.0
    """c of CogView2 (arXiv 2204.14217), added to the scores of what is drawn and text: 0 to 3, published 1.4."""
    clusters: Clusters | None = None
    """Draw a cluster of image codes, then a code of it, instead of one of the top_k codes."""

    def __post_init__(self):
        for name in ("temperature", "top_p", "guidance"):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            require(real and 0 < value < math.inf, name, "a positive and finite number", value)
        c = self.text_attention
        fits = isinstance(c, numbers.Real) and not isinstance(c, bool) and 0 <= c < math.inf
        require(fits, "text_attention", "a finite number that is not negative", c)
        require(self.top_p <= 1, "top_p", "at most 1", self.top_p)
        require(self.clusters is None or self.top_p == 1, "top_p", "1 with clusters", self.top_p)
        for name in ("top_k", "batch_size"):
            value = getattr(self, name)
            require(is_whole(value) and value >= 1, name, "a whole number, at least 1", value)


def sample_token(logits: Tensor, allowed: Tensor, uniform: Tensor, how: Sampling) -> Tensor:
    """Token ids int64 [B] drawn from logits [B, V] among `allowed` (bool [V]), by inverting the cumulated
    probabilities of the top_k at `uniform` (float [B] in [0, 1)). Waits for no device.

    Of the top_k only those are drawn before which less than top_p of their probability lies.
    """
    if how.clusters is not None:
        return sample_in_clusters(logits, allowed, uniform, how.temperature, how.clusters)
    temperature, top_k, top_p = how.temperature, how.top_k, how.top_p
    if temperature < _GREEDY:
        temperature, top_k = 1.0, 1
    values, ids = logits.float().masked_fill(~allowed, -torch.inf).topk(min(top_k, logits.shape[-1]))
    scaled = (values - values[:, :1]) / min(temperature, _UNIFORM)  # the largest is 0, and nothing overflows upwards
    probabilities = scaled.softmax(dim=-1)
    cumulated = probabilities.cumsum(dim=-1)
    last = (allowed.sum().clamp_max(ids.shape[1]) - 1).expand(len(ids), 1)
    if top_p < 1:
        last = last.minimum(((cumulated - probabilities) < top_p).sum(dim=-1, keepdim=True) - 1).clamp_min(0)
    # The last sum may round below 1, so the target is scaled to it: always inside, never the next token.
    target = uniform[:, None].to(cumulated) * cumulated.gather(1, last)
    place = torch.searchsorted(cumulated, target, right=True).minimum(last)
    return ids.gather(1, place)[:, 0]


def sample_in_clusters(
    logits: Tensor, allowed: Tensor, uniform: Tensor, temperature: float, clusters: Clusters
) -> Tensor:
    """The same by clusters of codes (CogView2, coglm_strategy.py): of p = softmax(logits / temperature) the likeliest
    clusters by the sums of their codes' p, one of those by these sums, and in it a code by
    softmax(logits / temperature / the clusters' own)."""
    codes = logits.shape[-1]
    known = len(clusters.labels)
    require(known == codes, "clusters", f"labels of {codes:,} codes, as the model draws", f"{known:,}")
    labels, members = clusters.on(logits.device)
    scaled = logits.float().masked_fill(~allowed, -torch.inf)
    scaled = (scaled - scaled.amax(dim=1, keepdim=True)) / min(max(temperature, _GREEDY), _UNIFORM)
    sums = torch.zeros(len(logits), len(members), device=logits.device).index_add_(1, labels, scaled.softmax(dim=1))
    sums, which = sums.topk(min(clusters.top, len(members)))
    place, rest = _inverted(sums.double(), uniform.double())
    ids = members[which.gather(1, place)[:, 0]]
    inside = scaled.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    chosen, _ = _inverted((inside.double() / clusters.temperature).softmax(dim=1), rest)
    return ids.gather(1, chosen)[:, 0]


def _inverted(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of weights [B, N] the place, [B, 1], where their sums pass `uniform` (float64 [B] in [0, 1)) of all,
    one of weight, and how far inside it, which is uniform again."""
    cumulated = weights.cumsum(dim=1)
    target = uniform[:, None] * cumulated[:, -1:]
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).int().argmax(dim=1, keepdim=True)
    place = torch.searchsorted(cumulated, target, right=True).minimum(last)
    own = weights.gather(1, place)
    return place, ((target - (cumulated.gather(1, place) - own)) / own).clamp(0, 1 - 2**-53)[:, 0]


def check_seed(seed: int) -> int:
    """The seed; ValueError unless it is a number that a random stream can begin from."""
    fits = is_whole(seed) and 0 <= seed < 2**63
    require(fits, "seed", "a whole number from 0 to 2^63 - 1", seed)
    return operator.index(seed)


def check_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """The seeds; ValueError unless they are `count` numbers that random streams can begin from."""
    several = isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str | bytes)
    require(
        several and getattr(seeds, "ndim", 1) == 1,
        "seeds",
        f"a list of whole numbers, one for each caption ({count})",
        seeds,
    )
    require(len(seeds) == count, "seeds", f"as many as captions ({count})", len(seeds))
    for seed in seeds:
        require(is_whole(seed) and 0 <= seed < 2**63, "seeds", "whole numbers from 0 to 2^63 - 1", seed)
    return [operator.index(seed) for seed in seeds]


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
