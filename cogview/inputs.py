"""Captions and pictures as people give them, checked, in the form that tokenizers take."""

import unicodedata
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cogview.config import require
from cogview.data.images import pixels, to_rgb

Captions = str | Sequence[str]
Pictures = Tensor | Image.Image | Sequence[Image.Image]


def texts(captions: Captions) -> list[str]:
    """A list, also of a single string; ValueError names one that is blank or no valid Unicode."""
    captions = [captions] if isinstance(captions, str) else list(captions)
    for number, caption in enumerate(captions, 1):
        if not isinstance(caption, str):
            raise bad_caption(number, caption, "text", type(caption).__name__)
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise bad_caption(number, caption, "valid Unicode", "half of a character") from error
        if all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in caption):
            raise bad_caption(number, caption, "one that is not blank", "nothing to draw")
    return captions


def bad_caption(number: int, caption: str, expected: str, got: str) -> ValueError:
    """The error of one caption, which it quotes; numbers begin at 1."""
    shown = repr(caption)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return ValueError(f"captions: expected {expected}, got {got} in caption {number}: {shown}")


def images(pictures: Pictures, side: int) -> Tensor:
    """uint8 [N, 3, side, side] of pictures, which are cropped to a square and resized where they are not so."""
    if isinstance(pictures, Tensor):
        pictures = pictures[None] if pictures.ndim == 3 else pictures
        fits = pictures.dtype == torch.uint8 and pictures.ndim == 4 and pictures.shape[1] == 3
        require(fits, "pictures", "uint8 [N, 3, H, W]", f"{pictures.dtype} {list(pictures.shape)}")
        if pictures.shape[2:] == (side, side):
            return pictures
        pictures = [Image.fromarray(p.permute(1, 2, 0).contiguous().cpu().numpy()) for p in pictures]
    given = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    require(all(isinstance(i, Image.Image) for i in given), "pictures", "PIL images or a uint8 tensor", pictures)
    found = [pixels(to_rgb(image), side) for image in given]
    return torch.stack(found) if found else torch.zeros(0, 3, side, side, dtype=torch.uint8)
