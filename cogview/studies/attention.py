"""Implicit segmentation measured (CogView paper, appendix C.2): of the places that draw an emoji, how much of what a
head gives its word comes from there? Where the emoji stands is known, since the pictures are scenes of the demo.

Heads are chosen on one half of held-out scenes and judged on the other. C cases, a word of a scene each, L layers,
H heads, N places of the picture.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.attention.analysis import analyse
from cogview.attention.words import Word, collect, find
from cogview.config import require
from cogview.data.images import pixels
from cogview.demo.scenes import NOUNS, SIZE, TILE, Scene, caption, render, sample_scenes
from cogview.progress import progress, track
from cogview.studies import attention_report as report
from cogview.studies.attention_centre import centre, tile
from cogview.studies.paired import compare
from cogview.system import System

BASE = "gpt"  # the demo's model that draws
AREA = TILE**2 / SIZE**2  # of a picture, that an emoji takes


@dataclass(frozen=True)
class Sizes:
    """Held-out scenes; of these, those that the report of all heads is of; of these, those that are shown."""

    scenes: int
    measured: int
    shown: int

    def __post_init__(self):
        require(self.scenes >= 4, "scenes", "at least 4", self.scenes)
        require(1 <= self.measured <= self.scenes, "measured", f"1 to {self.scenes}", self.measured)
        require(0 <= self.shown <= self.measured, "shown", f"0 to {self.measured}", self.shown)


class Cases(NamedTuple):
    """float32 [C, L, H], of each head and word of a scene."""

    inside: Tensor
    """Of what all places give the word, the share of those inside its emoji's tile."""
    hit: Tensor
    """1 where the place that gives it most is one of these."""
    given: Tensor
    """Of its whole attention what a place gives the word, on average over all places."""
    other: Tensor
    """As `inside`, of the tile of the scene's other emoji; NaN without one."""
    scene: Tensor
    """int64 [C]: its number."""


def run(out: Path, source: Path, sizes: Sizes) -> str:
    """Writes report.md, figures.json and, in `heads`, what all heads do; returns the first sentence."""
    there = (source / "scenes" / "scenes.json").exists()
    require(there, "from", "the folder of a finished demo", str(source))
    system = System.load(source, name=BASE)
    scenes = sample_scenes("test", sizes.scenes)
    codes = system.tokenize(torch.stack([pixels(render(scene), SIZE) for scene in scenes]))
    found = {language: judged(cases(system, scenes, codes, language)) for language in report.LANGUAGES}
    texts = [
        caption(scene, "en" if 2 * n < sizes.measured else "zh") for n, scene in enumerate(scenes[: sizes.measured])
    ]
    with progress("looking at pictures", len(texts)) as update:
        some = codes[: len(texts)]
        told = analyse(system, texts, some, out / "heads", shown=sizes.shown, update=update)
    shown = [shown_of(system, scenes[: sizes.shown], codes, language, found[language]["head"]) for language in found]
    figures = {"model": str(system.source), "sizes": asdict(sizes), "area": AREA, "languages": found}
    figures["centre"] = centre(system, scenes[: sizes.measured], codes)
    return report.write(out, figures, dict(zip(found, shown, strict=True)), told)


def cases(system: System, scenes: list[Scene], codes: Tensor, language: str) -> Cases:
    """Of all emoji of scenes, whose pictures have these codes."""
    grid, rows = system.recipe.config.image_grid, list[tuple[Tensor, ...]]()
    for number, scene in enumerate(track(scenes, f"looking at scenes, {report.LANGUAGES[language]}")):
        own = torch.stack([tile(place, grid) for _, place in scene.placed]).float()
        named, all_maps = _maps(system, scene, codes[number], language)
        share = (all_maps / all_maps.sum(-1, keepdim=True)) @ own.T  # [L, H, words, tiles]
        for n, most in enumerate(all_maps.argmax(-1).unbind(-1)):
            other = share[..., n, 1 - n] if len(named) > 1 else torch.full(most.shape, torch.nan)
            rows.append((share[..., n, n], own[n][most], all_maps[..., n, :].mean(-1), other, torch.tensor(number)))
    return Cases(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def shown_of(
    system: System, scenes: Sequence[Scene], codes: Tensor, language: str, head: Sequence[int]
) -> list[report.Shown]:
    """Of the first scenes, whose pictures have these codes, the maps of the names by a layer's head, from 0."""
    grid, found, (layer, number) = system.recipe.config.image_grid, list[report.Shown](), head
    for n, (scene, picture) in enumerate(zip(scenes, system.pictures(codes[: len(scenes)]), strict=True)):
        named, all_maps = _maps(system, scene, codes[n], language)
        found.append(report.Shown(picture, named, all_maps[layer, number].unflatten(-1, (grid, grid)), chosen_on(n)))
    return found


def chosen_on(scene: Any) -> Any:
    """Whether heads are chosen on the scene of a number, or numbers; scenes have one and two emoji in turn."""
    return scene // 2 % 2 == 0


def _maps(system: System, scene: Scene, codes: Tensor, language: str) -> tuple[list[Word], Tensor]:
    """The names of a scene's emoji in its caption, and [L, H, W, N] of all heads."""
    (ids,) = system.encode(caption(scene, language))
    names = [name if language == "en" else NOUNS[name][3] for name, _ in scene.placed]
    named = [word for name in names if (word := find(system.text, ids, name)) is not None]
    return named, collect(system, ids, codes, named)


def judged(found: Cases) -> dict[str, Any]:
    """The head of the largest mean share on every other scene, counted from 0, and how it does on the others: means
    over scenes, of each the mean of its words, which are not independent."""
    choosing = chosen_on(found.scene)
    by_head = found.inside[choosing].mean(0)
    layer, head = divmod(int(by_head.argmax()), by_head.shape[1])
    *words, others = (values[~choosing, layer, head] for values in found[:4])
    scene, two = found.scene[~choosing], others.isfinite()
    more = by_scene((words[0] > others).float()[two], scene[two])
    own, other = (by_scene(values[two], scene[two]) for values in (words[0], others))
    inside, hit, given = (by_scene(values, scene) for values in words)
    rival = compare(own, other)
    beside = compare(inside, torch.full_like(inside, AREA))
    all_heads = {name: by_scene(getattr(found, name)[~choosing], scene).mean(0) for name in ("inside", "hit")}
    return {
        "head": [layer, head],
        "cases": {"chosen_on": int(choosing.sum()), "judged_on": len(scene), "of_two_emoji": int(two.sum())},
        "scenes": {"judged_on": len(inside), "of_two_emoji": len(own)},
        "inside": float(inside.mean()),
        "beyond_area": beside["interval"],
        "hit": float(hit.mean()),
        "given": float(given.mean()),
        "of_two_emoji": {
            "own": float(own.mean()),
            "other": float(other.mean()),
            "difference": rival["interval"],
            "own_gets_more": float(more.mean()),
        },
        "all_heads": {
            name: [[round(x, 4) for x in row] for row in values.tolist()] for name, values in all_heads.items()
        },
    }


def by_scene(values: Tensor, scene: Tensor) -> Tensor:
    """[S, ...] of [C, ...]: the means of the cases of each scene."""
    return torch.stack([values[scene == number].mean(0) for number in scene.unique()])
