"""Which captions a pair has, and what is said of the others."""

import json

import numpy as np
import pytest
from PIL import Image

from cogview.data.captions import read_captions
from cogview.data.shards import PairDataset, ShardWriter
from tests.test_data_shards import picture, raw_tar

ALL = ("caption", "en", "zh")


def found(as_json=None, as_text=None, languages=ALL):
    as_json = json.dumps(as_json).encode() if isinstance(as_json, (dict, list)) else as_json
    return read_captions(as_json, as_text, languages)


def test_only_the_fields_asked_for_are_captions_in_their_order():
    fields = {"id": "7", "url": "x.org", "zh": "红", "en": " red ", "width": 3, "caption": "a red one"}
    captions = found(fields)
    assert list(captions.found.items()) == [("caption", "a red one"), ("en", "red"), ("zh", "红")]
    assert captions.others == ("id", "url")
    assert list(found(fields, languages=("zh", "id")).found.items()) == [("zh", "红"), ("id", "7")]
    assert found({"id": "ab", "xx": "no"}).found == {}


def test_the_text_file_is_a_caption_whatever_the_json_has():
    assert found({"id": "1"}, b"a fox").found == {"caption": "a fox"}
    assert found({"caption": "a fox\n"}, b"a fox").found == {"caption": "a fox"}
    both = found({"caption": "one", "en": "two"}, b"three").found
    assert list(both.items()) == [("caption", "three"), ("caption.json", "one"), ("en", "two")]
    assert found({"caption": "one", "en": "two"}, b"three", ("en",)).found == {"en": "two"}
    assert found({"caption": "one"}, b"\xff").found == {"caption": "one"}
    assert found(b"{", b"three").found == {"caption": "three"}


def test_several_captions_of_a_language():
    three = {"caption": "a", "caption.2": "b", "caption.3": "c"}
    for fields in (
        {"caption": ["a", "b", "a", " c "]},
        {"captions": ["a", "b", "c"]},
        {"captions": ["b", "c"], "caption": "a"},
        {"caption.2": "b", "caption": "a", "caption.3": "c", "caption.5": "no"},  # as pack names them
    ):
        for languages in (("caption",), ("caption", "caption.2", "caption.3")):
            captions = found(fields, languages=languages)
            assert list(captions.found.items()) == list(three.items())
            assert captions.problems == []
    mixed = found({"en": ["a", 3, "", {"x": 1}, "b"], "caption": [["no"]], "zh": "二", "tags": ["x"], "ids": [1]})
    assert mixed.found == {"en": "a", "en.2": "b", "zh": "二"}
    assert mixed.problems == [
        ("caption is no text", '"caption"[0]: expected text, got a list'),
        ("caption is no text", '"en"[1]: expected text, got a number'),
        ("blank caption", '"en"[2]'),
        ("caption is no text", '"en"[3]: expected text, got an object'),
    ]
    assert mixed.others == ("tags",)
    beside = found({"caption": ["one", "three", "two"]}, b"three").found
    assert list(beside.items()) == [("caption", "three"), ("caption.json", "one"), ("caption.3", "two")]
    assert found({"captions": ["a"]}, languages=("en",)).others == ("captions",)


