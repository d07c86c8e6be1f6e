"""The report of a model's attention: report.md, figures.json and maps.safetensors."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cogview.attention.measure import TARGETS, Figures
from cogview.attention.names import called, offset_name, offset_of, strongest, times
from cogview.attention.observations import Observation, observations
from cogview.attention.record import Looked, figures_of, maps_of
from cogview.data.files import save_tensors, write_json, write_text
from cogview.labels import printable
from cogview.system import System

MARKED = "marked"  # in figures.json: the files of marked pictures
Line = tuple[list[float], list[float]]


def by_depth(figures: Figures) -> list[tuple[str, dict[str, Line]]]:
    """Panels over the layers: how evenly heads attend, and what separators and the picture's words get."""
    panels = [("entropy / log of the keys seen", figures.entropy)]
    panels += [(f"share to {name}", figures.targets[name]) for name in ("separators", "words")]
    return [(title, _spread(values)) for title, values in panels]


def _spread(values: Tensor) -> dict[str, Line]:
    layers = [float(n) for n in range(1, len(values) + 1)]
    ends = {
        "the largest value of any of the layer's heads": values.amax(1),
        "the mean of the layer's heads": values.mean(1),
        "the smallest value of any of the layer's heads": values.amin(1),
    }
    return {name: (layers, line.tolist()) for name, line in ends.items()}


def write(out: Path, system: System, looked: Sequence[Looked], figures: Figures, pictures: Sequence[Path]) -> str:
    """Writes them; returns the first sentence. pictures: those that are marked."""
    found = observations(figures)
    held = sum(one.holds == "yes" for one in found), sum(one.holds == "partly" for one in found)
    name = system.recipe.name if system.source is None else str(system.source)
    first = (
        f"Of {len(found)} observations of the paper's appendices C.1, C.3 and C.4 {held[0]} hold of this model and "
        f"{held[1]} in part: "
        f"{name}, {figures.entropy.numel()} heads, {_count(looked)}."
    )
    save_tensors(out / "maps.safetensors", maps_of(figures, looked), {})
    marked = [path.name for path in pictures]
    write_json(out / "figures.json", figures_of(name, looked, figures, found) | {MARKED: marked})
    write_text(out / "report.md", _page(first, looked, figures, found, pictures))
    return first


def _page(
    first: str, looked: Sequence[Looked], f: Figures, found: Sequence[Observation], pictures: Sequence[Path]
) -> str:
    shown = "\n\n".join(f"![{_plain(one.caption)}]({path.name})" for one, path in zip(looked, pictures, strict=False))
    return f"""{first}

# Attention

Figures are means over {_count(looked)}. A query is the token that stands at its place; it draws the next one.
"Evenly" is attention that gives all keys that a query sees the same. Layers and heads are counted from 1; figures.json
has the numbers of every head, maps.safetensors the maps. C.2, what heads give words, is not among the observations:
it is shown below.

| the paper | here | in numbers |
|---|---|---|
{chr(10).join(f"| {one.paper} | {one.holds} | {one.here} |" for one in found)}

## By position (C.1, figure 12)

{_offset_lines(f)}

Of each head the shares by offsets alone are those that it would give if it gave every key what it gives its offset on
average, wherever the query stands.

{_region_table(f)}

![by offset](offsets.png)

![by place](places.png)

## By words (C.2, figure 13)

Red dots mark the eighth of the places that get most beside what they would get evenly, by the heads that differ most
from picture to picture. The maps below them are of each place of the picture what the query that draws it gives a word
(of models that write captions: what the query that writes the word gives the place), by the heads of the largest
contrast: how much more than their mean the places above it get.

{_word_table(looked)}

{shown}

## By depth (C.3)

{_layer_table(f)}

Of single separators the most is {_separator_lines(f)}.

![by depth](depth.png)

## Scores (C.4, figure 14)

Text to text are pairs of the caption's own tokens; commands, as [ROI1] or [BASE], are among the others.

![scores](scores.png)

![the layer of the largest](largest-scores.png)
"""


def _count(looked: Sequence[Looked]) -> str:
    return f"{len(looked):,} picture{'s' if len(looked) > 1 else ''}"


def _plain(text: str) -> str:
    """In Markdown, in a table or a link."""
    escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|!" else c for c in escaped)


def _offset_lines(f: Figures) -> str:
    lines = []
    for layer, head, _ in strongest(f.offsets.flatten(2).amax(2), 5):
        dy, dx, share = offset_of(f, layer, head)
        lines.append(f"- {called(layer, head)} gives {share:.0%} of its attention to {offset_name(dy, dx)}")
    return "\n".join(lines)


def _region_table(f: Figures) -> str:
    title = "strongest heads: share (times evenly; share by offsets alone)"
    rows = [f"| of the image attention to | share evenly | {title} |", "|---|---:|---|"]
    for name in f.regions:
        best = [
            f"{called(layer, head)}: {float(f.regions[name][layer, head]):.0%} ({value:.1f}; "
            f"{float(f.by_offset[name][layer, head]):.0%})"
            for layer, head, value in strongest(times(f, name))
        ]
        rows.append(f"| {name} | {float(f.uniform[name].mean()):.0%} | {', '.join(best)} |")
    return "\n".join(rows)


def _word_table(looked: Sequence[Looked]) -> str:
    rows = ["| picture | its words, by the head of the largest contrast: what it gives the word |", "|---|---|"]
    for one in (one for one in looked if one.words):
        parts = []
        for word, heads, maps in zip(one.words, one.heads.tolist(), one.maps, strict=True):
            parts.append(f"{_plain(word.text)}: {called(*heads[0])}, {float(maps[0].mean()):.0%}")
        rows.append(f"| {_plain(one.caption)} | {'; '.join(parts)} |")
    return "\n".join(rows)


def head_table(cells: Sequence[Sequence[str]]) -> str:
    """A row a layer, a column a head."""
    heads = range(1, len(cells[0]) + 1)
    rows = [f"| layer | {' | '.join(f'head {n}' for n in heads)} |", f"|---{'|---:' * len(heads)}|"]
    rows += [f"| {layer} | {' | '.join(own)} |" for layer, own in enumerate(cells, 1)]
    return "\n".join(rows)


def _layer_table(f: Figures) -> str:
    names = ("entropy", *TARGETS)
    rows = [f"| layer | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for layer in range(len(f.entropy)):
        values = [f.entropy[layer], *(f.targets[name][layer] for name in TARGETS)]
        spread = (f"{float(v.mean()):.2f} ({float(v.min()):.2f} to {float(v.max()):.2f})" for v in values)
        rows.append(f"| {layer + 1} | {' | '.join(spread)} |")
    return "\n".join(rows)


def _separator_lines(f: Figures) -> str:
    names, values = list(f.separators), torch.stack(list(f.separators.values()))
    best = values.flatten().topk(min(3, values.numel()))
    parts = []
    for value, n in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        which, rest = divmod(n, values[0].numel())
        parts.append(f"{value:.0%} to {names[which]} by {called(*divmod(rest, values.shape[2]))}")
    return ", ".join(parts)
