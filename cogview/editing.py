"""Parts of a picture anew: which square around them is given to a model, which of its cells are drawn, and how what it
draws comes back into the picture (CogView2, arXiv 2204.14217; comp_pipeline/patch_completion.py).

A mask is bool [H, W], True where the picture is to be drawn. What it leaves is not touched: the new pixels are laid
over the picture under the mask itself, with `feather` pixels inside its border in which they fade in.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import require
from cogview.data.images import MAX_BYTES, decode_image

AROUND = 20 / 14  # sides of the square, as times those of what is masked


class Box(NamedTuple):
    """Pixels from the first to before the last."""

    top: int
    left: int
    side: int

    def of(self, pixels: Tensor) -> Tensor:
        """[..., side, side] of [..., H, W], which share memory."""
        return pixels[..., self.top : self.top + self.side, self.left : self.left + self.side]


def check(mask: Tensor, picture: Tensor) -> None:
    """ValueError unless the mask fits a picture uint8 [C, H, W], and covers some of it and not all."""
    kind = mask.dtype == torch.bool and mask.ndim == 2
    require(kind, "mask", "bool [H, W]", mask)
    size = f"{picture.shape[2]} x {picture.shape[1]}"
    require(
        mask.shape == picture.shape[1:], "mask", f"{size} pixels, as the picture", f"{mask.shape[1]} x {mask.shape[0]}"
    )
    require(bool(mask.any()), "mask", "some of the picture, which is drawn anew", "nothing of it")
    require(not bool(mask.all()), "mask", "a part of the picture; all of it is `cogview2 generate`", "all of it")


def masked_by(boxes: Sequence[tuple[int, int, int, int]], picture: Tensor) -> Tensor:
    """bool [H, W] of rectangles (left, top, right, bottom) in pixels of a picture [3, H, W], which hold their first
    corner and not the last."""
    height, width = picture.shape[1:]
    mask = torch.zeros(height, width, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        fits = 0 <= left < right <= width and 0 <= top < bottom <= height
        require(fits, "box", f"LEFT TOP RIGHT BOTTOM inside {width} x {height} pixels", (left, top, right, bottom))
        mask[top:bottom, left:right] = True
    return mask


def read_mask(path: Path, picture: Tensor) -> Tensor:
    """bool [H, W] of a picture file of the size of another one [3, H, W]: True where it is opaque, or where nothing of
    it is transparent, light."""
    try:
        with path.open("rb") as file:
            image = decode_image(file.read(MAX_BYTES + 1), mode="RGBA")
    except OSError as error:
        raise ValueError(f"mask: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"mask: {path}: {error}") from error
    size, got = f"{picture.shape[2]} x {picture.shape[1]}", f"{image.width} x {image.height}"
    require(size == got, "mask", f"{size} pixels, as the picture", got)
    values = torch.from_numpy(np.array(image))
    opaque = values[..., 3] >= 128
    return values[..., :3].float().mean(dim=2) >= 128 if bool(opaque.all()) else opaque


def surrounding(mask: Tensor, around: float = AROUND, least: int = 1) -> Box:
    """The square around what is masked, `around` times its longer side and at least so many pixels where the picture
    has room, inside it. ValueError where no square of the picture holds all of it."""
    require(around >= 1, "around", "at least 1", around)
    height, width = mask.shape
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    (top, bottom), (left, right) = ((int(n.min()), int(n.max()) + 1) for n in (rows, columns))
    longer, most = max(bottom - top, right - left), min(height, width)
    wanted = f"what a square of the picture's shorter side ({most} pixels) holds"
    require(longer <= most, "mask", wanted, f"{right - left} x {bottom - top}")
    side = math.ceil(min(most, max(round(longer * around, 6), least)))
    y, x = (top + bottom - side) // 2, (left + right - side) // 2
    return Box(max(0, min(y, height - side)), max(0, min(x, width - side)), side)


def touched(mask: Tensor, cells: int) -> Tensor:
    """bool [cells, cells]: the cells of a square mask [S, S] that have any of it, so that all of it is drawn."""
    return F.adaptive_max_pool2d(mask[None, None].float(), cells)[0, 0] > 0


def laid_over(picture: Tensor, box: Box, drawn: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """uint8 [3, H, W]: a picture of that size with what was drawn of the box, [3, side, side], where the mask is; or
    [4, H, W], where that is opaque."""
    require(feather >= 0, "feather", "at least 0 pixels", feather)
    found, opaque = picture.clone(), torch.full_like(drawn[:1], 255)
    drawn = torch.cat([drawn, opaque])[: len(picture)]
    inside = box.of(mask).float()
    if feather:  # the share of masked pixels around is a half at a straight border
        padded = F.pad(inside[None, None], (feather,) * 4, mode="replicate")
        share = F.avg_pool2d(padded, 2 * feather + 1, stride=1)[0, 0]
        inside = inside * (2 * share - 1).clamp(1 / (feather + 1), 1)
    here = box.of(found)
    mixed = torch.lerp(here.float(), drawn.float(), inside).round().to(torch.uint8)
    here.copy_(torch.where(box.of(mask), mixed, here))
    return found
