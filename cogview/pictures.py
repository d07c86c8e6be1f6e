"""What people look at: contact sheets with captions, and loss curves."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cogview.data.files import written_beside

FONT = Path(__file__).parent / "assets" / "captions.otf"  # Latin and common Chinese
_MARGIN, _LINE, _INK = 10, 17, (40, 40, 40)


def save_image(image: Image.Image, path: str | Path) -> Path:
    path = Path(path)
    with written_beside(path) as beside:
        image.save(beside, "PNG")
    return path


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Tensor]]], path: str | Path, *, columns: int = 4, zoom: int = 2, note: str = ""
) -> Path:
    """Writes a PNG of cells, each some pictures (uint8 [3, H, W]) side by side above their caption."""
    if not rows:
        raise ValueError("rows: expected at least one captioned picture, got none")
    height, width = (zoom * n for n in rows[0][1][0].shape[1:])
    cell_width = max(len(pictures) for _, pictures in rows) * (width + 2)
    font = ImageFont.truetype(str(FONT), 13)
    wrapped = [_wrap(caption, font, cell_width) for caption, _ in rows]
    cell_height = height + _LINE * max(map(len, wrapped)) + _MARGIN
    top = _MARGIN + (_LINE + _MARGIN if note else 0)
    across, down = min(columns, len(rows)), -(-len(rows) // columns)
    size = (_MARGIN + across * (cell_width + _MARGIN), top + down * (cell_height + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), note, _INK, font)
    for number, ((_, pictures), lines) in enumerate(zip(rows, wrapped, strict=True)):
        x = _MARGIN + number % columns * (cell_width + _MARGIN)
        y = top + number // columns * (cell_height + _MARGIN)
        for k, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy().astype(np.uint8))
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x + k * (width + 2), y))
        for k, line in enumerate(lines):
            draw.text((x, y + height + 3 + k * _LINE), line, _INK, font)
    return save_image(sheet, path)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; Chinese, which has no spaces, breaks anywhere."""
    characters = max(1, int(width / max(font.getlength(text) / max(len(text), 1), 1)))
    return textwrap.wrap(text, characters) or [""]


def curves(panels: Sequence[tuple[str, dict[str, tuple[list[float], list[float]]]]], path: str | Path) -> Path:
    """Writes a PNG of panels side by side, each a title and named (x, y) lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, (x, y) in lines.items():
            axes.plot(x, y, label=name, linewidth=1.3, marker="." if len(x) < 10 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    path = Path(path)
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=110)
    return path
