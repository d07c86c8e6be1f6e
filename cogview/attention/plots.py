"""Pictures of what heads do: sheets of maps, places marked on pictures, scales of scores (CogView paper, figures 12 to
14). Layers and heads are counted from 1. L layers, H heads, N = g x g places."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.cells import cell_len
from torch import Tensor

from cogview.attention.measure import PAIRS
from cogview.pictures import image_of, plainly, save_figure

_MAP, _GAP = 1.1, 0.09  # inches of a map on a sheet, and the gap between two, as a share of it
_DPI = 100
_WIDEST, _MARKED = 150, 1.3  # inches: of a sheet, and of a marked picture
_LAYERS_ACROSS = 5


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _title(figure: Any, words: str) -> None:
    """Above all of a figure, in as many lines as it takes."""
    text = figure.suptitle(" ", fontsize=11)
    plainly(text, words)
    letters = figure.get_figwidth() * 11 * len(words) / max(1, cell_len(words))
    text.set_text(textwrap.fill(text.get_text(), max(8, int(letters))))


def sheet(maps: Tensor, path: Path, title: str, bar: str, *, middle: float | None = None) -> Path:
    """One small map [L, H, n, m] for each layer (down) and head (across). bar: what the colours say. middle: the value
    that is neither much nor little, on a logarithmic scale to either side; None: from 0 on."""
    from matplotlib.colors import LogNorm, PowerNorm

    layers, heads, n, m = maps.shape
    gap = max(1, round(m * _GAP))
    whole = np.full((layers * (n + gap) - gap, heads * (m + gap) - gap), np.nan)
    for layer in range(layers):
        for head in range(heads):
            whole[layer * (n + gap) :, head * (m + gap) :][:n, :m] = maps[layer, head]
    most = float(np.nanquantile(whole, 0.999)) or 1.0
    norm: Any = PowerNorm(0.5, 0, most)
    if middle is not None:
        far = max(2.0, min(20.0, most / middle))
        norm = LogNorm(middle / far, middle * far)
    size = min(_MAP, _WIDEST / max(layers, heads))
    figure = _figure(max(6.5, size * heads + 1.8), max(2.5, size * layers * n / m) + 1.3)
    axes = figure.add_subplot()
    shown = axes.imshow(whole, norm=norm, cmap="magma" if middle is None else "RdBu_r", interpolation="nearest")
    axes.set_facecolor("0.85")
    axes.set_xticks(np.arange(heads) * (m + gap) + m / 2 - 0.5, range(1, heads + 1))
    axes.set_yticks(np.arange(layers) * (n + gap) + n / 2 - 0.5, range(1, layers + 1))
    axes.set(xlabel="head", ylabel="layer")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    _title(figure, title)
    _bar(figure.colorbar(shown, ax=axes, shrink=0.8), bar, middle)
    return save_figure(figure, path)


def _bar(bar: Any, words: str, middle: float | None) -> None:
    from matplotlib import ticker

    plainly(bar.ax.yaxis.label, words)
    if middle is not None:
        bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        bar.ax.yaxis.set_minor_locator(ticker.NullLocator())


class Panel(NamedTuple):
    title: str
    values: Tensor
    """[g, g]"""
    dots: bool = False
    """Red dots on the eighth of the places with most; or every place is the redder the more it has."""


class Row(NamedTuple):
    name: str
    picture: Tensor
    """uint8 [3, H, W]"""
    panels: Sequence[Panel]


def marked(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Rows of maps over pictures (figure 13)."""
    across = max(len(row.panels) for row in rows)
    figure = _figure(0.5 + _MARKED * across, 0.5 + (_MARKED + 0.25) * len(rows))
    _title(figure, title)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for line, (name, picture, panels) in zip(grid, rows, strict=True):
        image = np.asarray(image_of(picture))
        for axes in line[len(panels) :]:
            axes.set_axis_off()
        for axes, (words, values, dots) in zip(line, panels, strict=False):
            axes.set(xticks=[], yticks=[])
            plainly(axes.title, words)
            axes.title.set_fontsize(8)
            if dots:
                axes.imshow(image, interpolation="nearest")
                _dots(axes, values, image.shape[:2])
            else:
                grey = image.mean(-1) * 0.5 + 127
                axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                _colours(axes, values, image.shape[:2])
        plainly(line[0].yaxis.label, textwrap.shorten(name, 18, placeholder="…"))
    return save_figure(figure, path)


def _dots(axes: Any, values: Tensor, sides: tuple[int, int]) -> None:
    g = len(values)
    best = values.flatten().topk(max(1, g * g // 8)).indices.numpy()
    y, x = (best // g + 0.5) * sides[0] / g - 0.5, (best % g + 0.5) * sides[1] / g - 0.5
    axes.scatter(x, y, s=16, c="red", edgecolors="white", linewidths=0.5)


def _colours(axes: Any, values: Tensor, sides: tuple[int, int]) -> None:
    share = (values / values.max().clamp_min(1e-12)).numpy()
    where = (-0.5, sides[1] - 0.5, sides[0] - 0.5, -0.5)
    axes.imshow(share, cmap="Reds", vmin=-0.5, vmax=1, alpha=0.85 * share, extent=where, interpolation="nearest")


def scales(scores: dict[str, Tensor], layers: Sequence[int], path: Path, title: str) -> Path:
    """Of each of some layers a panel: the mean of every head's scores, with bars from the least to the largest, text to
    text apart from the others (figure 14). scores: of PAIRS, [L, H, 4] as in `Figures.scores`."""
    across = min(_LAYERS_ACROSS, len(layers))
    down = math.ceil(len(layers) / across)
    heads = next(iter(scores.values())).shape[1]
    width = max(2.6 if len(layers) > 1 else 5.5, 0.28 * heads + 1)
    figure = _figure(min(_WIDEST, width * across), 2.6 * down + 0.9)
    _title(figure, title)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    at = np.arange(1, heads + 1)
    drawn: list[Any] = []
    for axes, layer in zip(grid.flat, layers, strict=False):
        drawn = []
        for name, colour, aside in zip(PAIRS, ("tab:blue", "tab:orange"), (-0.15, 0.15), strict=True):
            least, mean, largest, _ = scores[name][layer].T.numpy()
            bars = np.stack([mean - least, largest - mean])
            drawn.append(axes.errorbar(at + aside, mean, bars, fmt="o", ms=3, color=colour, capsize=2, lw=1))
        axes.set(xlabel="head", title=f"layer {layer + 1}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, axis="y")
    for line in grid:
        line[0].set_ylabel("q·k/√d")
    figure.legend(drawn, PAIRS, loc="outside lower center", ncols=2)
    return save_figure(figure, path)
