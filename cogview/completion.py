"""Parts of a picture drawn anew by CogView2 (arXiv 2204.14217): cells by its CogLM, between context that sees itself in
both directions; and whole pictures, of which the square around what is masked is drawn and enlarged.

    found = edit(CogView2.load("runs/cogview2"), Path("photo.png"), mask, "a red car", count=2, candidates=8)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cogview import editing
from cogview.cogview2 import CogView2, Settings, candidate_seeds
from cogview.config import require
from cogview.data.images import resized
from cogview.generate import Update, emphasised, fill
from cogview.inputs import images, whole
from cogview.pictures import image_of
from cogview.progress import Sum
from cogview.recipes.coglm import CogLM
from cogview.sampling import Sampling
from cogview.sequence import pad_text


class Edited(NamedTuple):
    """A picture's parts drawn anew, the best first."""

    pictures: Tensor
    """uint8 [n, 3, H, W], or [n, 4, H, W] with transparency: the whole picture, which outside the mask is as it was."""
    caploss: Tensor
    box: editing.Box
    """What of it the model was given."""
    codes: tuple[Tensor, ...]
    """Of that square, int64 [n, h, w], as each stage has it."""


def edit(
    models: CogView2,
    picture: Image.Image | Tensor | Path,
    mask: Tensor,
    caption: str,
    how: Settings | None = None,
    *,
    count: int = 1,
    candidates: int | None = None,
    seed: int = 0,
    around: float = editing.AROUND,
    feather: int = 0,
    update: Update = lambda done: None,
) -> Edited:
    """A picture of any size with what a mask, bool [H, W], covers drawn anew: the square around it is drawn small,
    in the order of `Layout.picture`; the best of the candidates by CapLoss are enlarged where the square is larger,
    with the picture's own codes where nothing is masked. The new pixels are laid over the picture under the mask,
    so that others stay exactly; see `cogview.editing`. The caption is of the square, whose side is `around` times that
    of what is masked; inf: as large as the picture has room for."""
    how = Settings() if how is None else how
    seeds = candidate_seeds(seed, count, candidates)
    own = whole(picture, exact=True)
    editing.check(mask, own)
    models.check(how)
    grid = models.base.recipe.config.image_grid
    box = editing.surrounding(mask, around, least=grid)
    crop, hidden = whole(image_of(box.of(own))), box.of(mask)
    if models.base.side >= box.side:
        models = replace(models, direct=None, iterative=None)  # its pixels are all there
    ids, *_ = [stage.encode(caption) for stage in models.stages]
    told = Sum(update)
    cells = editing.touched(hidden, grid)
    square = f"{box.side} x {box.side} pixels around it that the model is given"
    require(not bool(cells.all()), "mask", f"less than all {grid} x {grid} cells of the {square}", "all of them")
    codes = complete(models, caption, models.base.tokenize(crop)[0], cells, how.base, seeds=seeds, update=told.part())
    ranked = models.base.rerank(caption, codes, batch_size=how.base.batch_size)
    best = ranked.order[:count]
    chosen = [seeds[n] for n in best.tolist()]
    stages = _enlarged(models, ids * count, codes[best], crop, hidden, how, chosen, told)
    drawn = (resized(square[None], box.side)[0] for square in models.base.pictures(stages[-1]))
    pictures = [editing.laid_over(own, box, square, mask, feather) for square in drawn]
    return Edited(torch.stack(pictures), ranked.caploss[best], box, stages)


def complete(
    models: CogView2,
    caption: str,
    codes: Tensor,
    cells: Tensor,
    how: Sampling,
    *,
    seeds: Sequence[int],
    update: Update = lambda done: None,
) -> Tensor:
    """Small codes int64 [N, h, w] of one picture's [h, w], those of some cells, bool [h, w], drawn with each of N
    seeds. `update` is told how many of all N h w cells are done."""
    require(isinstance(caption, str), "caption", "text", caption)
    recipe, (ids,) = models.base.recipe, models.base.encode(caption)
    assert isinstance(recipe, CogLM)
    grid, chosen = recipe.config.image_grid, cells.flatten()
    require(list(codes.shape) == [grid, grid], "codes", f"[{grid}, {grid}]", list(codes.shape))
    fits = list(cells.shape) == [grid, grid] and cells.dtype == torch.bool
    require(fits, "cells", f"bool [{grid}, {grid}]", cells)
    require(bool(cells.any()), "cells", "some that are drawn", "none")
    known, found, count = codes.flatten(), list[Tensor](), int(chosen.sum())
    for start in range(0, len(seeds), how.batch_size):
        some = seeds[start : start + how.batch_size]
        rows, text = known.repeat(len(some), 1), pad_text([ids]).repeat(len(some), 1)
        alike = torch.zeros(len(some), dtype=torch.int64)
        texts = [text] if how.guidance == 1 else [text, text[:, :0]]
        prompts = [recipe.completion(told, rows, chosen.expand_as(rows)) for told in texts]
        prompt, *against = (emphasised(recipe, replace(prompt, same=alike), how) for prompt in prompts)
        chances = torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(s)) for s in some])

        def told(tokens: int, before: int = start, rows: int = len(some)) -> None:
            update((before + rows * tokens // count) * grid**2)

        tokens = fill(models.base.model, prompt, chances, how, told, *against)
        rows[:, chosen] = tokens[prompt.drawn].view(len(some), -1)
        found.append(rows.view(-1, grid, grid))
    return torch.cat(found)


def _enlarged(
    models: CogView2, ids, codes: Tensor, crop: Tensor, hidden: Tensor, how: Settings, seeds, told: Sum
) -> tuple[Tensor, ...]:
    """Codes of a square as each stage has it, the small ones first; larger ones are the picture's own where nothing is
    masked."""
    if models.direct is None:
        return (codes,)
    grid = models.direct.recipe.grids[-1]
    side, cells = grid * models.base.image.config.downsample, editing.touched(hidden, grid)
    own = images(resized(crop[None], side), side).to(models.base.model.device)
    known = models.base.image.encode(own.float() / 255).cpu()
    direct, _ = replace(models, iterative=None).enlarge(ids, codes, how, seeds, told)
    assert direct is not None
    direct = torch.where(cells, direct, known)
    if models.iterative is None:
        return codes, direct
    return codes, direct, models.refined(ids, direct, how, seeds, told, within=cells.expand_as(direct))
