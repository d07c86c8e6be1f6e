"""Nothing that labels a picture may lose it: every text has a label, a file name and a place in a sheet."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from cogview import labels
from cogview.emoji import emoji_texts, load_emoji
from cogview.labels import LINE, file_name, label, printable
from cogview.pictures import MAX_SIDE, contact_sheet, curves, format_of, save_image
from cogview.progress import _Lines, progress

NASTY = [
    "two\nlines",
    "a\rb\r\nc\td\x0be\u2028f",
    "nul \0 inside",
    "zero\u200bwidth\ufeff\u2060",
    "\u202eevil\u202c \u2066bidi\u2069",
    "שלום עולם",
    "الثعلب فوق الشجرة",
    "Z\u0300\u0301\u0302\u0303\u0304\u0305\u0306algo" * 9,
    "\u0301 begins with an accent",
    "สวัสดี हिन्दी 한국어 ひらがな 𓀀 \U000f0000",
    "half \ud83d of a pair",
    "🦊 above 🌳, 👨‍👩‍👧 👍🏽 ❤ 1️⃣ 🇩🇪",
    "$x_1$ \\frac{ _a [red] :smile: {0} %s",
    "word " * 1000,
    "w" * 300,
    "蓝色背景上，熊猫在星星左边。" * 40,
    "",
    " \n ",
]


def ink(image: Image.Image) -> np.ndarray:
    """bool [H, W]: what is not white."""
    return (np.asarray(image) < 128).any(-1)


@pytest.fixture(params=["raqm", "basic"])
def layout(request, monkeypatch):
    """With Raqm, where it is there, and as if it were missing."""
    if request.param == "basic":
        basic = ImageFont.Layout.BASIC
        faces = {n: ImageFont.truetype(str(f), 13, layout_engine=basic) for n, f in enumerate(labels.FONTS)}
        monkeypatch.setattr(labels, "_face", lambda font, layout=None: faces[font])


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("text", NASTY, ids=[str(n) for n in range(len(NASTY))])
def test_every_text_is_drawn(text):
    """Of a text that is there something can be seen, in at most three lines, and none of it fails."""
    image = labels._draw(labels._wrap(labels._pieces(printable(text)), 200, 3), 200)
    assert image.width == 200
    assert image.height in (LINE, 2 * LINE, 3 * LINE)
    assert ink(image).any() == bool(text.strip())
    assert np.array_equal(np.asarray(image), np.asarray(label(text, 200)))


def test_printable():
    assert printable("two\r\nlines \t and\u2028more\x1c") == "two lines and more"
    assert printable("a\0b\u200bc\u202ed\ufeffe\x7f") == "abcde"
    assert printable("half \ud83d, whole \ud83e\udd8a") == "half \ufffd, whole 🦊"
    assert printable("cafe\u0301") == "café"
    assert printable("[red] $x$") == "[red] $x$"


def lines_of(text: str, width: int = 200, most: int = 3) -> list[str]:
    return ["".join(piece.text for piece in line) for line in labels._wrap(labels._pieces(text), width, most)]


def test_lines_break_between_words_and_anywhere_in_chinese():
    assert lines_of("a fox above a tree on a green background") == ["a fox above a tree on a green", "background"]
    chinese = "蓝色背景上，熊猫在星星左边还有一只红色狐狸"
    assert lines_of(chinese) == [chinese[:15], chinese[15:]]
    assert lines_of("一二三四五六七八九十一二三四五。六")[1][0] == "五"  # the full stop ends no line's beginning
    long = lines_of("x" * 300)
    assert "".join(long) == "x" * (len("".join(long)) - 1) + "…"
    assert [len(line) for line in long][:2] == [len(long[0])] * 2
    words = lines_of("several words of a caption " * 20)
    assert len(words) == 3
    assert words[2].endswith("…")
    assert words[2][:-1].split()[-1] in ["several", "words", "of", "a", "caption"]
    assert all(label("x" * 300, width).size == (width, 3 * LINE) for width in (1, 8, 500))


def test_emoji_are_pictures_and_what_nobody_has_is_a_box():
    fox = load_emoji(["1f98a"])["1f98a"].image.resize((15, 15), Image.Resampling.LANCZOS)
    expected = Image.new("RGB", (15, 15), "white")
    expected.paste(fox, (0, 0), fox)
    drawn = label("🦊", 40).crop((1, 1, 16, 16))
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))
    pieces = labels._pieces("👍🏽❤️❤👨‍👩‍👧©1")
    assert [piece.emoji for piece in pieces] == ["1f44d", "2764-fe0f", "2764-fe0f", emoji_texts()["👨‍👩‍👧"], "", ""]
    assert [piece.font for piece in labels._pieces("a蓝Жש한")] == [0, 0, 1, 1, None]
    box = ink(label("한", 40))
    assert box.sum() == 2 * (7 + 8)  # the outline of a rectangle
    assert labels._pieces("Ａ")[0].text == "A"


@pytest.mark.usefixtures("layout")
def test_right_to_left_is_drawn_so():
    """Aleph, the first letter, stands right of Beth."""
    both, aleph = ink(label("אב", 60)), ink(label("א", 60))
    columns = np.flatnonzero(both.any(0))
    width = np.flatnonzero(aleph.any(0))
    last = both[:, columns[-1] - (width[-1] - width[0]) : columns[-1] + 1]
    assert np.array_equal(last, aleph[:, width[0] : width[-1] + 1])


def test_file_names():
    assert file_name("a fox above a tree") == "a-fox-above-a-tree"
    assert file_name("../../etc/passwd\0\n~*?:<>|") == "etc-passwd"
    assert file_name("蓝色背景上，熊猫") == "蓝色背景上-熊猫"
    assert file_name("हिन्दी สวัสดี CAFÉ") == "हिन्दी-สวัสดี-café"
    assert file_name("🦊 …") == ""
    assert len(file_name("word " * 100).encode()) <= 60
    assert len(file_name("漢" * 100).encode()) <= 60
    assert file_name("one two " * 20).endswith("two")
    for text in NASTY:
        assert not set(file_name(text)) & set('/\\\0\n\r\t .:*?"<>|$[]')


def pictures(count: int, side: int = 8) -> list[torch.Tensor]:
    """In colours that no label has."""
    colours = torch.tensor([[255, n, 255] for n in range(count)], dtype=torch.uint8)
    return list(colours[:, :, None, None].expand(count, 3, side, side))


def places(image: Image.Image, number: int) -> np.ndarray:
    """[M, 2]: row and column of the pixels that are of picture `number`."""
    return np.argwhere((np.asarray(image) == (255, number, 255)).all(-1))


def test_a_sheet_has_every_picture_where_it_belongs(tmp_path):
    rows = [(text, pictures(2)) for text in NASTY]
    assert contact_sheet(rows, tmp_path / "sheet.png", columns=4, zoom=2, note="a note\nof two lines") == len(NASTY)
    with Image.open(tmp_path / "sheet.png") as sheet:
        first, second = places(sheet, 0), places(sheet, 1)
    assert len(first) == len(second) == 256 * len(NASTY)
    assert np.array_equal(first + np.array([0, 18]), second)  # beside it


def test_many_pictures_of_a_caption_make_rows_and_many_captions_end_at_a_limit(tmp_path):
    contact_sheet([("many", pictures(6) * 4)], tmp_path / "sheet.png", zoom=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 200
        assert len(places(sheet, 0)) == 256 * 4
    rows = [("x", pictures(1, 300))] * 60
    shown = contact_sheet(rows, tmp_path / "long.png", columns=1, zoom=1)
    with Image.open(tmp_path / "long.png") as sheet:
        assert sheet.height <= MAX_SIDE
    assert shown == (MAX_SIDE - 10) // (300 + 2 + LINE + 10)
    with pytest.raises(ValueError, match="rows: expected at least one captioned picture"):
        contact_sheet([], tmp_path / "none.png")


def test_a_label_that_fails_is_replaced(tmp_path, monkeypatch):
    """By a number, or if that fails too by nothing; the pictures are on the sheet."""

    def fails(*_, **__):
        raise OSError("raqm_layout() failed")

    monkeypatch.setattr(labels, "_pieces", fails)
    plain = label("a fox", 100, instead="caption 7")
    assert ink(plain).any()
    assert not np.array_equal(np.asarray(plain), np.asarray(label("a fox", 100, instead="caption 8")))
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", fails)
    assert contact_sheet([("a fox", pictures(1))], tmp_path / "sheet.png", zoom=2) == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(places(sheet, 0)) == ink(sheet).sum() == 256


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"),
                                              ("bmp", "BMP"), ("gif", "GIF"), ("tiff", "TIFF")])  # fmt: skip
def test_the_format_is_that_of_the_name(tmp_path, suffix, kind):
    save_image(Image.new("RGB", (16, 16), (200, 30, 30)), tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.format == kind
        assert np.abs(np.asarray(image.convert("RGB"), int) - (200, 30, 30)).max() < 4


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.svg", "a.pdf"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"out: expected a name that ends in \.png, \.jpg, .*, got"):
        format_of(name)
    with pytest.raises(ValueError, match="out: expected a name"):
        contact_sheet([("a", pictures(1))], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_names_of_curves_are_shown_as_they_are(tmp_path):
    """Neither as formulas nor left out for an underscore; a glyph that is missing is no warning."""

    def legend(name: str) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = curves([(f"loss of {name}", {name: ([1.0, 2.0], [3.0, 4.0])}), ("", {})], tmp_path / "c.png")
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))

    seen = [legend(name) for name in ("_a", "a", "$x^2$", "x^2", "$\\frac{", "蓝色", "🦊\n", "한")]
    for n, one in enumerate(seen):
        assert not any(np.array_equal(one, other) for other in seen[:n])
    with pytest.raises(ValueError, match="panels: expected at least one"):
        curves([], tmp_path / "c.png")


def test_progress_shows_titles_as_they_are(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr("rich._console", console)
    with progress("tokenising [red]") as update:
        update(1.0, "[/nothing] [bold]")
    assert "tokenising [red]" in console.file.getvalue()
    assert "[/nothing] [bold]" in console.file.getvalue()


def test_progress_lines_end_with_one_that_says_more(monkeypatch):
    """Where there is no terminal; what was printed a moment before is not printed again."""
    console = Console(file=io.StringIO(), width=20)
    monkeypatch.setattr("rich._console", console)
    monkeypatch.setattr("time.monotonic", lambda: 5.0)
    lines = _Lines(console, "drawing", 4.0)
    for done, note in ((1, "a"), (1, "a"), (4, "b"), (4, "b")):
        lines.update(done, note)
        lines.print()
    assert console.file.getvalue().splitlines() == ["drawing: 25%, 0:00 gone, a", "drawing: 100%, 0:00 gone, b"]
