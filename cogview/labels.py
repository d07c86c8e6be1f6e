"""Captions where people see them: beside pictures, in lines of text, in file names. Any text has a label.

Letters come from captions.otf (Latin, common Chinese), else from DejaVu Sans, which matplotlib brings; emoji are
pictures; what nobody has is a box.
"""

import contextlib
import os
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from cogview.emoji import emoji_texts, load_emoji

FONTS = (
    Path(__file__).parent / "assets" / "captions.otf",
    Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf",
)
LINE, INK = 17, (40, 40, 40)  # pixels from line to line
_SIZE, _BASE, _EMOJI, _BOX = 13, 13, 15, 8
_LONGEST = 2000  # characters that are looked at; far more than a label holds
_MARKS = 2  # accents kept on a letter, so that none reaches other lines
_KEPT = "\u200d\ufe0f"  # joiners of emoji
_IN_NAMES = ("Ll", "Lm", "Lo", "Lt", "Lu", "Mc", "Mn", "Nd", "Nl", "No")
_CLOSING = "’”)]}》〉」』】〕…"  # and all other punctuation that does not open: never begin a line


def printable(text: str) -> str:
    """One line: blanks of any kind become one space, control and format characters go, half pairs become U+FFFD."""
    text = text[:_LONGEST].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    kept = (c for c in unicodedata.normalize("NFC", text) if c.isspace() or c in _KEPT or _is_visible(c))
    return " ".join("".join(kept).split())


def file_name(text: str) -> str:
    """A short piece of a file name: the letters and digits of any script, with hyphens between. May be empty."""
    kept = (c if unicodedata.category(c) in _IN_NAMES else " " for c in printable(text).lower() if c not in _KEPT)
    words = "-".join("".join(kept).split())
    short = words.encode()[:60].decode(errors="ignore").rstrip("-")
    if len(short) < len(words) and "-" in short:
        short = short.rpartition("-")[0]  # of whole words
    try:
        os.fsencode(short)
    except UnicodeEncodeError:  # a file system of ASCII names
        return re.sub(r"[^a-z0-9]+", "-", short).strip("-")
    return short


def label(text: str, width: int, *, instead: str = "", lines: int = 3) -> Image.Image:
    """A white picture, `width` pixels wide, of at most so many lines of a text, with … where it is longer.

    Labels are the least part of a sheet: where a text cannot be drawn, `instead` is, plainly.
    """
    with contextlib.suppress(Exception):
        return _draw(_wrap(_pieces(printable(text)), width, lines), width)
    image = Image.new("RGB", (width, LINE), "white")
    with contextlib.suppress(Exception):
        ImageDraw.Draw(image).text((0, 2), instead, INK)
    return image


class Piece(NamedTuple):
    """What is never broken: a letter with its accents, or an emoji."""

    text: str
    width: float
    font: int | None = None
    """Of FONTS; None: a box."""
    emoji: str = ""
    """Its codepoints."""

    @property
    def right_to_left(self) -> bool:
        return unicodedata.bidirectional(self.text[0]) in ("R", "AL")


def _is_tag(character: str) -> bool:
    return "\U000e0020" <= character <= "\U000e007f"  # of flags


def _is_visible(character: str) -> bool:
    selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return _is_tag(character) or not (selector or unicodedata.category(character) in ("Cc", "Cf"))


@cache
def _characters(font: int) -> frozenset[str]:
    return frozenset(map(chr, FT2Font(str(FONTS[font])).get_charmap()))


@cache
def _face(font: int, layout: ImageFont.Layout = ImageFont.Layout.BASIC) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS[font]), _SIZE, layout_engine=layout)


@cache
def _letter(text: str) -> Piece:
    fonts = (1, 0) if text in "“”‘’" else (0, 1)  # captions.otf has them as wide as Chinese
    for font in fonts:
        if set(text) <= _characters(font):
            return Piece(text, _face(font).getlength(text[0]), font)
    simpler = text[0] if len(text) > 1 else unicodedata.normalize("NFKC", text)  # no accents; plain letters
    return _letter(simpler) if simpler != text else Piece(text, _BOX + 2)


@cache
def _longest_emoji() -> int:
    return max(map(len, emoji_texts()))


def _emoji_at(text: str, place: int) -> str:
    """The longest text of an emoji that begins at a place, or none."""
    texts = emoji_texts()
    ends = range(place + _longest_emoji(), place, -1)
    return next((text[place:end] for end in ends if text[place:end] in texts), "")


