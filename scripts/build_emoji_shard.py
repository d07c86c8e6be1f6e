"""Builds cogview/assets/emoji.tar: Noto Color Emoji at 64 px with English and Chinese names.

    apt-get install fonts-noto-color-emoji && pip install emoji && python scripts/build_emoji_shard.py

Left out: skin tones and other modified sequences (they are near copies), emoji newer than the font (it draws
nothing, or their parts side by side), and emoji drawn exactly like an earlier one. The bytes depend on the
font, the `emoji` package and Pillow's WebP encoder alone.
"""

import argparse
import io
import json
from pathlib import Path

import emoji
from PIL import Image, ImageDraw, ImageFont

from cogview.data.shards import ShardWriter

STRIKE = 109  # the one bitmap size in the font
CANVAS = 136  # the width of one glyph at that size
SKIN_TONES = range(0x1F3FB, 0x1F400)


def glyph(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The emoji on a square transparent canvas; None if the font has no single picture for it."""
    if font.getlength(text) > 140:
        return None
    left, top, right, bottom = font.getbbox(text)
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    place = ((CANVAS - (right - left)) // 2 - left, (CANVAS - (bottom - top)) // 2 - top)
    ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
    return canvas if canvas.getchannel("A").getextrema()[1] > 0 else None


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Resized with the colours weighted by alpha, so that no dark fringe appears."""
    return image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def plain(name: str) -> str:
    """':red_apple:' to 'red apple'."""
    return name.strip(":").replace("_", " ").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--out", type=Path, default=Path("cogview/assets/emoji.tar"))
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--quality", type=int, default=80, help="of WebP, 1 to 100")
    args = parser.parse_args()
    if not args.font.is_file():
        raise SystemExit(f"--font: no such file: {args.font} (Debian: apt-get install fonts-noto-color-emoji)")

    emoji.config.load_language("zh")
    font = ImageFont.truetype(str(args.font), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    seen: set[bytes] = set()
    with ShardWriter(args.out) as shard:
        for text in sorted(emoji.EMOJI_DATA, key=lambda t: [ord(c) for c in t]):
            data = emoji.EMOJI_DATA[text]
            if data["status"] != emoji.STATUS["fully_qualified"] or "zh" not in data:
                continue
            if any(ord(c) in SKIN_TONES for c in text):
                continue
            image = glyph(font, text)
            if image is None or image.tobytes() in seen:
                continue
            seen.add(image.tobytes())
            encoded = io.BytesIO()
            shrink(image, args.size).save(encoded, "WEBP", quality=args.quality, alpha_quality=60)
            codepoints = [f"{ord(c):04x}" for c in text]
            names = {"en": plain(data["en"]), "zh": plain(data["zh"]), "codepoints": codepoints}
            contents = json.dumps(names, ensure_ascii=False).encode()
            shard.write("-".join(codepoints), {"webp": encoded.getvalue(), "json": contents})
    print(f"{len(seen)} emoji, {args.out.stat().st_size / 1e6:.2f} MB: {args.out}")


if __name__ == "__main__":
    main()
