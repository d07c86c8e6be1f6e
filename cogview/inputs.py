"""Captions and pictures as people give them, checked, in the form that tokenizers take."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview.config import briefly, require
from cogview.data.captions import blank
from cogview.data.images import pixels, to_rgb

Captions = str | Sequence[str]
Pictures = Tensor | Image.Image | Sequence[Image.Image]


class BadCaption(ValueError):
    """Of one caption, which it quotes; numbers begin at 1."""

    def __init__(self, number: int, caption: Any, expected: str, got: str):
        shown = briefly(caption)
        self.number, self.expected, self.got = number, expected, got
        self.shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
        super().__init__(f"captions: expected {expected}, got {got} in caption {number}: {self.shown}")


def texts(captions: Captions) -> list[str]:
    """A list, also of a single string; ValueError names one that is blank or no valid Unicode."""
    found = listed(captions)
    for number, caption in enumerate(found, 1):
        if not isinstance(caption, str):
            raise BadCaption(number, caption, "text", type(caption).__name__)
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise BadCaption(number, caption, "valid Unicode", "half of a character") from error
        if blank(caption):
            raise BadCaption(number, caption, "one that is not blank", "nothing to draw")
    return found


def listed(captions: Any) -> list[Any]:
    """What captions are given as, in a list; ValueError where it has no order or no parts."""
    if isinstance(captions, str):
        return [captions]
    ordered = isinstance(captions, Iterable) and not isinstance(captions, bytes | bytearray | Mapping | Set)
    require(ordered and getattr(captions, "ndim", 1) > 0, "captions", "a string or a list of strings", captions)
    return list(captions)


def images(pictures: Pictures, side: int) -> Tensor:
    """uint8 [N, 3, side, side] of pictures, which are cropped to a square and resized where they are not so; ValueError
    for what is no picture, or one without a pixel."""
    if isinstance(pictures, Tensor):
        pictures = pictures[None] if pictures.ndim == 3 else pictures
        fits = pictures.dtype == torch.uint8 and pictures.ndim == 4 and pictures.shape[1] == 3
        require(fits, "pictures", "uint8 [N, 3, H, W]", pictures)
        require(0 not in pictures.shape[2:], "pictures", "at least one pixel each", pictures)
        if pictures.shape[2:] == (side, side):
            return pictures
        pictures = [Image.fromarray(p.permute(1, 2, 0).contiguous().cpu().numpy()) for p in pictures]
    several = isinstance(pictures, Iterable) and not isinstance(pictures, str | bytes | Mapping | Set | np.ndarray)
    require(isinstance(pictures, Image.Image) or several, "pictures", "PIL images or a uint8 tensor", pictures)
    given = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    for image in given:
        require(isinstance(image, Image.Image), "pictures", "PIL images or a uint8 tensor", image)
        require(0 not in image.size, "pictures", "at least one pixel each", f"{image.width} x {image.height}")
    found = [pixels(to_rgb(image), side) for image in given]
    return torch.stack(found) if found else torch.zeros(0, 3, side, side, dtype=torch.uint8)
