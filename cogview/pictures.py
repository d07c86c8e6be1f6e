"""What people look at: picture files, contact sheets with captions, and loss curves."""

import errno
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from rich.cells import cell_len
from torch import Tensor

from cogview.config import require
from cogview.data.files import written_beside
from cogview.data.images import to_rgb
from cogview.labels import FONTS, label, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
MAX_SIDE = 16_000  # pixels of a sheet; WebP can hold 16,383
_MARGIN, _GAP, _ACROSS, _NARROWEST = 10, 2, 8, 128


def format_of(path: str | Path) -> str:
    """Pillow's name of the format that a file name's suffix stands for; ValueError lists the suffixes."""
    suffix = Path(path).suffix
    Image.init()
    known = [name for name, kind in FORMATS.items() if kind in Image.SAVE]  # a Pillow may be built without WebP
    require(suffix.lower() in known, "out", f"a name that ends in {', '.join(known)}", str(path))
    return FORMATS[suffix.lower()]


def picture_path(out: Path) -> Path:
    """The path of a picture that a command is to write: a name without a suffix gets .png; ValueError if it has that
    of no format that can be written."""
    require(out.name.strip(".") != "", "out", "a file's name", str(out))
    path = out if out.suffix else out.with_name(out.name + ".png")
    format_of(path)
    return path


def check_place(path: Path) -> None:
    """Makes the folder of a file that is to be written; OSError in one sentence if it cannot be."""
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise OSError(f"out: cannot write {path} ({error.strerror})") from error


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Writes a picture in the format of its name."""
    path, kind = Path(path), format_of(path)
    with written_beside(path) as beside:
        image.save(beside, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    return path


def image_of(picture: Tensor) -> Image.Image:
    """Of uint8 [3, H, W], or [4, H, W] with transparency."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy().astype(np.uint8))


def thumbnail(picture: Tensor, most: int) -> Tensor:
    """uint8 [3, h, w] of one of any size, on white, no side longer than `most` pixels."""
    image = to_rgb(image_of(picture))
    image.thumbnail((most, most))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Tensor]]], path: str | Path, *, columns: int = 4, zoom: int = 2, note: str = ""
) -> int:
    """Writes a picture of cells, each some pictures (uint8 [3, H, W]) side by side above their caption.

    Returns how many of the rows are on it: all that fit MAX_SIDE pixels.
    """
    require(bool(rows), "rows", "at least one captioned picture", "none")
    height, width = (zoom * n for n in rows[0][1][0].shape[1:])
    most = max(len(pictures) for _, pictures in rows)
    across = max(1, min(most, _ACROSS, MAX_SIDE // (width + _GAP)))
    cell_width = max(across * (width + _GAP) - _GAP, _NARROWEST)
    columns = max(1, min(columns, len(rows), MAX_SIDE // (cell_width + _MARGIN)))
    sheet_width = _MARGIN + columns * (cell_width + _MARGIN)

    placed: list[tuple[Image.Image, tuple[int, int]]] = []
    y, shown = _MARGIN, 0
    if note:
        placed.append((label(note, sheet_width - 2 * _MARGIN), (_MARGIN, y)))
        y += placed[0][0].height + _MARGIN
    for first in range(0, len(rows), columns):
        cells = rows[first : first + columns]
        labels = [label(text, cell_width, instead=f"caption {first + n}") for n, (text, _) in enumerate(cells, 1)]
        block = -(-max(len(pictures) for _, pictures in cells) // across) * (height + _GAP)
        bottom = y + block + max(image.height for image in labels) + _MARGIN
        if bottom > MAX_SIDE and shown:
            break
        for n, ((_, pictures), text) in enumerate(zip(cells, labels, strict=True)):
            x = _MARGIN + n * (cell_width + _MARGIN)
            for k, picture in enumerate(pictures):
                place = x + k % across * (width + _GAP), y + k // across * (height + _GAP)
                placed.append((image_of(picture).resize((width, height), Image.Resampling.NEAREST), place))
            placed.append((text, (x, y + block + 1)))
        y, shown = bottom, first + len(cells)
    sheet = Image.new("RGB", (sheet_width, y), "white")
    for image, place in placed:
        sheet.paste(image, place)
    save_image(sheet, path)
    return shown


HELD_OUT = ", held out"  # ends the name of a curve
_INSIDE, _NAME = 6, 40  # names, and letters of one, that a panel has room for


def curves(
    panels: Sequence[tuple[str, dict[str, tuple[list[float], list[float]]]]],
    path: str | Path,
    *,
    across: str = "step",
    scale: Literal["linear", "log"] = "linear",
    dashed: str = HELD_OUT,
) -> Path:
    """Writes a picture of panels side by side, each a title and named (x, y) lines over what `across` says; names are
    shown as they are, and those that end in `dashed` go with the others of their beginning. Many or long names stand
    below, once for all."""
    from matplotlib import colormaps, ticker
    from matplotlib.figure import Figure

    require(bool(panels), "panels", "at least one", "none")

    def legend_of(make, lines: list, named: Iterable[str], **how) -> None:
        for text, name in zip(make(lines, ["line"] * len(lines), **how).get_texts(), named, strict=True):
            plainly(text, name)

    names = list(dict.fromkeys(name for _, lines in panels for name in lines))
    same = list(dict.fromkeys(name.removesuffix(dashed) for name in names))
    palette = "tab10" if len(same) <= 10 else "tab20" if len(same) <= 20 else "turbo"
    colours = colormaps[palette].resampled(max(10, len(same)))
    longest = max((cell_len(printable(name)) for name in names), default=0)
    width, below = 5 * len(panels), len(names) > _INSIDE or longest > _NAME
    columns = max(1, min(len(names), int(width * 13 / (longest + 8))))  # 13 letters an inch; the line of one takes 8
    rows = -(-len(names) // columns) if below else 0
    figure = Figure(figsize=(width, 3.6 + 0.19 * rows), dpi=110, layout="constrained")
    drawn = {}
    for number, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, (x, y) in lines.items():  # held out: in the colour of what it was trained on, dashed
            colour = colours(same.index(name.removesuffix(dashed)))
            dashes, marker = "--" if name.endswith(dashed) else "-", "." if len(x) < 10 else ""
            drawn[name] = axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.3, marker=marker)[0]
        axes.set_xlabel(across)
        if all(float(at).is_integer() for x, _ in lines.values() for at in x):
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set_yscale(scale)
        if scale == "log":  # 20, not 2 x 10^1
            axes.yaxis.set_major_formatter(ticker.LogFormatter())
            axes.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.4)))
        axes.grid(alpha=0.3)
        plainly(axes.title, title)
        if lines and not below:
            legend_of(axes.legend, [drawn[name] for name in lines], lines)
    if below:
        order = [name for name in names if name in drawn]
        legend_of(
            figure.legend, list(map(drawn.get, order)), order, loc="outside lower center", ncols=columns, fontsize=8
        )
    return save_figure(figure, path)


def plainly(text: "Text", words: str) -> None:
    """Words of anybody's, as they are, for a text of a figure."""
    text.set(text=printable(words), parse_math=False, fontfamily=_families())


@cache
def _families() -> list[str]:
    from matplotlib import font_manager

    font_manager.fontManager.addfont(str(FONTS[0]))  # found by its name from here on, for Chinese
    return [font_manager.FontProperties(fname=str(font)).get_name() for font in reversed(FONTS)]


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure in the format of the file's name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # one that no font has is drawn as a box
        canvas.draw()
    return save_image(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