def _pieces(text: str) -> list[Piece]:
    pieces, place = list[Piece](), 0
    while place < len(text):
        if emoji := _emoji_at(text, place):
            pieces.append(Piece(emoji, _EMOJI + 2, emoji=emoji_texts()[emoji]))
            place += len(emoji)
            continue
        character, place = text[place], place + 1
        tone = "\U0001f3fb" <= character <= "\U0001f3ff" and pieces and pieces[-1].emoji  # the pictures have none
        if tone or character in _KEPT or _is_tag(character):
            continue
        marks = ""
        while place < len(text) and unicodedata.category(text[place]) in ("Mn", "Me"):
            marks, place = marks + text[place], place + 1
        pieces.append(_letter(character + marks[:_MARKS]))
    return pieces


def _may_break(before: Piece, after: Piece) -> bool:
    """Between words, and around Chinese and emoji, but not before what closes."""
    if before.text == " ":
        return True
    kind = unicodedata.category(after.text[0])
    if after.text[0] in _CLOSING or (kind.startswith("P") and kind not in ("Ps", "Pi")):
        return False
    wide = (unicodedata.east_asian_width(piece.text[0]) in "WF" or bool(piece.emoji) for piece in (before, after))
    return any(wide) and unicodedata.category(before.text[0]) not in ("Ps", "Pi")


def _fill(pieces: list[Piece], start: int, width: float) -> int:
    """The first piece from `start` on that does not fit; at least one does."""
    end, used = start, 0.0
    while end < len(pieces) and (used := used + pieces[end].width) <= width:
        end += 1
    return max(end, start + 1)


def _wrap(pieces: list[Piece], width: int, most: int) -> list[list[Piece]]:
    lines, start = list[list[Piece]](), 0
    while start < len(pieces):
        end = _fill(pieces, start, width)
        if end < len(pieces) and len(lines) == most - 1:
            ellipsis = _letter("…")
            end = _fill(pieces, start, width - ellipsis.width)
            whole_words = range(end, max(start, end - 12), -1)  # unless that is a large part of the line
            end = next((n for n in whole_words if _may_break(pieces[n - 1], pieces[n])), end)
            while end > start + 1 and pieces[end - 1].text == " ":
                end -= 1
            return [*lines, [*pieces[start:end], ellipsis]]
        if end < len(pieces) and pieces[end].text != " ":
            end = next((n for n in range(end, start, -1) if _may_break(pieces[n - 1], pieces[n])), end)
        blank = end < len(pieces) and pieces[end].text == " "
        ends = end > start + 1 and pieces[end - 1].text == " "
        lines.append(pieces[start : end - ends])
        start = end + blank
    return lines


def _draw(lines: list[list[Piece]], width: int) -> Image.Image:
    image = Image.new("RGB", (width, LINE * max(1, len(lines))), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        x, top = 0.0, LINE * number
        for run in _runs(line):
            first = run[0]
            if first.emoji:
                small = load_emoji([first.emoji])[first.emoji].image.resize((_EMOJI, _EMOJI), Image.Resampling.LANCZOS)
                image.paste(small, (round(x) + 1, top + 1), small)
                x += first.width
            elif first.font is None:
                draw.rectangle((x + 1, top + _BASE - _BOX - 1, x + _BOX - 1, top + _BASE), outline=INK)
                x += first.width
            else:
                x += _write(draw, (x, top + _BASE), run)
    return image


def _runs(line: list[Piece]) -> list[list[Piece]]:
    """Letters of one font and direction together; blanks between words from right to left belong to them."""
    runs = list[list[Piece]]()
    for place, piece in enumerate(line):
        turns = piece.right_to_left or (
            piece.text == " "
            and bool(runs)
            and runs[-1][0].right_to_left
            and place + 1 < len(line)
            and line[place + 1].right_to_left
        )
        alone = piece.emoji or piece.font is None
        same = runs and not alone and runs[-1][0].right_to_left == turns
        if same and not runs[-1][0].emoji and (runs[-1][0].font == piece.font or (turns and piece.text == " ")):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], run: list[Piece]) -> float:
    """Draws a run on its base line; how wide it is."""
    text, font = "".join(piece.text for piece in run), run[0].font or 0
    if run[0].right_to_left:
        with contextlib.suppress(Exception):  # Raqm joins Arabic letters; it may be missing, and fail on odd texts
            face = _face(font, ImageFont.Layout.RAQM)
            length = face.getlength(text, direction="rtl")
            draw.text(place, text, INK, face, anchor="ls", direction="rtl")
            return length
        text = "".join(piece.text for piece in reversed(run))
    draw.text(place, text, INK, _face(font), anchor="ls")
    return _face(font).getlength(text)
