"""`python -m benchmarks.report --plots [FOLDER]`: figures of benchmarks/results, for each machine, light and dark.

FOLDER/<machine>/<figure>-light.svg and -dark.svg, on no background. <figure> is `floor` and `roofline`, of all
operators; of each `<operator>-ratio` and `<operator>-memory`; and where a row of lengths was measured,
`<operator>-over-tokens`. Figures are of bfloat16, and of what the rows of the machine's own file hold; the same rows
give the same bytes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from cogview_ops.bench import figures, plot_style, roofs

from . import report

THEMES = ("light", "dark")


Row = dict[str, Any]


class Drawn(NamedTuple):
    name: str
    operator: str | None  # none: of all
    alt: str  # what it shows, in a line
    rows: list[Row]
    draw: Callable[..., Figure]  # in a theme


class Made(NamedTuple):
    machine: str  # the file of its results, without .json
    device: str
    name: str
    operator: str | None
    alt: str
    commits: tuple[str, ...]  # whose code was measured
    light: Path
    dark: Path


def make(folder: Path, results: Path = report.RESULTS) -> list[Made]:
    """Writes all figures into the folder and says what was made. ValueError: two would be one file."""
    found = []
    for path in sorted(results.glob("*.json")):
        rows = [row for row in report.shown(path) if "failed" not in row and row["dtype"] == "bf16"]
        chosen = list(figures_of(rows)) if rows else []
        names = [drawn.name for drawn in chosen]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{path.name}: several figures would be {', '.join(twice)}: names in {__name__} must tell more"
            )
        for drawn in chosen:
            paths = [folder / path.stem / f"{drawn.name}-{theme}.svg" for theme in THEMES]
            for theme, file in zip(THEMES, paths, strict=True):
                with plot_style.style(theme):
                    plot_style.save(drawn.draw(theme=theme), file)
            commits = tuple(sorted({row["commit"] for row in drawn.rows}))
            device = rows[0]["device"]
            found.append(Made(path.stem, device, drawn.name, drawn.operator, drawn.alt, commits, *paths))
    return found


def figures_of(rows: list[Row]) -> Iterator[Drawn]:
    """Of a machine's rows."""
    device = rows[0]["device"]
    about = f"How near every operator comes to the least time that is possible, {device}, bf16"
    yield Drawn("floor", None, about, rows, partial(roofs.floors, rows, title=f"floor / time, bf16\n{device}"))
    if any(row.get("flops") for row in rows):
        about = f"Operations a second of every attention over its operations per byte, and the most of {device}, bf16"
        draw = partial(roofs.roofline, rows, title=f"operations a second, bf16\n{device}")
        yield Drawn("roofline", None, about, [row for row in rows if row.get("flops")], draw)
    for operator in sorted({row["op"] for row in rows}):
        own = [row for row in rows if row["op"] == operator]
        title = f"{operator}, bf16\n{device}"
        if any("ratio" in result for row in own for result in row["baselines"].values()):
            about = f"How many times as fast {operator} is as what there is instead, {device}, bf16"
            draw = partial(figures.beside, own, "ratio", title=title)
            yield Drawn(f"{operator}-ratio", operator, about, own, draw)
        if figures.has_memory(own):
            about = f"How much extra memory what there is instead takes, in that of {operator}, {device}, bf16"
            draw = partial(figures.beside, own, "memory", title=title)
            yield Drawn(f"{operator}-memory", operator, about, own, draw)
        for sweep in figures.sweeps(own):
            yield _over_length(sweep)


def _over_length(rows: list[Row]) -> Drawn:
    first, place = rows[0], figures.place(rows[0])
    backward = ["backward"] if first["direction"] != "forward" else []
    name = "-".join([first["op"], "over", place.label.split()[-1], *backward])
    title = f"{first['op']}, bf16, {first['direction']}\n{first['device']}"
    about = f"{first['op']} over {place.label}, {first['device']}, bf16, {first['direction']}"
    return Drawn(name, first["op"], about, rows, partial(figures.sweep_figure, rows, title=title))
