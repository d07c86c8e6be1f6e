"""Builds cogview/assets/styles.tar, 200 things drawn by three other hands, and people.tar, people at work.

    npm pack @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji-high-contrast
    # unpack each beside the others, in folders of these names (noto-v1, …)
    pip install resvg_py && python scripts/build_icon_shards.py FOLDER

The things are in cogview/assets/emoji.tar as well, which has their Chinese names. The bytes depend on the packages,
resvg and Pillow's WebP encoder alone. Licences: cogview/assets/NOTICE.md.
"""

import argparse
import io
import json
import re
from pathlib import Path

import resvg_py  # type: ignore[import-not-found]
from PIL import Image

from cogview.data.files import written_beside
from cogview.data.shards import ShardWriter
from cogview.emoji import Emoji, load_emoji

STYLES = {"blob": "noto-v1", "flat": "fluent-emoji-flat", "contrast": "fluent-emoji-high-contrast"}
LICENCES = {"noto-v1": "Apache-2.0", "fluent-emoji-flat": "MIT", "fluent-emoji-high-contrast": "MIT"}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("man", "woman")
INK = "#303030"  # of icons of one colour
THINGS = """
    airplane ambulance anchor ant avocado backpack bacon balloon banana bank baseball basketball bat battery bear
    bed bell bicycle bikini bird boar bomb books bouquet bread briefcase bug burrito bus butterfly cactus camel
    camera candle candy carrot castle cherries chicken chipmunk church cloud cookie crab crocodile croissant crown
    cucumber dagger deer desert dolphin door doughnut dove dragon dress drum duck eagle ear egg eggplant elephant
    envelope eye factory fire fireworks fish flashlight fountain fox frog gear ghost glasses goat gorilla grapes
    guitar hamburger hammer hamster handbag headphone helicopter herb hibiscus honeybee hospital hotel house jeans
    joystick key keyboard kimono koala laptop lemon leopard lion lipstick lizard locomotive lollipop megaphone melon
    microphone microscope monkey motorcycle mountain mouse mushroom necktie newspaper notebook octopus owl ox
    package panda paperclip peach peanuts pear penguin pill pineapple pizza popcorn postbox potato poodle purse
    pushpin rabbit radio rainbow rat rhinoceros ribbon ring robot rocket rooster rose sailboat satellite saxophone
    scissors scorpion scroll seedling shark shield shrimp skull snail snake snowflake snowman spaghetti spider spoon
    squid stopwatch strawberry sunflower sunglasses sushi taco taxi telephone telescope tent thermometer ticket
    tiger toilet tomato tractor tram trophy trumpet tulip turkey turtle umbrella unicorn violin volcano volleyball
    watch watermelon whale wolf wrench
""".split()  # noqa: SIM905
WORK = """
    artist astronaut construction-worker cook detective factory-worker farmer firefighter guard health-worker judge
    mechanic office-worker pilot police-officer scientist singer student teacher technologist
""".split()  # noqa: SIM905


def icons(folder: Path, name: str) -> dict:
    """An icon set; ValueError where its licence is not the one that the notice tells."""
    info = json.loads((folder / name / "info.json").read_text(encoding="utf-8"))
    if (found := info["license"]["spdx"]) != LICENCES[name]:
        raise ValueError(f"{name}: expected licence {LICENCES[name]}, got {found}")
    return json.loads((folder / name / "icons.json").read_text(encoding="utf-8"))


def drawn(icon_set: dict, name: str, size: int, quality: int) -> bytes:
    """An icon as WebP with transparency."""
    icon = icon_set["icons"][name]
    side = icon_set.get("height", 16)  # as Iconify's format has it
    width, height = (icon.get(name, icon_set.get(name, side)) for name in ("width", "height"))
    body = icon["body"].replace("currentColor", INK)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * size, height=4 * size))))
    image = image.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=quality, alpha_quality=60, method=6)
    return encoded.getvalue()


def named(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the three packages, unpacked")
    parser.add_argument("--out", type=Path, default=Path("cogview/assets"))
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--quality", type=int, default=80, help="of WebP, 1 to 100")
    args = parser.parse_args()
    known: dict[str, Emoji] = {named(emoji.en): emoji for emoji in load_emoji().values()}
    sets = {style: icons(args.folder, name) for style, name in STYLES.items()}

    def write(path: Path, rows: list[tuple[str, dict, str, dict[str, str]]]) -> None:
        with written_beside(path) as beside, ShardWriter(beside) as shard:
            for key, icon_set, icon, about in rows:
                contents = json.dumps(about, ensure_ascii=False).encode()
                shard.write(key, {"webp": drawn(icon_set, icon, args.size, args.quality), "json": contents})
        print(f"{len(rows)} pictures, {path.stat().st_size / 1e6:.2f} MB: {path}")

    write(
        args.out / "styles.tar",
        [
            (f"{style}-{thing}", sets[style], thing, {"style": style, "codepoints": known[thing].codepoints})
            for style in STYLES
            for thing in THINGS
        ],
    )
    write(
        args.out / "people.tar",
        [
            (
                f"{gender}-{work}-{tone}",
                sets["flat"],
                f"{gender}-{work}-{tone}",
                {"gender": gender, "work": work, "tone": tone},
            )
            for work in WORK
            for gender in GENDERS
            for tone in TONES
        ],
    )


if __name__ == "__main__":
    main()
