"""Implicit segmentation measured (CogView paper, appendix C.2): of the places that draw an emoji, how much of what a
head gives its word comes from there? Where the emoji stands is known, since the pictures are scenes of the demo.

Heads are chosen on one half of held-out scenes and judged on the other. C cases, a word of a scene each, L layers,
H heads, N places of the picture.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview.attention.analysis import analyse
from cogview.attention.names import called
from cogview.attention.words import collect, find
from cogview.config import require
from cogview.data.files import write_json, write_text
from cogview.data.images import pixels
from cogview.demo.scenes import NOUNS, PLACES, SIZE, TILE, Scene, caption, render, sample_scenes
from cogview.progress import progress, track
from cogview.studies.paired import compare
from cogview.system import System

BASE = "gpt"  # the demo's model that draws
LANGUAGES = {"en": "English", "zh": "Chinese"}
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
    found = {language: judged(cases(system, scenes, codes, language)) for language in LANGUAGES}
    texts = [
        caption(scene, "en" if 2 * n < sizes.measured else "zh") for n, scene in enumerate(scenes[: sizes.measured])
    ]
    with progress("looking at pictures", len(texts)) as update:
        some = codes[: len(texts)]
        told = analyse(system, texts, some, out / "heads", shown=sizes.shown, update=update)
    figures = {"model": str(system.source), "sizes": asdict(sizes), "area": AREA, "languages": found}
    write_json(out / "figures.json", figures)
    first = _verdict(found["en"])
    write_text(out / "report.md", _page(first, figures, told))
    return first


def cases(system: System, scenes: list[Scene], codes: Tensor, language: str) -> Cases:
    """Of all emoji of scenes, whose pictures have these codes."""
    grid, rows = system.recipe.config.image_grid, list[tuple[Tensor, Tensor, Tensor, Tensor]]()
    for number, scene in enumerate(track(scenes, f"looking at scenes, {LANGUAGES[language]}")):
        (ids,) = system.encode(caption(scene, language))
        names = [name if language == "en" else NOUNS[name][3] for name, _ in scene.placed]
        named = [word for name in names if (word := find(system.text, ids, name)) is not None]
        own = torch.stack([tile(place, grid) for _, place in scene.placed]).float()
        all_maps = collect(system, ids, codes[number], named)
        share = (all_maps / all_maps.sum(-1, keepdim=True)) @ own.T  # [L, H, words, tiles]
        for n, most in enumerate(all_maps.argmax(-1).unbind(-1)):
            other = share[..., n, 1 - n] if len(named) > 1 else torch.full(most.shape, torch.nan)
            rows.append((share[..., n, n], own[n][most], other, torch.tensor(number)))
    return Cases(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def tile(place: str, grid: int) -> Tensor:
    """bool [grid * grid]: the places of the picture, in raster order, on which an emoji at a place stands."""
    (left, top), cell = PLACES[place][0], SIZE // grid
    x, y = torch.arange(grid**2) % grid * cell, torch.arange(grid**2) // grid * cell
    return (x >= left) & (x < left + TILE) & (y >= top) & (y < top + TILE)


def judged(found: Cases) -> dict[str, Any]:
    """The head of the largest mean share on every other scene, counted from 0, and how it does on the others: means
    over scenes, of each the mean of its words, which are not independent."""
    choosing = found.scene // 2 % 2 == 0  # scenes have one and two emoji in turn
    by_head = found.inside[choosing].mean(0)
    layer, head = divmod(int(by_head.argmax()), by_head.shape[1])
    words, scene = [values[~choosing, layer, head] for values in found[:3]], found.scene[~choosing]
    two = words[2].isfinite()
    more = by_scene((words[0] > words[2]).float()[two], scene[two])
    own, other = (by_scene(values[two], scene[two]) for values in (words[0], words[2]))
    inside, hit = (by_scene(values, scene) for values in words[:2])
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


def _verdict(found: dict[str, Any]) -> str:
    low, high = found["beyond_area"]
    able = "finds" if low > 0 else "is not shown to find"
    return (
        f"{called(*found['head']).capitalize()} {able} what an English word is about: of what it gives the names of "
        f"emoji in scenes that it was not chosen on, {found['inside']:.0%} comes from the places that draw them, which "
        f"are {AREA:.0%} of the picture (95 % interval of the difference {low:+.0%} to {high:+.0%}), and in "
        f"{found['hit']:.0%} the place that gives most is one of these."
    )


def _page(first: str, figures: dict[str, Any], told: str) -> str:
    rows, tables = list[str](), list[str]()
    for language, name in LANGUAGES.items():
        found = figures["languages"][language]
        two, (low, high) = found["of_two_emoji"], found["of_two_emoji"]["difference"]
        rows.append(
            f"| {name} | {called(*found['head'])} | {found['inside']:.1%} | {found['hit']:.1%} | {two['own']:.1%} | "
            f"{two['other']:.1%} | {low:+.1%} to {high:+.1%} | {two['own_gets_more']:.1%} |"
        )
        heads = range(1, len(found["all_heads"]["inside"][0]) + 1)
        tables.append(f"{name}:\n\n| layer | {' | '.join(f'head {n}' for n in heads)} |\n|---{'|---:' * len(heads)}|")
        both = zip(found["all_heads"]["inside"], found["all_heads"]["hit"], strict=True)
        for layer, pairs in enumerate(both, 1):
            cells = " | ".join(f"{inside:.0%}, {hit:.0%}" for inside, hit in zip(*pairs, strict=True))
            tables[-1] += f"\n| {layer} | {cells} |"
    counts = figures["languages"]["en"]["cases"]
    return f"""{first}

# Words and places

Of {figures["model"]}; {figures["sizes"]["scenes"]} scenes that training never saw, true pictures, {counts["judged_on"]}
names of emoji in the {figures["languages"]["en"]["scenes"]["judged_on"]} that are judged; means and intervals are over
scenes, of the mean of each scene's names. The map of a word is what the queries that draw each place give it. Chosen is
the head with the largest share inside the emoji's tile on the other half.

| captions | head | inside its tile | most from there | of two: its own | the other's | 95 % | own gets more |
|---|---|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

Where there are two emoji the share inside its own tile stands beside that inside the other's, with the interval of the
difference. The tile is {AREA:.0%} of the picture. In Chinese captions a token may have several words, a name and
its place.

All heads on the judged half: share inside the tile, and how often the place that gives most is there.

{f"{chr(10)}{chr(10)}".join(tables)}

# All heads

[What they do](heads/report.md). {told}
"""
