"""Plots of what a machine can do at most, and how near to it rows of results come."""

from statistics import median
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .plot_style import BLUE, INK, WIDTH, marks, name_lines, number, of_operator, scale

Row = dict[str, Any]
_BOUNDS = {"memory": "o", "matmul": "s", "exp": "^"}
ROOFS = {"bytes": "memory", "flops": "matmul"}  # what is counted, and its name in floors_s
_BOUND_BY = {"memory": "bytes", "matmul": "matrix products", "exp": "exponentials"}


def floors(rows: list[Row], theme: str, title: str) -> Figure:
    """How near each row comes to the least time that its machine could take, by operator. Within `style`."""
    rows = [row for row in rows if row.get("floor_s")]
    names = sorted({row["op"] for row in rows}, reverse=True)
    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * len(names)))
    axes = figure.subplots()
    color = BLUE[theme]
    for row in rows:
        part, forward = row["floor_s"] / row["median_s"], row["direction"] == "forward"
        y = names.index(row["op"]) + (0.13 if forward else -0.13)
        fill, marker = color if forward else "none", _BOUNDS[row["bound"]]
        axes.scatter([100 * part], [y], s=22, linewidths=0.9, marker=marker, facecolors=fill, edgecolors=color)
    name_lines(axes, names)
    axes.axvline(100, color=INK[theme], linewidth=0.8)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_xlabel("floor / time")
    figure.suptitle(title, x=0.01, ha="left")
    bounds = [bound for bound in _BOUNDS if any(row["bound"] == bound for row in rows)]
    handles = [Line2D([], [], ls="", marker=_BOUNDS[b], mec=color, mfc=color, label=_BOUND_BY[b]) for b in bounds]
    marks(figure, [*handles, Line2D([], [], ls="", marker="o", mec=color, mfc="none", label="with backward")])
    return figure


def roofline(rows: list[Row], theme: str, title: str) -> Figure:
    """FLOPs a second over FLOPs per byte, of the work that no method can avoid, below what the machine's copy and its
    matrix product allow (medians of what was measured beside the rows). Attention on a CPU may end lower, at its
    exponentials; what has no matrix products has no place here. Within `style`."""
    rows = [row for row in rows if row.get("flops")]
    copy, product = (median(row[x] / row["floors_s"][y] for row in rows) for x, y in ROOFS.items())
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    across = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(across) / 1.5, max(*across, product / copy) * 1.5
    axes.plot([left, product / copy], [left * copy, product], color=INK[theme], linewidth=1, linestyle="--")
    axes.plot([product / copy, right], [product, product], color=INK[theme], linewidth=1)
    for x, row in zip(across, rows, strict=True):
        color, marker = of_operator(row["op"])
        fill = color if row["direction"] == "forward" else "none"
        y = row["flops"] / row["median_s"]
        axes.scatter([x], [y], s=20, linewidths=0.9, marker=marker, facecolors=fill, edgecolors=color)
    axes.set_xlim(left, right)
    scale(axes, "x", number)
    scale(axes, "y", rate)
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("FLOP/s")
    figure.suptitle(title, x=0.01, ha="left")
    handles = []
    for name in sorted({row["op"] for row in rows}):
        color, marker = of_operator(name)
        handles.append(Line2D([], [], ls="", marker=marker, mec=color, mfc=color, label=name))
    handles.append(Line2D([], [], ls="", marker="o", mec=INK[theme], mfc="none", label="with backward"))
    roofs: list[tuple[str, Literal["--", "-"]]] = [
        (f"copy, {rate(copy)}B/s", "--"),
        (f"matrix product, {rate(product)}FLOP/s", "-"),
    ]
    handles += [Line2D([], [], color=INK[theme], linewidth=1, linestyle=style, label=name) for name, style in roofs]
    marks(figure, handles)
    return figure


def rate(value: float) -> str:
    """With a prefix of the unit that is to follow."""
    size, prefix = next(
        pair for pair in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if value >= pair[0]
    )
    return f"{value / size:.3g} {prefix}"
