"""How far what a network sees in some pictures is from what it sees in others. Features are [N, D], logits [N, C].

Scores by different networks are never comparable. All of them depend on N: FID falls and the Inception Score rises with
more pictures.
"""

import importlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import require

SPLITS = 10  # of the Inception Score, as published
_IN_SPLIT = 50  # pictures of one at least; where there are fewer, fewer splits
_SIGMA, _SCALE = 10.0, 1000.0  # of CMMD
_BLOCK = 2048  # rows and columns of a kernel matrix that are there together
_ROUNDS, _WIDEST = 200, 512  # of the bootstrap, and features for which it takes seconds, not hours


class _Given(nn.Module):
    """Stands where torchmetrics has a network: it is given what that has seen."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, seen: Tensor) -> Tensor:
        return seen


def frechet(true: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of Gaussians of the features' means and covariances (FID, arXiv 1706.08500):

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    """
    _check(true, drawn)
    metric = _torchmetrics("fid").FrechetInceptionDistance(_Given(true.shape[1]))
    metric.update(true.double(), real=True)
    metric.update(drawn.double(), real=False)
    return float(metric.compute())


def intervals(true: Tensor, drawn: Sequence[Tensor]) -> list[list[float] | None]:
    """How much the Fréchet distance of each of several sets of pictures of the same captions is above that of the last
    one, 95 % interval by the bootstrap over captions, each drawn with all its pictures; None of the last one, and where
    there are too many features for it."""
    if true.shape[1] > _WIDEST:
        return [None] * len(drawn)
    found, draws = list[list[float]](), torch.Generator().manual_seed(0)
    for _ in range(_ROUNDS):
        rows = torch.randint(len(true), (len(true),), generator=draws)
        distances = [frechet(true[rows], features[rows]) for features in drawn]
        found.append([distance - distances[-1] for distance in distances[:-1]])
    ends = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [*ends.T.tolist(), None]


def inception_score(logits: Tensor) -> tuple[float, float | None]:
    """exp of the mean KL(p(class | picture), p(class)) (arXiv 1606.03498): the mean over `splits_of(N)` parts in an
    order of chance, the same each time, and their standard deviation, of the parts themselves as in the published
    code, sqrt(sum (s - mean)^2 / parts); None of a single part."""
    splits = splits_of(len(logits))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # that it keeps the logits, and that one part has no deviation
        torch.manual_seed(0)
        metric = _torchmetrics("inception").InceptionScore(_Given(logits.shape[1]), splits=splits)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    if splits == 1:
        return float(mean), None
    return float(mean), float(deviation) * math.sqrt((splits - 1) / splits)  # it divides by parts - 1


def splits_of(count: int) -> int:
    """Parts that the Inception Score of so many pictures is the mean of."""
    return max(1, min(SPLITS, count // _IN_SPLIT))


def cmmd(true: Tensor, drawn: Tensor) -> float:
    """1000 times the squared maximum mean discrepancy of features of length 1 (arXiv 2401.09603, whose features are
    CLIP's), which supposes no Gaussians and needs fewer pictures than FID:

        1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),   k(a, b) = exp(-|a - b|^2 / (2 10^2))

    The biased estimate, of minimal variance, with the diagonals k(x, x) = 1, which the released code of the article
    takes; the article itself writes down the unbiased one.
    """
    _check(true, drawn)
    x, y = (F.normalize(features.double(), dim=1) for features in (true, drawn))
    return _SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    """Of rows of length 1, whose |a - b|^2 is 2 - 2 ab; never more than a block of the matrix is there."""
    blocks = (((a @ b.T - 1) / _SIGMA**2).exp().sum() for a in x.split(_BLOCK) for b in y.split(_BLOCK))
    return math.fsum(map(float, blocks)) / (len(x) * len(y))


def _check(true: Tensor, drawn: Tensor) -> None:
    for name, features in (("true", true), ("drawn", drawn)):
        require(features.ndim == 2, name, "features [N, D]", features)
        require(len(features) >= 2, name, "features of at least 2 pictures, which have a covariance", len(features))
        require(bool(features.isfinite().all()), name, "finite features", "others")
    same = drawn.shape[1] == true.shape[1]
    require(same, "drawn", f"{true.shape[1]} features a picture, as the true ones have", drawn.shape[1])


def check_torchmetrics() -> None:
    """ValueError that names the package where it is not there."""
    _torchmetrics("fid")


def _torchmetrics(name: str) -> Any:
    try:
        return importlib.import_module(f"torchmetrics.image.{name}")
    except ImportError as error:
        raise ValueError(f"evaluation: expected torchmetrics: pip install '.[evaluation]' ({error})") from error
