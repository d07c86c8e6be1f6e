"""Outfits: a single domain, as that of the paper's fashion model (CogView, arXiv 2105.13290, section 3.4), with
captions that name the kind and the colour of every part.

320 x 320 pixels: something for the head, the body, the legs and the feet, one below the other, and to carry, some of
them missing; each a piece of clothing among the emoji, dyed. An eighth of the outfits is "test", by content; and of the
pairs of a piece and its colour an eighth is held out: no outfit of "train" and "test" has one, each of "new" has.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from cogview.config import require
from cogview.demo.png_shard import Rows, write_splits
from cogview.emoji import at_size, load_emoji

SIZE = 320  # pixels of a side
TILE = 96  # pixels of a piece's side
PER_SHARD = 1000
SPLITS = ("train", "test", "new")
_SALT = "outfits 4"  # with it every part and every colour has pairs of either kind
_THERE = 0.8  # how often a part is; body and legs always are

# of each part: its corner (x, y), and its pieces, English: codepoints, Chinese
PARTS: dict[str, tuple[tuple[int, int], dict[str, tuple[str, str]]]] = {
    "head": ((112, 0), {"cap": ("1f9e2", "鸭舌帽"), "top hat": ("1f3a9", "礼帽"), "helmet": ("1fa96", "头盔")}),
    "body": (
        (112, 80),
        {
            "T-shirt": ("1f455", "T恤"),
            "coat": ("1f9e5", "外套"),
            "kimono": ("1f458", "和服"),
            "vest": ("1f9ba", "背心"),
        },
    ),
    "legs": ((112, 160), {"jeans": ("1f456", "牛仔裤"), "shorts": ("1fa73", "短裤")}),
    "feet": (
        (112, 224),
        {
            "shoes": ("1f45e", "皮鞋"),
            "sneakers": ("1f45f", "跑鞋"),
            "sandals": ("1f461", "凉鞋"),
            "boots": ("1f462", "靴子"),
        },
    ),
    "hand": (
        (208, 128),
        {"handbag": ("1f45c", "手提包"), "backpack": ("1f392", "书包"), "briefcase": ("1f4bc", "公文包")},
    ),
}
ALWAYS = ("body", "legs")
# English: what shadows and middle tones become, Chinese
COLOURS = {
    "red": ((90, 0, 10), (225, 45, 50), "红色"),
    "blue": ((5, 20, 95), (50, 105, 230), "蓝色"),
    "green": ((0, 60, 20), (60, 165, 75), "绿色"),
    "yellow": ((120, 80, 0), (250, 200, 40), "黄色"),
    "purple": ((50, 5, 80), (150, 75, 200), "紫色"),
    "black": ((0, 0, 0), (55, 55, 60), "黑色"),
}
BACKGROUNDS = ((250, 250, 250), (232, 236, 242), (245, 236, 224))  # which captions do not tell

Outfit = dict[str, tuple[str, str]]
"""By part, in the order of PARTS: a piece and its colour."""


@dataclass(frozen=True)
class Look:
    outfit: Outfit
    background: int


@cache
def dyed(piece: str, colour: str) -> Image.Image:
    """RGBA, TILE x TILE: a piece with its shades in a colour."""
    codepoints = next(pieces[piece][0] for _, pieces in PARTS.values() if piece in pieces)
    image = at_size(load_emoji([codepoints])[codepoints].image, TILE)
    shades = Image.new("RGB", image.size, (128, 128, 128))
    shades.paste(image, (0, 0), image.getchannel("A"))
    solid = image.getchannel("A").point(lambda a: 255 * (a > 128))
    grey = ImageOps.autocontrast(ImageOps.grayscale(shades), cutoff=2, mask=solid)
    shadow, middle, _ = COLOURS[colour]
    light = tuple((255 + 2 * c) // 3 for c in middle)
    found = ImageOps.colorize(grey, shadow, light, middle)
    found.putalpha(image.getchannel("A"))
    return found


def render(look: Look) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[look.background])
    for part, (piece, colour) in look.outfit.items():
        tile = dyed(piece, colour)
        picture.paste(tile, PARTS[part][0], tile)
    return picture


def caption(outfit: Outfit, language: str) -> str:
    """language: "en" or "zh"."""
    if language == "zh":
        return "，".join(f"{COLOURS[colour][2]}{PARTS[part][1][piece][1]}" for part, (piece, colour) in outfit.items())
    named = [f"{colour} {piece}" if piece.endswith("s") else f"a {colour} {piece}" for piece, colour in outfit.values()]
    return f"{', '.join(named[:-1])} and {named[-1]}"


def held_out(piece: str, colour: str) -> bool:
    return _eighth(f"{piece}\0{colour}")


def _eighth(content: str) -> bool:
    return hashlib.sha256(f"{_SALT}\0{content}".encode()).digest()[0] < 32


def sample(split: str, count: int, seed: int = 0) -> list[Look]:
    """Outfits of "train", "test" or "new", each by its number: the first of a longer sample are the same."""
    require(split in SPLITS, "split", f"one of {', '.join(SPLITS)}", split)
    return [_one(split, random.Random(f"{split} {seed} {number}")) for number in range(count)]


def _one(split: str, draws: random.Random) -> Look:
    while True:
        parts = [part for part in PARTS if part in ALWAYS or draws.random() < _THERE]
        outfit: Outfit = {part: draws.choice(_pairs(part, held=False)) for part in parts}
        if split == "new":
            part = draws.choice([part for part in parts if _pairs(part, held=True)])
            outfit[part] = draws.choice(_pairs(part, held=True))
        if split == "new" or split == ("test" if _eighth(caption(outfit, "en")) else "train"):
            return Look(outfit, draws.randrange(len(BACKGROUNDS)))


@cache
def _pairs(part: str, held: bool) -> list[tuple[str, str]]:
    return [(piece, colour) for piece in PARTS[part][1] for colour in COLOURS if held_out(piece, colour) is held]


def build_outfit_shards(folder: Path, train: int, test: int, progress=iter) -> dict[str, list[Path]]:
    """Writes `{train,test}-00000.tar`, … of PNGs and JSONs with both captions; those that are there stay. ValueError
    where the folder holds others."""
    counts = {"train": train, "test": test}
    others = f"out: {str(folder)!r} holds other outfits; name another folder or remove it"
    return write_splits(folder / "outfits.json", counts | {"salt": _SALT}, others, counts, PER_SHARD, _rows, progress)


def _rows(split: str, start: int, end: int) -> Rows:
    for look in sample(split, end)[start:]:
        captions = {language: caption(look.outfit, language) for language in ("en", "zh")}
        yield render(look), captions | {"outfit": look.outfit}
