"""Single things in several styles, for learning styles (CogView, arXiv 2105.13290, section 3.3): 200 emoji as Noto has
them, as filters make them, and as three other hands drew them; 64 x 64 pixels, on a coloured background.

The filters' are the styles that a model knows before it is finetuned, the other hands' those that it learns. Of each of
these 25 things are held out.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from cogview.data.images import pixels
from cogview.emoji import STYLES as SHARD
from cogview.emoji import at_size, load_emoji, load_icons

SIZE = 64  # pixels of a side
TILE = 56  # pixels of a thing's side
PLAIN = "plain"
FILTERS = ("grey", "negative", "sketch", "mosaic", "sepia")
STYLES = ("blob", "flat", "contrast")
BACKGROUNDS = {
    "white": (250, 250, 250),
    "blue": (100, 160, 245),
    "green": (130, 205, 130),
    "pink": (255, 175, 195),
    "purple": (165, 130, 225),
    "orange": (255, 180, 100),
    "grey": (170, 174, 180),
}
"""Which captions do not tell."""
HELD_OUT = 25


class View(NamedTuple):
    thing: str
    style: str
    background: str


@cache
def drawings() -> dict[tuple[str, str], Image.Image]:
    """RGBA, TILE x TILE, by thing and style, those of PLAIN and STYLES."""
    found, codepoints = {}, {}
    for key, (about, image) in load_icons(SHARD).items():
        style, _, thing = key.partition("-")
        found[thing, style], codepoints[thing] = image, about["codepoints"]
    plain = load_emoji(set(codepoints.values()))
    found |= {(thing, PLAIN): plain[key].image for thing, key in codepoints.items()}
    return {name: at_size(image, TILE) for name, image in found.items()}


@cache
def things() -> list[str]:
    return sorted(thing for thing, style in drawings() if style == PLAIN)


def held_out(thing: str, style: str) -> bool:
    return thing in _held_out(style)


@cache
def _held_out(style: str) -> frozenset[str]:
    """Chosen by content, whatever else there is."""
    return frozenset(
        sorted(things(), key=lambda thing: hashlib.sha256(f"{thing}\0{style}".encode()).digest())[:HELD_OUT]
    )


def render(view: View) -> Image.Image:
    """RGB, SIZE x SIZE."""
    tile = drawings()[view.thing, view.style if view.style in STYLES else PLAIN]
    return filtered(on_background(tile, view.background), view.style)


def on_background(tile: Image.Image, name: str) -> Image.Image:
    """RGB, SIZE x SIZE, a tile in the middle of one of BACKGROUNDS."""
    picture, corner = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[name]), (SIZE - TILE) // 2
    picture.paste(tile, (corner, corner), tile)
    return picture


def filtered(picture: Image.Image, style: str) -> Image.Image:
    """In one of FILTERS, or as it is."""
    return _FILTERS.get(style, lambda same: same)(picture)


def _sketch(picture: Image.Image) -> Image.Image:
    """Dark edges on white."""
    edges = picture.filter(ImageFilter.FIND_EDGES).point(lambda v: min(255, round(1.5 * v)))
    return ImageOps.invert(ImageOps.grayscale(edges)).convert("RGB")


def _mosaic(picture: Image.Image) -> Image.Image:
    small = picture.resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)
    return small.resize((SIZE, SIZE), Image.Resampling.NEAREST)


_FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": lambda picture: ImageOps.grayscale(picture).convert("RGB"),
    "negative": ImageOps.invert,
    "sketch": _sketch,
    "mosaic": _mosaic,
    "sepia": lambda picture: ImageOps.colorize(ImageOps.grayscale(picture), (40, 20, 0), (255, 240, 200)),
}


def pictures_of(views: Iterable[View]) -> Tensor:
    """uint8 [N, 3, SIZE, SIZE]."""
    return torch.stack([pixels(render(view), SIZE) for view in views])


def named(thing: str) -> str:
    """With its article."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
