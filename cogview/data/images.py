"""Decoding pictures that nobody vouches for."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
MAX_BYTES = 32 << 20
MAX_PIXELS = 1 << 26
_TURN = Image.Transpose
_ORIENTATION = 0x0112  # EXIF: how the camera was held
_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}


class TooLarge(ValueError):
    """A file or a picture above its limit, of which nothing was decoded."""


def open_image(data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded picture whose header is read: its `size` and `format`. TooLarge, or ValueError if it is none."""
    if len(data) > max_bytes:
        raise TooLarge(f"image: expected at most {max_bytes} bytes, got {len(data)}")
    if not data:
        raise ValueError("image: not a readable picture (no bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"image: expected at most {max_pixels} pixels ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"image: not a readable picture (no {', '.join(FORMATS[:-1])} or {FORMATS[-1]})") from error
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise ValueError(f"image: not a readable picture ({error})") from error
    if image.width * image.height > max_pixels:
        raise TooLarge(f"image: expected at most {max_pixels} pixels, got {image.width} x {image.height}")
    return image


def decode_image(
    data: bytes,
    *,
    mode: str = "RGB",
    side: int | None = None,
    exact: bool = False,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decodes the first frame of an encoded picture, turned as its EXIF says.

    data: PNG, JPEG, WebP, GIF or BMP. mode: "RGB" (transparent parts become white) or "RGBA". side: a JPEG may come
    smaller than it is, but no side below twice this one, which is many times as fast. exact: ValueError for a picture
    of more bits than these 8 a channel, of which some would be lost.
    Raises TooLarge, a ValueError, and decodes nothing, if the file is larger than max_bytes or the picture than
    max_pixels (a small file can claim a huge picture); ValueError too if it cannot be decoded.
    """
    image = open_image(data, max_bytes=max_bytes, max_pixels=max_pixels)
    if exact and (deep(image) or (image.format == "PNG" and data[24] > 8)):
        raise ValueError("image: expected 8 bits a channel, got more")
    try:
        if side is not None:
            image.draft(None, (2 * side, 2 * side))  # type: ignore[arg-type]
        if getattr(image, "default_image", False):
            image.seek(1)  # an animated PNG's picture for programs that cannot play it is none of its frames
        frame = image.tile[0][1] if image.format == "GIF" and image.tile else None  # type: ignore[attr-defined]
        colour = _transparent_colour(image, data)
        image.load()
        turn = _TURNS.get(_orientation(image))
        if colour is not None:
            image = _of_sixteen_bits(image, data, colour)
        if frame and frame != (0, 0, *image.size):
            around = Image.new("RGBA", image.size)  # of a GIF, what its first frame leaves open is transparent
            around.paste(to_rgb(image, "RGBA").crop(frame), frame[:2])
            image = around
        return to_rgb(image if turn is None else image.transpose(turn), mode)
    except Exception as error:
        raise ValueError(f"image: not a readable picture ({error})") from error


def to_rgb(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """A picture of any of Pillow's modes in 8-bit RGB, transparent parts white; or "RGBA", with its alpha.

    Grey of more than 8 bits becomes 8 linearly: I;16 and its like, and I, which is how Pillow before 11.3 reads 16-bit
    PNGs, hold 0 to 65,535, F holds 0 to 255; what lies beyond is clipped.
    """
    if deep(image):
        image = _eight_bits(image)
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    elif image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        image = image.convert("RGB")
        image.info.pop("transparency", None)
    palette_alpha = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    if mode == "RGB" and (image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info or palette_alpha):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == mode else image.convert(mode)


def deep(image: Image.Image) -> bool:
    """Whether its pixels are of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _eight_bits(image: Image.Image) -> Image.Image:
    """L of a grey picture of more bits, or LA if one of its values is transparent."""
    values = np.asarray(image)
    if image.mode == "F":
        grey = np.rint(np.clip(np.nan_to_num(values), 0, 255))
    else:
        grey = (np.clip(values, 0, 65535).astype(np.uint32) * 255 + 32767) // 65535
    eight = Image.fromarray(grey.astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        eight.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return eight


def _transparent_colour(image: Image.Image, data: bytes) -> tuple[int, ...] | None:
    """Brings a PNG's transparent colour to the 8 bits that Pillow brings its pixels to.

    Takes it out and gives it where that would make other colours transparent: of 16-bit RGB.
    """
    key, depth = image.info.get("transparency"), data[24]
    if image.format != "PNG" or key is None:
        return None
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = (key & (1 << depth) - 1) * 255 // ((1 << depth) - 1)
    elif image.mode == "RGB" and depth == 16:
        if image.tell() == 0:
            return image.info.pop("transparency")
        image.info["transparency"] = tuple(value >> 8 for value in key)  # a later frame, drawn over others
    return None


def _of_sixteen_bits(image: Image.Image, data: bytes, transparent: tuple[int, ...]) -> Image.Image:
    """RGBA of a 16-bit RGB PNG, of which Pillow keeps the high bytes."""
    low = Image.open(io.BytesIO(data), formats=("PNG",))
    decoder, box, offset, _ = low.tile[0]
    low.tile = [(decoder, box, offset, "RGB;16L")]  # type: ignore[list-item]  # the other byte of each value
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    alpha = np.where((values == transparent).all(-1), 0, 255).astype(np.uint8)
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.fromarray(alpha))
    return rgba


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it cannot be read: that is no reason to lose a picture."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # hostile bytes here too
        return 1


def pixels(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size] of an RGB picture; other sizes are cropped to a square and resized."""
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized(pictures: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, side, side] of square ones, bicubically, with the kernel of Pillow."""
    found = F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True)
    return found.round_().clamp_(0, 255).to(torch.uint8)
