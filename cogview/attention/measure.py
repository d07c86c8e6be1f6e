"""What heads do, in numbers: means over the pictures that were looked at.

A query is the token that stands at its place, and draws the one behind it: offset (0, 0) is the query itself, (-1, 0)
the token above it and (-1, 1) the one above what it draws. All shares are of a query's whole attention, 1, unless they
say of the image. Shapes: L layers, H heads, h some of them, N = g x g image tokens, W words.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cogview.attention.look import Places, Seen

TARGETS = ("itself", "image", "words", "separators")
PAIRS = ("text to text", "others")  # of the caption's own tokens, and all that have an image token or a command


@dataclass(frozen=True)
class Figures:
    """Of every head, float64 [L, H, ...]; NaN where nothing was seen."""

    relative: Tensor
    """[L, H, g, 2g - 1]: what image queries give the key at offset (dy, dx), from (1 - g, 1 - g) on, of those that see
    one there; (0, 0) is in the middle of the last row."""
    offsets: Tensor
    """The same of all image queries, 0 where there is no such key: all of it is what goes to the image."""
    absolute: Tensor
    """[L, H, g, g]: how many times as much image queries give each image token as if they gave all that they see the
    same."""
    targets: dict[str, Tensor]
    """[L, H] of each of TARGETS: what image queries give themselves, other image tokens, the caption's and commands."""
    separators: dict[str, Tensor]
    """[L, H] of each command, by its name."""
    regions: dict[str, Tensor]
    """[L, H] of each of `regions_of`: the share of what goes to the image."""
    uniform: dict[str, Tensor]
    """The same of attention that gives all keys that it sees the same."""
    by_offset: dict[str, Tensor]
    """The same of each head's offsets alone: see `of_offsets_alone`."""
    entropy: Tensor
    """[L, H]: of what image queries give, over the logarithm of how many keys they see, at most 1."""
    scores: dict[str, Tensor]
    """[L, H, 4] of each of PAIRS: the least, the mean, the largest q·k/√d, and their standard deviation."""