def test_several_captions_come_with_the_pair(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("0", {"png": picture(0), "json": b'{"captions": ["one", "two"], "caption": "zero"}'})
    data = PairDataset([tmp_path / "a.tar"], languages=("caption",))
    assert list(data[0].captions.values()) == ["zero", "one", "two"]
    assert not data.report.counts


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_it(encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    assert found(as_text=mark + "ein Bär 熊\n".encode(encoding)).found == {"caption": "ein Bär 熊"}
    assert found(mark + '{"en": "\ufeffBär"}'.encode(encoding)).found == {"en": "Bär"}


@pytest.mark.parametrize(
    ("as_json", "as_text", "kind", "detail"),
    [
        (b'{"en": "half \\ud83d", "zh": "ok"}', None, "caption not valid Unicode", '"en": '),
        (b'{"en": "a\xff", "zh": "ok"}', None, "caption not valid Unicode", '"en": not UTF-8: byte 0xff at position 1'),
        (b'{"en": "a\\u0000b", "zh": "ok"}', None, "caption not valid Unicode", '"en": NUL at position 1'),
        (b'{"zh": "ok"}', b"caf\xe9", "caption not valid Unicode", ".txt: "),
        (b'{"zh": "ok"}', b"\xff\xfea", "caption not valid Unicode", ".txt: "),
        (b'{"zh": "ok"}', b"\xff\xfe\x3d\xd8", "caption not valid Unicode", ".txt: "),
        (b'{"zh": "ok", "en": [["a", "b"]]}', None, "caption is no text", '"en"[0]: expected text, got a list'),
        (b'{"zh": "ok", "en": [null]}', None, "caption is no text", '"en"[0]: expected text, got null'),
        (b'{"zh": "ok", "en": []}', None, "blank caption", '"en"'),
        (b'{"zh": "ok", "en": NaN}', None, "caption is no text", '"en": expected text, got a number'),
        (b'{"zh": "ok", "en": {"a": 1}}', None, "caption is no text", '"en": expected text, got an object'),
        (b'{"zh": "ok", "en": " \\t\\n"}', None, "blank caption", '"en"'),
        ('{"zh": "ok", "en": "\u200b\u200d\u2060\ufeff\ufe0f\u3164"}'.encode(), None, "blank caption", '"en"'),
        (b'{"zh": "ok"}', b"", "blank caption", ".txt"),
        (b'{"zh": "ok"}', b"\xff\xfe", "blank caption", ".txt"),
    ],
)
def test_a_caption_that_cannot_be_used_leaves_the_others(as_json, as_text, kind, detail):
    captions = found(as_json, as_text)
    assert captions.found == {"zh": "ok"}
    assert [(k, d[: len(detail)]) for k, d in captions.problems] == [(kind, detail)]


@pytest.mark.parametrize(
    ("as_json", "detail"),
    [
        (b"{", ""),
        (b"", ""),
        (b'["a"]', "expected an object, got a list"),
        (b"NaN", "expected an object, got a number"),
        (b"null", "expected an object, got null"),
        (b'{"en": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"en": ' + b"1" * 5000 + b"}", ""),
    ],
)
def test_json_that_is_none(as_json, detail):
    captions = found(as_json, b"text")
    assert captions.found == {"caption": "text"}
    assert [kind for kind, _ in captions.problems] == ["JSON not readable"]
    assert captions.problems[0][1].startswith(detail)


def test_what_is_there_stays_as_it_is():
    for text in ("👩\u200d🚀", "❤\ufe0f", "שלום", "two\nlines", "a\tb", "\U0001fae8"):
        assert found({"en": f" {text}\r\n"}).found == {"en": text}
    assert found({"en": None, "zh": "ok", "score": float("nan")}).problems == []


def test_captions_are_read_without_pictures(tmp_path, monkeypatch):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("0", {"png": picture(0), "json": b'{"en": "zero", "title": "t"}'})
        writer.write("1", {"png": b"no picture", "txt": b"one"})
        writer.write("2", {"png": picture(2), "json": b'{"title": "two", "url": "x"}'})
    data = PairDataset([tmp_path / "a.tar"])
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # would fail if it were called
        for _ in range(2):
            assert [data.captions(i) for i in range(3)] == [{"en": "zero"}, {"caption": "one"}, None]
    assert data.report.counts == {"sample without caption": 1}
    problem = data.report.problems[0]
    assert problem.where == "a.tar:2"
    assert problem.detail == "none in caption, en, zh; other fields with text: title, url"
    titles = PairDataset([tmp_path / "a.tar"], languages=["title"])
    assert [titles.captions(i) for i in range(3)] == [{"title": "t"}, None, {"title": "two"}]
    for languages in ([], "en", [""]):
        with pytest.raises(ValueError, match="languages: expected a non-empty list"):
            PairDataset([tmp_path / "a.tar"], languages=languages)


def test_a_caption_file_that_is_too_large_leaves_the_other(tmp_path):
    members = [("0.png", picture(0)), ("0.json", b" " * (1 << 20) + b"{}"), ("0.txt", b"text")]
    data = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    assert data.captions(0) == {"caption": "text"}
    assert data.report.counts == {"caption file not readable": 1}


def test_pictures_come_in_order_whoever_decodes_them(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number in range(40):
            image = b"no picture" if number % 7 == 3 else picture(number, (9, 12))
            writer.write(f"{number:02d}", {"png": image, "json": b"{}"})
    expected = [i for i in range(40) if i % 7 != 3]
    for threads in (1, 3, None):
        data = PairDataset([tmp_path / "a.tar"])
        pictures = dict(data.pictures(8, threads=threads))
        assert list(pictures) == expected  # those without captions too
        assert all(np.array_equal(p, np.full((3, 8, 8), [[[i]], [[0]], [[7]]])) for i, p in pictures.items())
        assert [p.where for p in data.report.problems] == [f"a.tar:{i:02d}" for i in range(3, 40, 7)]
        assert [i for i, _ in data.pictures(8, range(5, 12), threads=threads)] == [5, 6, 7, 8, 9, 11]
        assert data.report.counts == {"picture not readable": 6}  # each once
    with pytest.raises(ValueError, match="threads: expected at least 1"):
        data.pictures(8, threads=0)


def test_pictures_are_read_a_bounded_number_ahead(tmp_path, monkeypatch):
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number in range(60):
            writer.write(f"{number:02d}", {"png": picture(number), "txt": b"x"})
    data, read = PairDataset([tmp_path / "a.tar"]), []
    get = PairDataset.picture_bytes
    monkeypatch.setattr(PairDataset, "picture_bytes", lambda self, i: (read.append(i), get(self, i))[1])
    pictures = data.pictures(8, threads=2)
    for _ in range(3):
        next(pictures)
    pictures.close()
    assert 3 <= len(read) <= 3 + 4 * 2
