"""Several sets of tokens as one to train on, each with a weight: how often its rows come in an epoch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import require
from cogview.data.parts import part_name
from cogview.data.shuffle import permutation
from cogview.data.tokens import Rows, TokenDataset

SAME = {
    "text tokenizer": ("text_sha256", "text_vocab_size"),
    "image tokenizer": ("image_sha256", "codebook_size"),
    "image size": ("image_size", "grid", "small_grid"),
}
"""What tokens that are used together have in common, and where meta.json says it."""


def difference(meta: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What of SAME two sets of tokens do not have in common; "" if they belong together."""
    return next((what for what, names in SAME.items() if any(meta.get(x) != other.get(x) for x in names)), "")


class Mixture:
    """Rows of all sets, in the order of their names; an epoch has a row of weight w w times, and of what is left of a
    fractional weight a share of the rows, another one every time. `meta` is as TokenDataset's."""

    def __init__(self, sets: Mapping[str, TokenDataset | Rows], weights: Mapping[str, float]):
        """ValueError, which names the set, where sets do not belong together."""
        self.names = sorted(sets)
        require(bool(self.names), "mix", "at least one name", self.names)
        self.sets, self.weights = [sets[name] for name in self.names], {name: weights[name] for name in self.names}
        for name, data in zip(self.names, self.sets, strict=True):
            require(0 < weights[name] < math.inf, f"mix: {name}", "a positive weight", weights[name])
            if what := difference(self.sets[0].meta, data.meta):
                raise ValueError(
                    f"mix: {name} was made with another {what} than {self.names[0]}: tokenize one of them again"
                )
        self.meta = {**self.sets[0].meta, "text_length": max(data.meta["text_length"] for data in self.sets)}
        self.tokenizers = self.sets[0].tokenizers
        self._starts = np.cumsum([0] + [len(data) for data in self.sets])
        lengths, times = map(len, self.sets), self.weights.values()
        self._times = [int(weight * count + 0.5) for weight, count in zip(times, lengths, strict=True)]

    def __len__(self) -> int:
        """Of an epoch."""
        return sum(self._times)

    @property
    def rows(self) -> int:
        """How many there are, each counted once."""
        return int(self._starts[-1])

    @property
    def parts(self) -> list[tuple[Path, str]]:
        """As TokenDataset's, of all sets."""
        return [part for data in self.sets for part in data.parts]

    @property
    def folder(self) -> Path:
        """Of the first set."""
        return self.sets[0].folder

    @property
    def digest(self) -> str:
        """Names the rows and their weights."""
        return part_name(sets=[data.digest for data in self.sets], weights=list(self.weights.values()))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, int64, a function of (seed, epoch) alone."""
        numbers = np.concatenate([self._of_set(k, seed, epoch) for k in range(len(self.sets))])
        return numbers[permutation(len(numbers), seed, epoch)]

    def _of_set(self, k: int, seed: int, epoch: int) -> np.ndarray:
        """Its rows of an epoch, in any order."""
        first, count = int(self._starts[k]), len(self.sets[k])
        whole, rest = divmod(self._times[k], max(count, 1))
        drawn = permutation(count, seed, epoch, k + 1)[:rest] if rest else np.zeros(0, np.int64)
        return first + np.concatenate([np.tile(np.arange(count), whole), drawn])

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, ...]:
        """As TokenDataset's, of rows."""
        indices = np.asarray(indices, np.int64)
        fits = indices.ndim == 1 and len(indices) and 0 <= indices.min() <= indices.max() < self.rows
        require(bool(fits), "indices", f"a list of 0 to {self.rows - 1}", indices)
        places = np.searchsorted(self._starts, indices, side="right") - 1
        found = [self.sets[k].batch(indices[places == k] - self._starts[k]) for k in np.unique(places)]
        longest = self.meta["text_length"]
        padded = [(F.pad(text, (0, longest - text.shape[1]), value=-1), *codes) for text, *codes in found]
        back = np.argsort(np.argsort(places, kind="stable"))
        return tuple(torch.cat(parts)[back] for parts in zip(*padded, strict=True))

    def hold_out(self, share: float) -> "tuple[Mixture, Mixture]":
        """What to train on and what to validate on, of sets of which nothing is held out yet; the latter come once."""
        whole = [data for data in self.sets if isinstance(data, TokenDataset)]
        both = {name: data.hold_out(share) for name, data in zip(self.names, whole, strict=True)}
        train, held = ({name: pair[side] for name, pair in both.items()} for side in (0, 1))
        return Mixture(train, self.weights), Mixture(held, dict.fromkeys(self.names, 1.0))
