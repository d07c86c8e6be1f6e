"""Walks that draw one position after the other: how many positions they have, and their seconds, of which a part is
timed; see `benchmarks.hierarchical`."""

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import linear_regression, median

import torch

from cogview.generate import fill
from cogview.magnify import levels, windows
from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Prompt
from cogview.sampling import Sampling
from cogview_ops.bench import machine

from .generation import Original, draw, part_of


def published_walk(grid: int) -> list[int]:
    """Positions in each of the windows of CogView's walk to twice `grid`: whole rows, whatever is there already."""
    return [window.rows * grid for window in windows(grid // 2)]


def missing(grid: int) -> list[list[int]]:
    """Positions that are drawn in each window, of the windows of each level: those that nothing is at yet."""
    there = torch.zeros(2 * grid, 2 * grid, dtype=torch.bool)
    found = []
    for level in levels(grid // 2):
        cut = [there[w.top : w.top + w.rows, w.left : w.left + grid] for w in level]
        found.append([int((~cells).sum()) for cells in cut])
        for cells in cut:
            cells.fill_(True)
    return found


def summed(seconds: dict[float, float], counts: Iterable[int]) -> float:
    """Of walks over so many positions without the first of each, by a line through the seconds of some positions."""
    slope, start = linear_regression(list(seconds), list(seconds.values()))
    return sum((n - 1) * start + slope * n * (n - 1) / 2 for n in counts)


def places(prompt: Prompt) -> list[int]:
    """Of what it draws, where steps are timed."""
    count = int(prompt.drawn[0].sum())
    return [count * eighth // 8 for eighth in (1, 3, 5, 7)]


def walk(model: Transformer, prompt: Prompt, counts: Sequence[int], steps: int) -> float:
    """Seconds of walks over so many of a prompt's drawn positions, with a cache."""
    begun = machine.now(model.device)
    fill(model, part_of(prompt, 0, 1), torch.rand(len(prompt.inputs), 1), Sampling())
    first = machine.now(model.device) - begun
    alike = dataclasses.replace(prompt, same=torch.zeros(len(prompt.inputs), dtype=torch.int64))
    seconds = {place + (steps + 1) / 2: median(draw(model, alike, place, steps)) for place in places(prompt)}
    return len(counts) * first + summed(seconds, counts)


def original_walk(model: Transformer, prompt: Prompt, counts: Sequence[int], steps: int) -> float:
    """The same in the way of CogView's own code."""
    rows, start = len(prompt.inputs), int(prompt.starts[0])
    codes, positions = model.config.image_vocab, prompt.context.positions.expand(prompt.inputs.shape)[0]
    begun = machine.now(model.device)
    Original(model, rows, positions)(prompt.inputs[:, :start])
    first, seconds = machine.now(model.device) - begun, {}
    for place in places(prompt):
        original, end = Original(model, rows, positions), start + place
        # of what was before only the amount matters
        like = original.kept[0]
        original.kept = [torch.randn(rows, end, like.shape[2]).to(like) for _ in original.kept]
        seconds[place + (steps + 1) / 2] = median(original.draw(prompt.inputs[:, end : end + 1], codes, steps))
    return len(counts) * first + summed(seconds, counts)
