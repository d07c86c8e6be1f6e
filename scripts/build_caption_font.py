"""Builds cogview/assets/captions.otf: the Latin and common Chinese part of Noto Sans CJK SC.

Needs Debian's fonts-noto-cjk and fonttools (which matplotlib brings). The characters: ASCII, Latin-1, Chinese
punctuation, the 3,755 of GB 2312 level 1, and those of the shipped emoji's names.
"""

from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTCollection

from cogview.emoji import load_emoji

SOURCE = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc")
TARGET = Path(__file__).parent.parent / "cogview" / "assets" / "captions.otf"


def characters() -> str:
    level_1 = bytes(b for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF) for b in (row, cell))
    latin = "".join(map(chr, [*range(0x20, 0x7F), *range(0xA0, 0x100)]))
    names = "".join(e.zh for e in load_emoji().values())
    return latin + "，。！？：；、（）《》“”" + level_1.decode("gb2312", "ignore") + names


def main() -> None:
    fonts = TTCollection(SOURCE).fonts
    font = next(f for f in fonts if f["name"].getDebugName(1) == "Noto Sans CJK SC")
    options = subset.Options(layout_features=[], hinting=False, desubroutinize=False, notdef_outline=True)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=characters())
    subsetter.subset(font)
    font["head"].modified = font["head"].created  # the same bytes every time
    font.recalcTimestamp = False
    font.save(TARGET)
    print(f"{TARGET.name}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
