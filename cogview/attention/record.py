"""What is kept of a model's attention beside its report: figures of every head, and maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cogview.attention.measure import PAIRS, TARGETS, Figures
from cogview.attention.names import offset_of
from cogview.attention.observations import Observation
from cogview.attention.words import Word


@dataclass(frozen=True)
class Looked:
    """What is kept of one picture and its caption."""

    caption: str
    codes: Tensor
    """int64 [g, g]."""
    words: list[Word]
    heads: Tensor
    """int64 [W, n, 2]: layer and head of the largest contrast, from 0, the best first."""
    maps: Tensor
    """float32 [W, n, g, g]: theirs, see `words`."""
    received: Tensor
    """float32 [L, H, N]: of the attention of all image queries what falls on each image token, on average."""
    uniform: Tensor
    """float32 [L, 1, N]: the same if all that is seen were given the same."""


def maps_of(figures: Figures, looked: Sequence[Looked]) -> dict[str, Tensor]:
    maps = {"offsets": figures.relative.float(), "places": figures.absolute.float()}
    return maps | {f"words/{number}": one.maps for number, one in enumerate(looked, 1) if one.words}


def figures_of(name: str, looked: Sequence[Looked], figures: Figures, found: Sequence[Observation]) -> dict[str, Any]:
    layers, heads = figures.entropy.shape
    return {
        "model": name,
        "captions": [one.caption for one in looked],
        "observations": [one._asdict() for one in found],
        "heads": [_head(figures, layer, head) for layer in range(layers) for head in range(heads)],
        "words": [
            {
                "caption": one.caption,
                "word": word.text,
                "heads": [_of_word(*some) for some in zip(at, maps, strict=True)],
            }
            for one in looked
            for word, at, maps in zip(one.words, one.heads.tolist(), one.maps, strict=True)
        ],
    }


def _head(f: Figures, layer: int, head: int) -> dict[str, Any]:
    def at(values: Tensor) -> float:
        return _rounded(values[layer, head])

    dy, dx, share = offset_of(f, layer, head)
    return {
        "layer": layer + 1,
        "head": head + 1,
        "offset": {"dy": dy, "dx": dx, "share": round(share, 4)},
        "given_to": {name: at(f.targets[name]) for name in TARGETS},
        "separators": {name: at(values) for name, values in f.separators.items()},
        "of_the_image_to": {
            name: {"share": at(share), "evenly": at(f.uniform[name]), "by_offset": at(f.by_offset[name])}
            for name, share in f.regions.items()
        },
        "entropy": at(f.entropy),
        "scores": {
            name: dict(zip(("least", "mean", "largest", "deviation"), map(_rounded, values), strict=True))
            for name, values in ((name, f.scores[name][layer, head]) for name in PAIRS)
        },
    }


def _of_word(at: Sequence[int], values: Tensor) -> dict[str, Any]:
    best = values.flatten().sort(descending=True).values
    quarter = float(best[: max(1, len(best) // 4)].sum() / best.sum())
    return {"layer": at[0] + 1, "head": at[1] + 1, "mean": _rounded(best.mean()), "best_quarter": round(quarter, 4)}


def _rounded(value: Tensor) -> float:
    return round(float(value), 4)
