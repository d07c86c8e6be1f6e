"""Plots of rows of results: over lengths, ratio and memory beside everybody else."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plot_style import INK, OURS, WIDTH, legend, look, marks, name_lines, number, scale, star_line
from .shapes import split
from .words import others, seconds, star

Row = dict[str, Any]
What = Literal["time", "memory", "ratio"]
_TITLES = {
    "time": "time of a call",
    "memory": "extra memory of a call",
    "ratio": f"how many times as fast {OURS} is",
}
_BESIDE = {"ratio": _TITLES["ratio"], "memory": f"extra memory, times that of {OURS}"}
SEEN = 10**6  # bytes of extra memory from which they say something: pages are counted, not bytes


class Place(NamedTuple):
    family: tuple[Any, ...]  # the same for all rows of a sweep
    x: int
    label: str


def place(row: Row) -> Place:
    """Where a row lies in a sweep over its shape: tokens between heads and dim, or columns of as many elements."""
    numbers, rest = split(row["shape"])
    common = row["op"], row["dtype"], row["direction"], rest
    if len(numbers) == 2:
        return Place((*common, numbers[0] * numbers[1]), numbers[1], "columns")
    if len(numbers) > 2:
        square = len(numbers) == 4
        return Place(
            (*common, numbers[0], numbers[-1]), math.prod(numbers[1:-1]), "image tokens" if square else "tokens"
        )
    return Place((*common, row["shape"]), row.get("tokens") or 0, "tokens")


def sweeps(rows: Iterable[Row], least: int = 3) -> list[list[Row]]:
    """Rows that differ by their length alone, of as many lengths at least, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(place(row).family, []).append(row)
    return [sorted(x, key=lambda row: place(row).x) for x in found.values() if len({place(r).x for r in x}) >= least]


def _curves(rows: list[Row], what: What) -> dict[str, tuple[list[int], list[float]]]:
    """By contestant, where it was measured and what; floor first, ours last."""
    found: dict[str, tuple[list[int], list[float]]] = {}

    def add(name: str, x: int, value: float | None) -> None:
        if value:
            found.setdefault(name, ([], []))[0].append(x)
            found[name][1].append(value)

    key = {"time": "median_s", "memory": "extra_bytes", "ratio": "ratio"}[what]
    for row in rows:
        x = place(row).x
        for name, result in others(row["baselines"]).items():
            add(name + star(result), x, result.get(key))
        if what != "ratio":
            add(OURS, x, row.get(key))
        if what == "time":
            add("floor", x, row.get("floor_s"))
    return found


def _bytes(value: float) -> str:
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= pair[0]), (1, "B"))
    return f"{value / unit:g} {name}"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else seconds(value)


_WORDS: dict[str, Callable[[float], str]] = {"time": _seconds, "memory": _bytes, "ratio": number}


def over_length(axes: Axes, rows: list[Row], what: What, theme: str) -> None:
    """Time, memory or ratio of a sweep."""
    curves = _curves(rows, what)
    for name, (x, y) in curves.items():
        if name == "floor":
            axes.plot(x, y, color=INK[theme], linewidth=1, linestyle=":", label="floor")
        else:
            axes.plot(x, y, label=name, **look(name, theme))
    ticks = sorted({place(row).x for row in rows})
    if what == "ratio":
        axes.axhline(1, color=INK[theme], linewidth=0.8)
    scale(axes, "y", _WORDS[what])
    axes.set_xscale("log")
    axes.set_xticks(ticks, [number(x) for x in ticks])
    axes.minorticks_off()
    axes.set_title(_TITLES[what])


def sweep_figure(rows: list[Row], theme: str, title: str) -> Figure:
    """Time, memory and ratio over the length, one below the other, those that there are. Within `style`."""
    what: list[What] = ["time"]
    if max(row.get("extra_bytes") or 0 for row in rows) >= SEEN:
        what.append("memory")
    if any("ratio" in result for row in rows for result in row["baselines"].values()):
        what.append("ratio")
    figure = Figure(figsize=(WIDTH, 0.9 + 2.5 * len(what)))
    panels = figure.subplots(len(what), 1, squeeze=False)[:, 0]
    for axes, one in zip(panels, what, strict=True):
        over_length(axes, rows, one, theme)
    panels[-1].set_xlabel(place(rows[0]).label)
    figure.suptitle(title, x=0.01, ha="left")
    legend(figure, panels)
    return figure


def beside(rows: list[Row], what: Literal["ratio", "memory"], theme: str, title: str) -> Figure:
    """A line for each contestant, a dot for each row: filled where it is forward alone. Memory in that of ours. Within
    `style`."""
    dots: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        for name, result in others(row["baselines"]).items():
            if value := result.get("ratio") if what == "ratio" else _memory_ratio(row, result):
                dots.setdefault(name + star(result), []).append((value, row["direction"] == "forward"))
    names = sorted(dots, key=lambda name: max(value for value, _ in dots[name]))
    figure = Figure(figsize=(WIDTH, 1.35 + 0.27 * len(names)))
    axes = figure.subplots()
    for i, name in enumerate(names):
        seen = look(name, theme)
        for value, forward in dots[name]:
            fill = seen["color"] if forward else "none"
            axes.scatter([value], [i], s=26, marker=seen["marker"], facecolors=fill, edgecolors=seen["color"])
    name_lines(axes, names)
    axes.axvline(1, color=INK[theme], linewidth=0.8)
    scale(axes, "x", number)
    figure.suptitle(f"{title}\n{_BESIDE[what]}", x=0.01, ha="left")  # names may leave the axis no room for it
    there = {forward for found in dots.values() for _, forward in found}
    fills = [("forward", INK[theme])] * (True in there) + [("forward+backward", "none")] * (False in there)
    handles = [Line2D([], [], ls="", marker="o", mec=INK[theme], mfc=fill, label=name) for name, fill in fills]
    marks(figure, handles + star_line(names))
    return figure


def _memory_ratio(row: Row, result: Row) -> float | None:
    ours, its = row.get("extra_bytes") or 0, result.get("extra_bytes") or 0
    return its / ours if min(ours, its) >= SEEN else None


def has_memory(rows: list[Row]) -> bool:
    """Whether `beside` has anything to show of it."""
    return any(_memory_ratio(row, result) for row in rows for result in row["baselines"].values())


def of_rows(rows: list[Row], theme: str) -> Figure:
    """What `cogview_ops.bench --plot` draws: a sweep over lengths, or how many times as fast. Within `style`."""
    first = rows[0]
    name = first["op"] if len({row["op"] for row in rows}) == 1 else "peers"
    directions = "" if len({row["direction"] for row in rows}) > 1 else f", {first['direction']}"
    shape = f", {first['shape']}" if len(rows) == 1 else ""
    title = f"{name}{shape}, {first['dtype']}{directions}\n{first['device']}"
    if (found := sweeps(rows, 2)) and len(found[0]) == len(rows):
        return sweep_figure(found[0], theme, title)
    if name == "peers":
        rows = [row | {"baselines": {f"{row['op']}: {x}": y for x, y in row["baselines"].items()}} for row in rows]
    return beside(rows, "ratio", theme, title)
