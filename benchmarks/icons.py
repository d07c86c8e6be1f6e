"""A collection such as users have: 3,300 captioned pictures of two free icon sets, in tar shards.

    npm pack @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat   # Apache-2.0 and MIT; unpack each beside the other
    pip install resvg_py                                             # draws SVG
    python -m benchmarks.icons FOLDER_OF_BOTH --out icons

The same thing as a blob (Noto) and flat (Fluent), on one of eight backgrounds, one or two times. A tenth of the things
is in test shards alone. With the nuisances of real collections: many sizes and formats, transparency, grey and CMYK,
EXIF orientation, captions in .txt or JSON beside other fields, and a few samples that are broken, each kind known.
"""

import argparse
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import resvg_py  # type: ignore[import-not-found]
from PIL import Image

from cogview.data.shards import ShardWriter
from cogview.progress import track

STYLES = {"blob": "noto-v1", "flat": "fluent-emoji-flat"}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (24, 24, 24),
    "grey": (150, 150, 150),
    "red": (226, 90, 80),
    "yellow": (250, 216, 100),
    "green": (120, 190, 110),
    "blue": (90, 150, 226),
    "pink": (246, 176, 200),
}
SIZES = (64, 96, 128, 200, 256, 300, 512)
PAIRS = 3300
PER_SHARD = 500
_VARIANT = re.compile(r"skin-tone|^flag-|-(light|medium|dark)|^keycap|^regional|button$")


class Icon(NamedTuple):
    thing: str
    style: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.style} {self.thing} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        return _draw("split", self.thing) % 10 == 0


def _draw(*key: object) -> int:
    """A number that only the key decides."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def icons(sets: dict[str, dict[str, Any]]) -> list[Icon]:
    """PAIRS of them, in an order without order."""
    shared = set.intersection(*({n for n, i in s["icons"].items() if not i.get("hidden")} for s in sets.values()))
    names = list(BACKGROUNDS)
    found = []
    for name in sorted(n for n in shared if not _VARIANT.search(n)):
        for style in STYLES:
            first = _draw(name, style) % len(names)
            second = (first + 1 + _draw(name, style, 2) % (len(names) - 1)) % len(names)
            found += [Icon(name.replace("-", " "), style, names[k]) for k in (first, second)]
    return sorted(found, key=lambda icon: _draw(icon))[:PAIRS]


def render(svg: dict[str, Any], body: str, side: int) -> Image.Image:
    width, height = svg.get("width", 16), svg.get("height", 16)
    text = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=side, height=side))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def members(icon: Icon, drawing: Image.Image) -> dict[str, bytes]:
    """A sample as somebody might have it."""
    kind, side = _draw("kind", icon) % 20, drawing.width
    ground = Image.new("RGBA", drawing.size, BACKGROUNDS[icon.background])
    drawing = drawing.resize((side * 3 // 4,) * 2, Image.Resampling.LANCZOS)
    ground.alpha_composite(drawing, (side // 8, side // 8))
    picture: Image.Image = ground.convert("RGB")
    encoded, extension = io.BytesIO(), "png"
    how: dict[str, Any] = {}
    if kind < 8:
        extension, how = "jpg", {"quality": 92}
    elif kind < 11:
        extension, how = "webp", {"quality": 90}
    elif kind == 11:
        picture, extension, how = picture.convert("CMYK"), "jpg", {"quality": 95}
    elif kind == 12:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 270 degrees counter-clockwise
        picture, extension, how = picture.transpose(Image.Transpose.ROTATE_90), "jpg", {"quality": 92, "exif": exif}
    elif kind == 13 and icon.background == "white":
        alone = Image.new("RGBA", ground.size)
        alone.alpha_composite(drawing, (side // 8, side // 8))
        picture = alone
    elif kind == 14:
        picture = picture.quantize(128)
    picture.save(encoded, {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[extension], **how)
    sample = {extension: encoded.getvalue()}
    fields: dict[str, Any] = {"id": f"{_draw(icon):016x}", "width": side, "url": f"https://example.org/{icon.thing}"}
    if _draw("text", icon) % 3:
        return sample | {"json": json.dumps(fields | {"caption": icon.caption}).encode()}
    more = {"json": json.dumps(fields).encode()} if _draw("both", icon) % 2 else {}
    return sample | {"txt": f"{icon.caption}\n".encode()} | more


def broken(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples that cannot be used, or not whole, by the name of what is wrong."""
    good = io.BytesIO()
    Image.new("RGB", (70, 70), (9, 120, 200)).save(good, "PNG")
    png = good.getvalue()
    yield f"{split}-no-caption", {"png": png}
    yield f"{split}-other-fields-only", {"png": png, "json": b'{"id": "x", "url": "y"}'}
    yield f"{split}-half-a-picture", {"png": png[: len(png) // 2], "txt": b"half a picture"}
    yield f"{split}-no-unicode", {"png": png, "json": b'{"caption": "half \\ud83d"}'}
    yield f"{split}-blank", {"png": png, "txt": " \u200b\ufeff ".encode()}
    yield f"{split}-long", {"png": png, "txt": b"a very long story " * 400}
    yield f"{split}-no-picture", {"txt": b"a caption alone"}


def build(source: Path, out: Path) -> None:
    sets = {}
    for style, name in STYLES.items():
        found = sorted(source.rglob(f"*{name}*/**/icons.json"))
        if not found:
            raise SystemExit(f"{source}: expected the unpacked @iconify-json/{name} in it")
        sets[style] = json.loads(found[0].read_text(encoding="utf-8"))
    chosen = icons(sets)
    for split in ("train", "test"):
        mine = [icon for icon in chosen if icon.held_out == (split == "test")]
        for start in track(range(0, len(mine), PER_SHARD), f"drawing {split}"):
            with ShardWriter(out / f"{split}-{start // PER_SHARD:03d}.tar") as shard:
                for number, icon in enumerate(mine[start : start + PER_SHARD], start):
                    svg, side = sets[icon.style], SIZES[_draw("size", icon) % len(SIZES)]
                    drawing = render(svg, svg["icons"][icon.thing.replace(" ", "-")]["body"], side)
                    shard.write(f"{split}{number:05d}", members(icon, drawing))
                if start == 0:
                    for key, contents in broken(split):
                        shard.write(key, contents)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="where both packages are unpacked")
    parser.add_argument("--out", type=Path, default=Path("icons"), help="folder for the shards")
    arguments = parser.parse_args()
    build(arguments.source, arguments.out)