class Tally:
    """Takes what is seen, one head after the other and any number of pictures."""

    def __init__(self, layers: int, heads: int, grid: int):
        self.size, self.grid = (layers, heads), grid
        self.sums: dict[str, Tensor] = {}
        y, x = (torch.arange(grid**2) // grid, torch.arange(grid**2) % grid)
        self.offset = (y - y[:, None] + grid - 1) * (2 * grid - 1) + x - x[:, None] + grid - 1
        regions = regions_of(grid)
        self.regions = list(regions)
        both = [mask for queries, keys in regions.values() for mask in (queries & keys, queries)]
        # [N N, twice the regions]: one product with weights gives what all of them get, and of how much
        self.masks = torch.stack([mask.expand(grid**2, grid**2).flatten() for mask in both], dim=1).float()

    def __call__(self, seen: Seen, places: Places) -> None:
        at, image = places.image, seen.weights[:, places.image][:, :, places.image]
        visible = seen.visible[at]
        uniform = visible / visible.sum(1, keepdim=True)
        there = visible[:, at]
        self._keep("by offset", seen, self._by_offset(image))
        self._keep("offset seen", seen, self._by_offset(there[None].float()))
        self._keep("by key", seen, image.sum(1))
        self._keep("by key, uniform", seen, uniform[:, at].sum(0)[None])
        self._keep("queries", seen, torch.tensor([[len(at)]]))
        masks = self.masks.to(image.device)
        self._keep("regions", seen, image.flatten(1) @ masks)
        self._keep("regions, uniform", seen, uniform[:, at].flatten()[None] @ masks)
        rows = seen.weights[:, at]
        itself = image.diagonal(dim1=1, dim2=2).sum(1)
        separators = {name: rows[:, :, there].sum((1, 2)) for name, there in places.separators.items()}
        self._keep("itself", seen, itself)
        self._keep("image", seen, image.sum((1, 2)) - itself)
        self._keep("words", seen, rows[:, :, places.text].sum((1, 2)))
        self._keep("separators", seen, sum(separators.values(), torch.zeros_like(itself)))
        for name, values in separators.items():
            self._keep(f"[{name}]", seen, values)
        choices = visible.sum(1).float().log()
        entropy = torch.special.entr(rows).sum(-1) / choices
        self._keep("entropy", seen, entropy[:, choices > 0].sum(1))
        self._keep("choices", seen, (choices > 0).sum()[None, None])
        self._scores(seen, places)

    def _scores(self, seen: Seen, places: Places) -> None:
        text, some = torch.zeros(2, len(seen.visible), dtype=torch.bool, device=seen.visible.device)
        text[places.text], some[places.all] = True, True
        both = text[:, None] & text
        pairs = {"text to text": seen.visible & both, "others": seen.visible & ~both & some[:, None]}
        for name, there in pairs.items():
            scores = seen.scores[:, there]
            sums = scores.sum(1, dtype=torch.float64), scores.square().sum(1, dtype=torch.float64)
            self._keep(name, seen, torch.stack([*sums, torch.full_like(sums[0], scores.shape[1])], dim=-1))
            self._keep(f"{name}, least", seen, scores.amin(1), torch.minimum, math.inf)
            self._keep(f"{name}, largest", seen, scores.amax(1), torch.maximum, -math.inf)

    def figures(self) -> Figures:
        g, above = self.grid, self.grid * (2 * self.grid - 1)  # offsets up to the query's own row
        sums, queries = self.sums, self.sums["queries"][..., 0]
        by_command = {name: values / queries for name, values in sums.items() if name.startswith("[")}
        relative = (sums["by offset"] / sums["offset seen"])[..., :above].unflatten(-1, (g, -1))
        return Figures(
            relative=relative,
            offsets=(sums["by offset"] / queries[..., None])[..., :above].unflatten(-1, (g, -1)),
            absolute=(sums["by key"] / sums["by key, uniform"]).view(*self.size, g, g),
            targets={name: sums[name] / queries for name in TARGETS},
            separators=by_command,
            regions=self._shares("regions"),
            uniform=self._shares("regions, uniform"),
            by_offset={name: of_offsets_alone(relative, name) for name in self.regions},
            entropy=sums["entropy"] / sums["choices"][..., 0],
            scores={name: self._statistics(name) for name in PAIRS},
        )

    def _shares(self, name: str) -> dict[str, Tensor]:
        counted, asked = self.sums[name].unflatten(-1, (-1, 2)).unbind(-1)
        return dict(zip(self.regions, (counted / asked).unbind(-1), strict=True))

    def _statistics(self, name: str) -> Tensor:
        total, squares, count = self.sums[name].unbind(-1)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
        return torch.stack([self.sums[f"{name}, least"], mean, self.sums[f"{name}, largest"], deviation], dim=-1)

    def _by_offset(self, weights: Tensor) -> Tensor:
        """[h, (2g - 1)²] of [h, N, N]: what falls on each offset."""
        found = weights.new_zeros(len(weights), (2 * self.grid - 1) ** 2)
        return found.index_add_(1, self.offset.flatten().to(weights.device), weights.flatten(1))

    def _keep(
        self, name: str, seen: Seen, values: Tensor, join: Callable[..., Tensor] = torch.add, first: float = 0.0
    ) -> None:
        """Joins values [h, ...], or [1, ...] of each of the heads, with those so far."""
        values = values.double().cpu()
        if name not in self.sums:
            self.sums[name] = torch.full((*self.size, *values.shape[1:]), first, dtype=torch.float64)
        kept = self.sums[name][seen.layer, seen.heads]
        kept.copy_(join(kept, values))


def regions_of(grid: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of image queries (rows) and keys (columns), bool, broadcastable to [N, N]: which queries are asked, and the keys
    that count. What appendix C.1 names: multiples of the row, the first rows, edges, and broad regions."""
    y, x = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
    edge, everywhere = (x == 0) | (x == grid - 1), torch.ones(grid**2, dtype=torch.bool)
    middle = [(at >= grid // 4) & (at < grid - grid // 4) for at in (y, x)]
    above = y < y[:, None]
    lower = (y >= grid // 2)[:, None]
    return {
        "column above": (everywhere[:, None], above & (x == x[:, None])),
        "column above what is drawn": (everywhere[:, None], above & (x == x[:, None] + 1)),
        "first rows": (lower, (y < max(1, grid // 4))[None]),
        "edges, from edges": (edge[:, None], edge[None]),
        "edges, from inside": (~edge[:, None], edge[None]),
        "centre": (lower, (middle[0] & middle[1])[None]),
        "upper half": (lower, (y < grid // 2)[None]),
        "lower half": (lower, (y >= grid // 2)[None]),
    }


def of_offsets_alone(relative: Tensor, region: str) -> Tensor:
    """[L, H]: the share of its image attention that a head would give a region if it gave every key before the query,
    or the query itself, what it gives its offset on average, `Figures.relative`, wherever the query stands."""
    g = relative.shape[2]
    y, x = torch.arange(g**2) // g, torch.arange(g**2) % g
    offset = (y - y[:, None] + g - 1) * (2 * g - 1) + x - x[:, None] + g - 1
    queries, keys = regions_of(g)[region]
    asked = queries & torch.ones(g**2, g**2, dtype=torch.bool).tril()
    profile = relative.flatten(2).nan_to_num(0.0)
    given = [profile @ offset[some].bincount(minlength=g * (2 * g - 1)).double() for some in (asked & keys, asked)]
    return given[0] / given[1]
