"""How figures look, on matplotlib: colours, markers, axes, legends, files.

Figures are 4.4 inches wide, so that a phone shows them whole, on no background, the same bytes each time. Colours are
of Okabe and Ito's palette, which colour-blind people can tell apart; markers differ as well.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

OURS = "cogview_ops"
WIDTH = 4.4
INK = {"light": "#24292f", "dark": "#e6e6e6"}
GRID = {"light": "#d0d7de", "dark": "#444c56"}
BLUE = {"light": "#0072B2", "dark": "#56B4E9"}
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

# one shape a family
_OPERATORS = {
    "three_region_attention": (_RED, "o"),
    "three_region_attention_varlen": (_ORANGE, "o"),
    "three_region_attention_decode": (_PINK, "o"),
    "local_attention_2d": (_SKY, "s"),
    "local_attention_2d_decode": (_GREEN, "s"),
    "dalle_attention": (_OLIVE, "^"),
    "cogview2_attention": (_GREY, "D"),
}


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


def look(name: str, theme: str) -> dict[str, Any]:
    """Colour and marker of a contestant."""
    if name == OURS:
        return {"color": BLUE[theme], "marker": "o", "linewidth": 2.2, "zorder": 3}
    color, marker = _LOOKS.get(name.rpartition(": ")[2].rstrip("*"), _OTHER)
    return {"color": color, "marker": marker, "linewidth": 1.2, "linestyle": "--" if name.endswith("*") else "-"}


def of_operator(name: str) -> tuple[str, str]:
    """Its colour and marker where figures have several."""
    return _OPERATORS.get(name, _OTHER)


def scale(axes: Axes, axis: Literal["x", "y"], words: Callable[[float], str]) -> None:
    """Logarithmic, with few numbers in words."""
    getattr(axes, f"set_{axis}scale")("log")
    line = getattr(axes, f"{axis}axis")
    low, high = line.get_view_interval()
    wide = high / low > 60
    line.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
    line.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    line.set_minor_formatter(NullFormatter())
    line.set_tick_params(which="minor", length=0)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Below all of them, each contestant once, ours first."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    names = sorted(found, key=lambda name: (name != OURS, name == "floor"))
    handles = [found[name] for name in names] + star_line(names)
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=1.8)


def star_line(names: Iterable[str]) -> list[Line2D]:
    """A line of the legend that says what a star is, where there is one."""
    starred = any(name.endswith("*") for name in names)
    return [Line2D([], [], ls="", label="* computes something else")] if starred else []


def name_lines(axes: Axes, names: list[str]) -> None:
    """A line of the figure for each."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)


def marks(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handletextpad=0.4)
