"""Plots of rows of results, on matplotlib: over lengths, ratio and memory beside everybody else, part of the floor.

Figures are 4.4 inches wide, so that a phone shows them whole, on no background, the same bytes each time. Colours are
of Okabe and Ito's palette, which colour-blind people can tell apart; markers differ as well.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .words import others, seconds, star

Row = dict[str, Any]
What = Literal["time", "memory", "ratio"]
OURS = "cogview_ops"
WIDTH = 4.4
INK = {"light": "#24292f", "dark": "#e6e6e6"}
GRID = {"light": "#d0d7de", "dark": "#444c56"}
_BLUE = {"light": "#0072B2", "dark": "#56B4E9"}
_GREY, _ORANGE, _RED, _GREEN, _PINK, _OLIVE, _SKY = (
    "#7f7f7f",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#8a8000",
    "#3aa0d8",
)
# the usual ones look the same in every figure
_LOOKS = {
    "vanilla": (_GREY, "P"),
    "eager formula": (_GREY, "P"),
    "eager formula in float32": (_GREY, "X"),
    "global vanilla": (_GREY, "X"),
    "masked SDPA": (_ORANGE, "s"),
    "FlexAttention": (_RED, "D"),
    "torch.compile": (_RED, "D"),
    "causal SDPA": (_GREEN, "v"),
    "flash causal SDPA": (_SKY, "<"),
    "cuDNN causal SDPA": (_OLIVE, ">"),
    "published formula": (_PINK, "^"),
    "gathered windows": (_OLIVE, "p"),
    "gathered SDPA": (_OLIVE, "p"),
    "F.unfold": (_PINK, "^"),
    "NATTEN": (_PINK, "*"),
    "Liger": (_PINK, "*"),
    "DALLE-pytorch": (_PINK, "*"),
    "quack": (_OLIVE, "p"),
    "apex": (_ORANGE, "s"),
    "batch form": (_OLIVE, "p"),
    "upsampled keys": (_OLIVE, "p"),
}
_OTHER = (_GREEN, "v")  # dense attention and torch's own functions, of which a figure has one
_BOUNDS = {"memory": "o", "matmul": "s", "exp": "^"}
_BOUND_BY = {"memory": "bytes", "matmul": "matrix products", "exp": "exponentials"}
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


@contextmanager
def style(theme: str = "light") -> Iterator[None]:
    """Everything that is drawn or saved within looks alike."""
    ink, grid = INK[theme], GRID[theme]
    colors = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink)
    none = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none")
    sizes: dict[str, Any] = {
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 9.5,
        "legend.fontsize": 8,
        "lines.markersize": 4.5,
    }
    lines: dict[str, Any] = {"axes.edgecolor": grid, "grid.color": grid, "grid.linewidth": 0.6, "axes.grid": True}
    shape: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    saved: dict[str, Any] = {"svg.hashsalt": OURS, "svg.fonttype": "path", "savefig.dpi": 160}
    shape |= {"axes.axisbelow": True, "axes.titlelocation": "left", "figure.constrained_layout.use": True}
    with rc_context(colors | none | sizes | lines | shape | saved):
        yield


def save(figure: Figure, path: Path, background: str = "none") -> None:
    """The same bytes each time: without a date. Within `style`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(path, metadata=metadata, facecolor=background)


def place(row: Row) -> Place:
    """Where a row lies in a sweep over its shape: tokens between heads and dim, or columns of as many elements."""
    plain, rest = re.fullmatch(r"([\dx]*)(.*)", row["shape"]).groups()  # type: ignore[union-attr]
    numbers = [int(number) for number in plain.split("x") if number]
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


def _look(name: str, theme: str) -> dict[str, Any]:
    """Colour and marker of a contestant."""
    if name == OURS:
        return {"color": _BLUE[theme], "marker": "o", "linewidth": 2.2, "zorder": 3}
    color, marker = _LOOKS.get(name.rpartition(": ")[2].rstrip("*"), _OTHER)
    return {"color": color, "marker": marker, "linewidth": 1.2, "linestyle": "--" if name.endswith("*") else "-"}


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


