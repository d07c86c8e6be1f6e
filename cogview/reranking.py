"""Self-reranking (CogView paper, section 3.2): many candidates for a caption, in the order of CapLoss."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.config import require
from cogview.generate import Update
from cogview.pictures import contact_sheet
from cogview.sampling import Sampling
from cogview.system import System

_SHOWN, _COLUMNS = 128, 10  # pixels of a picture on a sheet, about, and pictures side by side


class Ranked(NamedTuple):
    """Candidates of one caption, the best first."""

    codes: Tensor
    """int64 [n, h, w]."""
    caploss: Tensor
    """float32 [n], ascending."""
    order: Tensor
    """int64 [n]: which of the seeds each was drawn with."""


def draw_ranked(
    system: System,
    judge: System,
    captions: Sequence[str],
    how: Sampling,
    *,
    seeds: Sequence[int],
    update: Update = lambda tokens: None,
) -> Iterator[Ranked]:
    """Of each caption as many candidates as seeds, drawn by the one system, how.batch_size at once, and ordered by the
    other, which captions. `update` is told how many tokens are drawn of all. ValueError before the first is drawn."""
    require(len(seeds) > 0, "seeds", "at least one", seeds)
    tokenizers = [[s.text.sha256, s.image.sha256] for s in (system, judge)]
    require(tokenizers[0] == tokenizers[1], "judge", "a system with the same tokenizers", "one with others")
    judge.which_draws("captions").encode(captions)
    repeated = [caption for caption in captions for _ in seeds]
    batches = system.code_batches(repeated, how, seeds=list(seeds) * len(captions), update=update)
    return ordered(judge, captions, batches, len(seeds), how.batch_size)


def ordered(
    judge: System, captions: Sequence[str], batches: Iterator[Tensor], count: int, batch_size: int
) -> Iterator[Ranked]:
    """Candidates of each caption, `count` codes one after the other in batches of any size, ordered by the judge."""
    grid = judge.recipe.config.image_grid
    waiting = torch.zeros(0, grid, grid, dtype=torch.int64)
    for caption in captions:
        while len(waiting) < count:
            waiting = torch.cat([waiting, next(batches)])
        codes, waiting = waiting[:count], waiting[count:]
        order, caploss = judge.rerank(caption, codes, batch_size=batch_size)
        yield Ranked(codes[order], caploss[order], order)


def candidate_sheet(
    pictures: Tensor, caploss: Tensor, path: Path, note: str, marks: Sequence[str] | None = None
) -> int:
    """Writes all candidates in their order, each above its CapLoss, as in figure 6, and a mark if there are some;
    returns how many are on it."""
    marks = [""] * len(pictures) if marks is None else marks
    rows = [
        (f"{score:.3f} {mark}", [picture])
        for picture, score, mark in zip(pictures, caploss.tolist(), marks, strict=True)
    ]
    zoom = max(1, round(_SHOWN / pictures.shape[-1]))
    return contact_sheet(rows, path, columns=_COLUMNS, zoom=zoom, note=note)
