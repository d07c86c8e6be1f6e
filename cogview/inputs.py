"""Captions and pictures as people give them, checked, in the form that tokenizers take."""

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cogview.config import briefly, require
from cogview.data.captions import blank
from cogview.data.images import MAX_BYTES, decode_image, deep, pixels, to_rgb

Captions = str | Sequence[str]
Pictures = Tensor | Image.Image | Path | Sequence[Image.Image | Path]
Bad = dict[int, str]
"""What is wrong with some of several pictures, by their numbers from 0 on."""


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


def images(pictures: Pictures, side: int, bad: Bad | None = None) -> Tensor:
    """uint8 [N, 3, side, side] of pictures, which are cropped to a square and resized where they are not so.

    ValueError for what is no picture, cannot be read, or has no pixel. bad: takes those instead, as what is wrong with
    them by their numbers from 0 on; they are black then.
    """
    if isinstance(pictures, Tensor):
        pictures = pictures[None] if pictures.ndim == 3 else pictures
        fits = pictures.dtype == torch.uint8 and pictures.ndim == 4 and pictures.shape[1] == 3
        require(fits, "pictures", "uint8 [N, 3, H, W]", pictures)
        require(0 not in pictures.shape[2:], "pictures", "at least one pixel each", pictures)
        if pictures.shape[2:] == (side, side):
            return pictures
        pictures = [Image.fromarray(p.permute(1, 2, 0).contiguous().cpu().numpy()) for p in pictures]
    one = isinstance(pictures, Image.Image | Path)
    several = isinstance(pictures, Iterable) and not isinstance(pictures, str | bytes | Mapping | Set | np.ndarray)
    require(one or several, "pictures", "PIL images or a uint8 tensor", pictures)
    given = [pictures] if one else list(pictures)  # type: ignore[arg-type]
    found = torch.zeros(len(given), 3, side, side, dtype=torch.uint8)
    for number, picture in enumerate(given):
        try:
            found[number] = pixels(_rgb(picture, side), side)
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{error}, in picture {number + 1}" if len(given) > 1 else str(error)) from error
            bad[number] = str(error)
    return found


def whole(picture: Tensor | Image.Image | Path, *, exact: bool = False) -> Tensor:
    """uint8 [3, H, W] of one picture, as large as it is; ValueError for what is none. exact: all that it is, so that it
    is [4, H, W] with transparency, and ValueError for more than 8 bits a channel."""
    if isinstance(picture, Tensor):
        channels = (3, 4) if exact else (3,)
        fits = picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] in channels
        require(fits and picture.numel() > 0, "picture", f"uint8 [{' or '.join(map(str, channels))}, H, W]", picture)
        return picture
    found = torch.from_numpy(np.array(_rgb(picture, None, exact))).permute(2, 0, 1)
    return found[:3] if exact and bool((found[3] == 255).all()) else found


def _rgb(picture: Any, side: int | None, exact: bool = False) -> Image.Image:
    """Of a picture or its file, whole, which may come smaller, see `decode_image`; RGBA where it is to be exact.
    ValueError where there is none."""
    mode = "RGBA" if exact else "RGB"
    if isinstance(picture, Path):
        try:
            with open(picture, "rb") as file:
                return decode_image(file.read(MAX_BYTES + 1), mode=mode, side=side, exact=exact)
        except OSError as error:
            raise ValueError(f"pictures: cannot read {picture} ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{picture}: {error}") from error
    require(isinstance(picture, Image.Image), "pictures", "PIL images or a uint8 tensor", picture)
    require(0 not in picture.size, "pictures", "at least one pixel each", f"{picture.width} x {picture.height}")
    require(not (exact and deep(picture)), "picture", "8 bits a channel", picture.mode)
    try:
        return to_rgb(picture, mode)
    except Exception as error:  # one that was opened and not read yet: decoders raise nearly anything
        raise ValueError(f"pictures: not a readable picture ({error})") from error