def _scale(axes: Axes, axis: Literal["x", "y"], words: Callable[[float], str]) -> None:
    """Logarithmic, with few numbers in words."""
    getattr(axes, f"set_{axis}scale")("log")
    line = getattr(axes, f"{axis}axis")
    low, high = line.get_view_interval()
    wide = high / low > 60
    line.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
    line.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    line.set_minor_formatter(NullFormatter())
    line.set_tick_params(which="minor", length=0)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _bytes(value: float) -> str:
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= pair[0]), (1, "B"))
    return f"{value / unit:g} {name}"


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else seconds(value)


_WORDS: dict[str, Callable[[float], str]] = {"time": _seconds, "memory": _bytes, "ratio": _number}


def over_length(axes: Axes, rows: list[Row], what: What, theme: str) -> None:
    """Time, memory or ratio of a sweep."""
    curves = _curves(rows, what)
    for name, (x, y) in curves.items():
        if name == "floor":
            axes.plot(x, y, color=INK[theme], linewidth=1, linestyle=":", label="floor")
        else:
            axes.plot(x, y, label=name, **_look(name, theme))
    ticks = sorted({place(row).x for row in rows})
    if what == "ratio":
        axes.axhline(1, color=INK[theme], linewidth=0.8)
    _scale(axes, "y", _WORDS[what])
    axes.set_xscale("log")
    axes.set_xticks(ticks, [_number(x) for x in ticks])
    axes.minorticks_off()
    axes.set_title(_TITLES[what])


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Below all of them, each contestant once, ours first."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = sorted(found, key=lambda name: (name != OURS, name == "floor"))
    handles = [found[name] for name in names] + _star(names)
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=1.8)


def _star(names: Iterable[str]) -> list[Line2D]:
    """A line of the legend that says what a star is, where there is one."""
    starred = any(name.endswith("*") for name in names)
    return [Line2D([], [], ls="", label="* computes something else")] if starred else []


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
    _legend(figure, panels)
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
        look = _look(name, theme)
        for value, forward in dots[name]:
            fill = look["color"] if forward else "none"
            axes.scatter([value], [i], s=26, marker=look["marker"], facecolors=fill, edgecolors=look["color"])
    _lines(axes, names)
    axes.axvline(1, color=INK[theme], linewidth=0.8)
    _scale(axes, "x", _number)
    figure.suptitle(f"{title}\n{_BESIDE[what]}", x=0.01, ha="left")  # names may leave the axis no room for it
    there = {forward for found in dots.values() for _, forward in found}
    marks = [("forward", INK[theme])] * (True in there) + [("forward+backward", "none")] * (False in there)
    handles = [Line2D([], [], ls="", marker="o", mec=INK[theme], mfc=fill, label=name) for name, fill in marks]
    _key(figure, handles + _star(names))
    return figure


def _memory_ratio(row: Row, result: Row) -> float | None:
    ours, its = row.get("extra_bytes") or 0, result.get("extra_bytes") or 0
    return its / ours if min(ours, its) >= SEEN else None


def _lines(axes: Axes, names: list[str]) -> None:
    """A line of the figure for each."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)


def _key(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handletextpad=0.2)


def has_memory(rows: list[Row]) -> bool:
    """Whether `beside` has anything to show of it."""
    return any(_memory_ratio(row, result) for row in rows for result in row["baselines"].values())


def floors(rows: list[Row], theme: str, title: str) -> Figure:
    """How near each row comes to the least time that its machine could take, by operator. Within `style`."""
    rows = [row for row in rows if row.get("floor_s")]
    names = sorted({row["op"] for row in rows}, reverse=True)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * len(names)))
    axes = figure.subplots()
    color = _BLUE[theme]
    for row in rows:
        part, forward = row["floor_s"] / row["median_s"], row["direction"] == "forward"
        y = names.index(row["op"]) + (0.13 if forward else -0.13)
        fill, marker = color if forward else "none", _BOUNDS[row["bound"]]
        axes.scatter([100 * part], [y], s=22, linewidths=0.9, marker=marker, facecolors=fill, edgecolors=color)
    _lines(axes, names)
    axes.axvline(100, color=INK[theme], linewidth=0.8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("floor / time")
    figure.suptitle(title, x=0.01, ha="left")
    bounds = [bound for bound in _BOUNDS if any(row["bound"] == bound for row in rows)]
    handles = [Line2D([], [], ls="", marker=_BOUNDS[b], mec=color, mfc=color, label=_BOUND_BY[b]) for b in bounds]
    _key(figure, [*handles, Line2D([], [], ls="", marker="o", mec=color, mfc="none", label="with backward")])
    return figure


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
