"""Decoding pictures that nobody vouches for."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
MAX_BYTES = 32 << 20
MAX_PIXELS = 1 << 26


def decode_image(
    data: bytes, *, mode: str = "RGB", max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decodes the first frame of an encoded picture.

    data: PNG, JPEG, WebP, GIF or BMP. mode: "RGB" (transparent parts become white) or "RGBA".
    Raises ValueError, and decodes nothing, if the file is larger than max_bytes or the picture than
    max_pixels (a small file can claim a huge picture); ValueError too if it cannot be decoded.
    """
    if len(data) > max_bytes:
        raise ValueError(f"image: expected at most {max_bytes} bytes, got {len(data)}")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise ValueError(f"image: not a readable picture ({error})") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"image: expected at most {max_pixels} pixels, got {image.width} x {image.height}")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        if mode == "RGB" and transparent:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert(mode)
    except Exception as error:
        raise ValueError(f"image: not a readable picture ({error})") from error


def pixels(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size] of an RGB picture; other sizes are cropped to a square and resized."""
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
