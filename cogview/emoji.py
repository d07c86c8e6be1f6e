"""The pictures shipped with the package: Noto emoji at 64 px, with names, 200 things in three other styles, and people
at work (cogview/assets/NOTICE.md)."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from cogview.data.images import decode_image
from cogview.data.samples import IMAGE, JSON
from cogview.data.tar_index import TarIndex

SHARD, STYLES, PEOPLE = (Path(__file__).parent / "assets" / f"{name}.tar" for name in ("emoji", "styles", "people"))
VARIANT = "\ufe0f"  # after a character: as an emoji. Many texts leave it out
_TYPOGRAPHIC = 0x2300  # characters before it, as ©, are emoji only where the text says so


@dataclass(frozen=True)
class Emoji:
    codepoints: str  # as in "2764-fe0f", unique
    en: str
    zh: str
    image: Image.Image  # RGBA, 64 x 64


def load_emoji(codepoints: Collection[str] | None = None, *, shard: Path = SHARD) -> dict[str, Emoji]:
    """The emoji by codepoints ("1f43c"), all or those asked for; ValueError if one is not in the shard."""
    found = load_icons(shard, codepoints)
    return {key: Emoji(key, about["en"], about["zh"], image) for key, (about, image) in found.items()}


def load_icons(shard: Path, keys: Collection[str] | None = None) -> dict[str, tuple[dict[str, str], Image.Image]]:
    """What is told of each picture of a shard, and the picture, RGBA, 64 x 64, by its key."""
    index, rows = _rows(shard)
    wanted = list(rows) if keys is None else list(keys)
    if missing := [key for key in wanted if key not in rows]:
        raise ValueError(f"codepoints: expected emoji of {shard.name}, got {missing}")
    found = {}
    for key in wanted:
        contents = index.read(rows[key], {IMAGE: 1 << 20, JSON: 1 << 16})
        found[key] = json.loads(contents[JSON]), decode_image(contents[IMAGE], mode="RGBA")
    return found


def at_size(image: Image.Image, side: int) -> Image.Image:
    """RGBA, side x side: resized with its colours weighted by alpha, so that no dark fringe appears."""
    return image.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")


@cache
def _rows(shard: Path) -> tuple[TarIndex, dict[str, int]]:
    index = TarIndex.build(shard)  # 0.1 s; installed packages are no place for a sidecar
    return index, {index.key(row): row for row in range(len(index))}


@cache
def emoji_texts() -> dict[str, str]:
    """The codepoints of each emoji by the texts that stand for it."""
    texts = {}
    for key in _rows(SHARD)[1]:
        text = "".join(chr(int(c, 16)) for c in key.split("-"))
        texts[text] = key
        if ord(text[0]) >= _TYPOGRAPHIC:
            texts.setdefault(text.replace(VARIANT, ""), key)
    return texts
