"""The report of the study of words and places: a page, its figures, the maps of the chosen heads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cogview.attention.names import called
from cogview.attention.plots import Panel, Row, marked
from cogview.attention.report import head_table
from cogview.attention.words import Word
from cogview.data.files import write_json, write_text
from cogview.studies import attention_centre

LANGUAGES = {"en": "English", "zh": "Chinese"}


class Shown(NamedTuple):
    """The names in a scene's caption, and the maps [W, g, g] of one head."""

    picture: Tensor
    words: list[Word]
    maps: Tensor
    chosen_on: bool
    """Whether the head was chosen on it, or judged."""


def write(out: Path, figures: dict[str, Any], shown: dict[str, list[Shown]], told: str) -> str:
    """Writes everything into `out`; returns the first sentence. shown: by language. told: of all heads."""
    first = _verdict(figures["languages"]["en"], figures["area"])
    pictures = [
        _drawn(out, language, figures["languages"][language]["head"], some) for language, some in shown.items() if some
    ]
    write_json(out / "figures.json", figures)
    write_text(out / "report.md", _page(first, figures, pictures, told))
    return first


def _drawn(out: Path, language: str, head: Sequence[int], shown: Sequence[Shown]) -> Path:
    rows = []
    for number, one in enumerate(shown, 1):
        panels = []
        for word, values in zip(one.words, one.maps, strict=True):
            title = f"{word.text}: {float(values.mean()):.0%}"
            panels += [Panel(word.text, values, dots=True), Panel(title, values)]
        rows.append(Row(f"{number}, {'chosen' if one.chosen_on else 'judged'} on", one.picture, panels))
    return marked(rows, out / f"names-{language}.png", f"{LANGUAGES[language]} names by {called(*head)}")


def _shown_lines(figures: dict[str, Any], pictures: Sequence[Path]) -> str:
    if not pictures:
        return ""
    images = "\n\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    return f"""
The chosen heads in the first {figures["sizes"]["shown"]} scenes: dots on the eighth of the places that give a name most
(figure 13), then all of its map, with its mean.

{images}
"""


def _verdict(found: dict[str, Any], area: float) -> str:
    low, high = found["beyond_area"]
    able = "finds" if low > 0 else "is not shown to find"
    return (
        f"{called(*found['head']).capitalize()} {able} what an English word is about: of what it gives the names of "
        f"emoji in scenes that it was not chosen on, {found['inside']:.0%} comes from the places that draw them, which "
        f"are {area:.0%} of the picture (95 % interval of the difference {low:+.0%} to {high:+.0%}), and in "
        f"{found['hit']:.0%} the place that gives most is one of these. On average a place gives a name "
        f"{found['given']:.0%} of the head's attention."
    )


def _page(first: str, figures: dict[str, Any], pictures: Sequence[Path], told: str) -> str:
    rows, tables = list[str](), list[str]()
    for language, name in LANGUAGES.items():
        found = figures["languages"][language]
        two, (low, high) = found["of_two_emoji"], found["of_two_emoji"]["difference"]
        rows.append(
            f"| {name} | {called(*found['head'])} | {found['given']:.1%} | {found['inside']:.1%} | "
            f"{found['hit']:.1%} | {two['own']:.1%} | {two['other']:.1%} | "
            f"{low:+.1%} to {high:+.1%} | {two['own_gets_more']:.1%} |"
        )
        layers = zip(found["all_heads"]["inside"], found["all_heads"]["hit"], strict=True)
        cells = [[f"{inside:.0%}, {hit:.0%}" for inside, hit in zip(*heads, strict=True)] for heads in layers]
        tables.append(f"{name}:\n\n{head_table(cells)}")
    counts = figures["languages"]["en"]["cases"]
    return f"""{first}

# Words and places

Of {figures["model"]}; {figures["sizes"]["scenes"]} scenes that training never saw, true pictures, {counts["judged_on"]}
names of emoji in the {figures["languages"]["en"]["scenes"]["judged_on"]} that are judged; means and intervals are over
scenes, of the mean of each scene's names. The map of a word is what the queries that draw each place give it. Chosen is
the head with the largest share inside the emoji's tile on the other half.

| captions | head | given | inside its tile | most from there | of two: its own | the other's | 95 % | own gets more |
|---|---|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

Given is what a place gives a name of its whole attention, on average over all places. Where there are two emoji the
share inside its own tile stands beside that inside the other's, with the interval of the difference. The tile is
{figures["area"]:.0%} of the picture. In Chinese captions a token may have several words, a name and its place.
{_shown_lines(figures, pictures)}
All heads on the judged half: share inside the tile, and how often the place that gives most is there.

{f"{chr(10)}{chr(10)}".join(tables)}

# The centre: a place, or what stands there

{attention_centre.told(figures["centre"])}

# All heads

[What they do](heads/report.md). {told}
"""
