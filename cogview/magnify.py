"""Magnification of a picture by a super-resolution model (CogView paper, section 3.1 and figure 5).

A window of 2n x 2n codes slides over 4n x 4n in steps of n. In each, the model draws what is not there yet, behind the
n x n codes of the same part of the given picture, which has 2n x 2n. What one window has drawn the next ones take as it
is: the picture continues from its centre, which is drawn before the sides that depend on it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cogview.config import require
from cogview.generate import Update, emphasised, fill
from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.recipes.superresolution import SuperResolution
from cogview.sampling import Sampling, check_seeds
from cogview.sequence import pad_text

_ORDER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))


class Window(NamedTuple):
    """Its upper left cell, and how many of its rows are drawn."""

    top: int
    left: int
    rows: int


def windows(n: int) -> list[Window]:
    """In the published order, each 2n columns wide. Those that others follow below end before their own lower border,
    where nothing below was to be seen."""
    rows = {(0, 0): n + 2} | {(2, j): 2 * n for j in range(3)}
    return [Window(n * i, n * j, rows.get((i, j), 2 * n - 2)) for i, j in _ORDER]


def levels(n: int) -> list[list[Window]]:
    """The windows, those together that share no cell and wait for none of each other: they can be drawn at once."""
    level = dict[Window, int]()
    for window in windows(n):
        level[window] = max((1 + level[before] for before in level if _meet(before, window, 2 * n)), default=0)
    return [[window for window in level if level[window] == k] for k in range(max(level.values()) + 1)]


def _meet(one: Window, other: Window, width: int) -> bool:
    upper, lower = sorted((one, other))
    return lower.top < upper.top + upper.rows and abs(one.left - other.left) < width


def magnify_batches(
    recipe: Recipe,
    model: Transformer,
    captions: Sequence[Sequence[int]],
    codes: Tensor,
    how: Sampling,
    *,
    seeds: Sequence[int] | None = None,
    update: Update = lambda tokens: None,
) -> Iterator[Tensor]:
    """Codes int64 [B, 4n, 4n], a batch after the other, of N captions given as raw text ids and codes [N, 2n, 2n].

    seeds: one each, default 0..N-1; a picture depends on its own alone, not on the batch. how.batch_size counts
    pictures. `update` is told how many of all N 16 n^2 tokens are drawn. Everything is checked before the first is
    drawn; ValueError where logits are not finite.
    """
    if not isinstance(recipe, SuperResolution):
        raise ValueError(f"model: expected one of recipe superresolution, got {recipe.name}")
    grid = recipe.config.image_grid
    text, seeds = pad_text(captions), check_seeds(range(len(captions)) if seeds is None else seeds, len(captions))
    fits = codes.ndim == 3 and list(codes.shape) == [len(text), grid, grid]
    require(fits, "codes", f"[{len(text)}, {grid}, {grid}], one picture a caption", list(codes.shape))
    recipe.layout(text, torch.cat([codes[:, ::2, ::2].flatten(1), codes.flatten(1)], dim=1).cpu())  # checks the ids
    return _batches(recipe, model, text, codes.cpu(), how, seeds, update)


def _batches(
    recipe: SuperResolution,
    model: Transformer,
    text: Tensor,
    codes: Tensor,
    how: Sampling,
    seeds: Sequence[int],
    update: Update,
) -> Iterator[Tensor]:
    grid, done = recipe.config.image_grid, 0
    for start in range(0, len(text), how.batch_size):
        part = slice(start, start + how.batch_size)
        streams = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        chances = torch.stack([torch.rand(2 * grid, 2 * grid, generator=stream) for stream in streams])
        large = torch.full(chances.shape, -1, dtype=torch.int64)
        for level in levels(grid // 2):

            def told(tokens: int, before: int = done) -> None:
                update(before + tokens)

            _draw(recipe, model, text[part], codes[part], large, level, how, chances, streams, told)
            done = start * 4 * grid**2 + int((large >= 0).sum())
        yield large


def _draw(
    recipe: SuperResolution,
    model: Transformer,
    text: Tensor,
    codes: Tensor,
    large: Tensor,
    level: list[Window],
    how: Sampling,
    chances: Tensor,
    streams: Sequence[torch.Generator],
    update: Update,
) -> None:
    """Draws what is missing, -1, of the windows of a level in `large` [B, 4n, 4n], of all pictures together."""
    side, count = codes.shape[1], len(text)
    cells = torch.stack([_cut(large, window, side) for window in level])
    for window, own in zip(level, cells, strict=True):
        own[:, window.rows :] = 0  # behind all that is drawn
    cells = cells.flatten(0, 1).flatten(1)
    small = torch.cat([_cut(codes, Window(w.top // 2, w.left // 2, 0), side // 2).flatten(1) for w in level])
    streams, text = list(streams) * len(level), text.repeat(len(level), 1)
    prompt = emphasised(recipe, recipe.continued(text, small, cells, streams), how)
    against = None
    if how.guidance != 1:
        against = emphasised(recipe, recipe.continued(text[:, :0], small, cells, streams), how)
    counts = (cells < 0).sum(dim=1)
    drawn_first = (cells >= 0).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    uniforms = torch.cat([_cut(chances, window, side).flatten(1) for window in level]).gather(1, drawn_first)
    tokens = fill(model, prompt, uniforms, how, lambda n: update(int(counts.clamp_max(n).sum())), against)[
        recipe.is_large(prompt.inputs)
    ]
    for window, own in zip(level, tokens.view(len(level), count, side, side), strict=True):
        _cut(large, window, side)[:, : window.rows] = own[:, : window.rows]


def _cut(cells: Tensor, window: Window, side: int) -> Tensor:
    """The cells [B, side, side] below and right of a window's corner, which share memory with all."""
    return cells[:, window.top : window.top + side, window.left : window.left + side]
