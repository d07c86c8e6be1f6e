"""Clusters of image codes (CogView2, arXiv 2204.14217), between which `sampling.sample_token` chooses first.

Of a large codebook many vectors are nearly alike, so that one colour's probability lies on dozens of codes, of which
top-k keeps the few above its edge. CogView2 clusters its 20,000 codes by k-means into 500, from 9 to 133 codes each.
"""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogview.config import require

_PER_CLUSTER = 40  # codes, on average, as published
_MOST_BYTES = 16 << 20
_ROUNDS = 100


@dataclass(frozen=True)
class Clusters:
    """How they are drawn from; published: 16, and 100 with temperature 0.89 in direct super-resolution."""

    labels: Tensor
    """int64 [V]: of each code its cluster, from 0 on."""
    top: int = 16
    """Only so many of the likeliest clusters are drawn."""
    temperature: float = 1.0
    """Of the codes in one, besides that of all."""

    def __post_init__(self):
        kind = getattr(self.labels, "dtype", None) == torch.int64 and self.labels.ndim == 1 and len(self.labels) > 0
        require(kind, "labels", "int64 [V]", self.labels)
        require(int(self.labels.min()) >= 0, "labels", "none below 0", int(self.labels.min()))
        require(int(self.labels.max()) < len(self.labels), "labels", "fewer than codes", int(self.labels.max()))
        require(isinstance(self.top, int) and self.top >= 1, "top", "at least 1", self.top)
        fits = 0 < self.temperature < float("inf")
        require(fits, "cluster temperature", "a positive and finite number", self.temperature)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Labels and members there, copied once."""
        if device not in self._there:
            self._there[device] = self.labels.to(device), self.members.to(device)
        return self._there[device]

    @cached_property
    def _there(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def members(self) -> Tensor:
        """int64 [C, most]: of each cluster its codes, padded with -1."""
        order, sizes = self.labels.argsort(stable=True), self.labels.bincount()
        members = torch.full((len(sizes), int(sizes.max())), -1)
        starts = sizes.cumsum(dim=0) - sizes
        place = torch.arange(len(order)) - starts[self.labels[order]]
        members[self.labels[order], place] = order
        return members


def k_means(codebook: Tensor, count: int | None = None, *, seed: int = 0) -> Tensor:
    """Labels int64 [V] of vectors [V, D]: Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii 2007), until none
    changes. count: default a 40th of V. The same vectors and seed give the same labels."""
    vectors, stream = codebook.detach().float().cpu(), torch.Generator().manual_seed(seed)
    count = max(1, len(vectors) // _PER_CLUSTER) if count is None else count
    require(1 <= count <= len(vectors), "clusters", f"1 to {len(vectors):,}", count)
    first = int(torch.randint(len(vectors), (1,), generator=stream))
    centres = vectors[first : first + 1]
    nearest = _squares(vectors, centres)[:, 0]
    for _ in range(count - 1):
        weights = nearest.double() if float(nearest.sum()) > 0 else torch.ones_like(nearest, dtype=torch.float64)
        chosen = int(torch.multinomial(weights, 1, generator=stream))
        centres = torch.cat([centres, vectors[chosen : chosen + 1]])
        nearest = torch.minimum(nearest, _squares(vectors, centres[-1:])[:, 0])
    labels = torch.full((len(vectors),), -1)
    for _ in range(_ROUNDS):
        found = torch.cat([_squares(part, centres).argmin(dim=1) for part in vectors.split(4096)])
        if torch.equal(found, labels):
            break
        labels = found
        sizes = labels.bincount(minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, labels, vectors)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centres)
    return labels.unique(return_inverse=True)[1]  # without clusters that lost all


def _squares(vectors: Tensor, centres: Tensor) -> Tensor:
    """Squared distances [N, K]."""
    product = vectors @ centres.t()
    return (vectors.square().sum(dim=1, keepdim=True) - 2 * product + centres.square().sum(dim=1)).clamp_min(0)


def read_labels(path: Path, codes: int) -> Tensor:
    """Labels of so many codes from a .npy file, as CogView2's cluster_label.npy; ValueError for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cluster labels: cannot read {path} ({error.strerror})") from error
    require(len(data) <= _MOST_BYTES, "cluster labels", f"a file of at most {_MOST_BYTES:,} bytes", str(path))
    try:
        labels = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"cluster labels: {path} is no .npy file of numbers ({error})") from error
    fits = isinstance(labels, np.ndarray) and labels.shape == (codes,) and labels.dtype.kind in "iu"
    require(fits, "cluster labels", f"whole numbers, one for each of {codes:,} codes, in {path}", labels)
    low, high = int(labels.min()), int(labels.max())
    fits = low >= 0 and high < codes
    require(fits, "cluster labels", f"numbers from 0 to {codes - 1:,} in {path}", f"{low:,} to {high:,}")
    return torch.from_numpy(labels.astype(np.int64))
