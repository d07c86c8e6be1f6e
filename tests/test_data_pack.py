"""`cogview data pack`: a folder of captioned pictures becomes shards, and what is left out is named."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from cogview.cli import main
from cogview.data.images import MAX_BYTES
from cogview.data.pack import Packed, pack
from cogview.data.shards import PairDataset
from tests.test_data_shards import picture, raw_tar


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(("a.1.png", "deep/b c.png", "deep/er/ä.png", "d.png")):
        (folder / name).write_bytes(picture(number))
    return folder


def packed(folder: Path, out: Path, **options) -> tuple[Packed, list[tuple[str, dict, dict]]]:
    """What `pack` says, and of every pair key, captions and JSON."""
    result = Packed()
    pack(folder, out, lambda done, note=None: None, result, **options)
    data = PairDataset(result.shards, languages=result.fields)
    assert not data.report.counts
    pairs = [(pair.key, pair.captions) for pair in data.readable()]
    jsons = []
    for path in result.shards:
        with tarfile.open(path) as tar:
            jsons += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    assert len(pairs) == len(jsons) == result.pairs
    return result, [(key, captions, fields) for (key, captions), fields in zip(pairs, jsons, strict=True)]


def names(pairs) -> dict[str, dict]:
    return {fields["name"]: captions for _, captions, fields in pairs}


def table(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder.parent / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


CSV = 'file_name,caption\na.1.png,one\ndeep/b c.png,"two, and more"\ndeep/er/ä.png,three 熊\n'
EXPECTED = {
    "a.1.png": {"caption": "one"},
    "deep/b c.png": {"caption": "two, and more"},
    "deep/er/ä.png": {"caption": "three 熊"},
}


TABLES = {
    "plain": CSV.encode(),
    "mark": CSV.encode("utf-8-sig"),
    "utf-16": CSV.encode("utf-16"),
    "windows": CSV.replace("\n", "\r\n").encode(),
    "empty": CSV.replace("\n", "\n\n , \n").encode(),
    "semicolons": CSV.replace(",", ";").replace("two; and", "two, and").encode(),
    "excel": ("sep=;\r\n" + CSV.replace(",", ";").replace("two; and", "two, and")).encode(),
    "tabs": CSV.replace(",", "\t").replace("two\t and", "two, and").encode(),
    "names": CSV.replace("file_name,caption", " Image ,TEXT,id").encode(),
    "backslashes": CSV.replace("deep/b", ".\\deep\\b").encode(),
    "decomposed": CSV.replace("ä", "a\u0308").encode(),
    "trailing": CSV.replace("\n", ",\n").encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_programs_write_them(folder, tmp_path, kind):
    result, pairs = packed(folder, tmp_path / "out", captions=table(folder, TABLES[kind]))
    assert names(pairs) == EXPECTED
    assert [key for key, _, _ in pairs] == ["00000000", "00000001", "00000002"]
    assert result.report.counts == {"picture that the table does not name": 1}
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.extractfile("00000001.png").read() == (folder / "deep" / "b c.png").read_bytes()


def test_a_quote_that_is_left_open(folder, tmp_path):
    rows = 'file_name,caption\na.1.png,"a 5"" pipe"\nd.png,a 7" pipe\ndeep/b c.png,"open\ndeep/er/ä.png,three\n'
    result, pairs = packed(folder, tmp_path / "out", captions=table(folder, rows))
    assert names(pairs) == {
        "a.1.png": {"caption": 'a 5" pipe'},
        "d.png": {"caption": 'a 7" pipe'},
        "deep/er/ä.png": {"caption": "three"},
    }
    assert [tuple(problem) for problem in result.report.problems] == [
        ("quote not closed", "table.csv:4", "in the row of deep/b c.png; the lines behind it are rows"),
        ("picture that the table does not name", "deep/b c.png", "table.csv"),
    ]
    lines = 'file_name,caption\na.1.png,"one\nof two\nlines"\n'
    assert names(packed(folder, tmp_path / "two", captions=table(folder, lines))[1])["a.1.png"] == {
        "caption": "one\nof two\nlines"
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ['9.png,"nine"', "9.png,nine"])  # another quote closes it, or nothing
def test_an_open_quote_swallows_no_rows(tmp_path, end, last):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = ["image,caption", '0.png,"two', 'lines, of one"', "", *(f"{k}.png,{k}" for k in range(1, 3)), '3.png,"open']
    rows += [*(f"{k}.png,{k}" for k in range(4, 9)), last, ""]
    result, pairs = packed(folder, tmp_path / "out", captions=table(folder, end.join(rows)))
    expected = {f"{k}.png": {"caption": str(k)} for k in (1, 2, 4, 5, 6, 7, 8)}
    assert names(pairs) == {"0.png": {"caption": f"two{end}lines, of one"}, "9.png": {"caption": "nine"}} | expected
    detail = "in the row of 3.png; the lines behind it are rows"
    assert tuple(result.report.problems[0]) == ("quote not closed", "table.csv:7", detail)
    assert result.report.counts == {"quote not closed": 1, "picture that the table does not name": 1}


def test_quotes_that_are_part_of_a_text(folder, tmp_path):
    tabs = 'image\tcaption\na.1.png\t"big" dog\nd.png\t"a ""small"" cat"\ndeep/b c.png\tthe "red" one\n'
    expected = {"a.1.png": '"big" dog', "d.png": 'a "small" cat', "deep/b c.png": 'the "red" one'}
    for number, (text, name) in enumerate([(tabs, "t.tsv"), (tabs.replace("\t", ","), "t.csv")]):
        pairs = packed(folder, tmp_path / str(number), captions=table(folder, text, name))[1]
        assert {n: captions["caption"] for n, captions in names(pairs).items()} == expected
    lines = "sep=;\nimage;caption\n\na.1.png;x\nno.png;x\n"  # numbers are those of the file's lines
    result = packed(folder, tmp_path / "sep", captions=table(folder, lines))[0]
    assert result.report.problems[0].where == "table.csv:5"


def test_cells_that_hold_nothing_or_too_much(folder, tmp_path):
    rows = f"image,caption\na.1.png,NaN\nd.png,{'x ' * 100_000}\ndeep/b c.png,two\n"
    result, pairs = packed(folder, tmp_path / "out", captions=table(folder, rows))
    assert names(pairs) == {"deep/b c.png": {"caption": "two"}}
    assert [tuple(problem) for problem in result.report.problems[:2]] == [
        ("blank caption", "table.csv:2", '"caption": NaN'),
        ("caption too large", "table.csv:3", '"caption": 199,999 characters'),
    ]
    lines = table(folder, '{"image": "d.png", "text": NaN}\n{"image": "a.1.png", "text": ["x", "y", 3]}', "t.jsonl")
    result, pairs = packed(folder, tmp_path / "lines", captions=lines)
    assert names(pairs) == {"a.1.png": {"caption": "x", "caption.2": "y"}}
    assert result.report.counts["blank caption"] == result.report.counts["caption is no text"] == 1


@pytest.mark.parametrize(
    ("encoding", "text", "place"),
    [("cp1252", "café", "10: 0xe9"), ("cp1251", "кот", "7: 0xea"), ("gbk", "红", "7: 0xba")],
)
def test_a_table_that_is_not_utf8_says_how_to_convert_it(folder, tmp_path, encoding, text, place):
    rows = f"image,caption\r\nd.png,{text}\r\n"
    path = table(folder, rows.encode(encoding))
    message = rf"table.csv is not UTF-8 \(line 2, byte {place}\); iconv -f .* -t UTF-8 table.csv > utf8.csv"
    with pytest.raises(ValueError, match=message) as error:
        packed(folder, tmp_path / "out", captions=path)
    assert "surrogate" not in str(error.value)
    result, pairs = packed(folder, tmp_path / "some", captions=table(folder, rows.encode(encoding) + b"a.1.png,x\n"))
    assert names(pairs) == {"a.1.png": {"caption": "x"}}
    assert "is not UTF-8 (line 2" in result.report.first()["caption not valid Unicode"].detail
    with pytest.raises(ValueError, match=r"got columns image, .*; table.csv is not UTF-8"):
        packed(folder, tmp_path / "head", captions=table(folder, f"image,{text}\n".encode(encoding)))


def test_utf16_without_a_mark_is_told(folder, tmp_path):
    path = table(folder, CSV.encode("utf-16-le"))
    with pytest.raises(
        ValueError, match=r"table.csv is not UTF-8 \(NUL in line 1.*iconv -f UTF-16LE -t UTF-8 table.csv"
    ):
        packed(folder, tmp_path / "out", captions=path)


def test_the_only_table_in_the_folder_is_taken(folder, tmp_path, capsys):
    (folder / "a.1.txt").write_text("beside")
    (folder / "numbers.csv").write_text("size,count\n1,2\n")
    (folder / "image, caption.txt").write_text("image, caption\n")
    (folder / "captions.csv").write_bytes(CSV.encode())
    main(["data", "pack", str(folder), "--out", str(tmp_path / "out")])
    assert f"captions from {folder / 'captions.csv'}" in capsys.readouterr().out.splitlines()
    result, pairs = packed(folder, tmp_path / "again")
    assert (names(pairs), result.table) == (EXPECTED, folder / "captions.csv")
    (folder / "more.tsv").write_text("img\tcaption\nd.png\tfour\n")
    with pytest.raises(ValueError, match=r"expected one table .*, got captions.csv, more.tsv; --captions says which"):
        packed(folder, tmp_path / "two")
    (folder / "metadata.csv").write_text("Image Name| comment\nd.png| four\n")
    assert names(packed(folder, tmp_path / "metadata")[1]) == {"d.png": {"caption": "four"}}


def test_names_as_people_write_them(folder, tmp_path):
    (folder / "d.jpg").write_bytes(picture(9, kind="JPEG"))
    (folder / "E.PNG").write_bytes(picture(8))
    names_written = ["A.1.PNG", "deep/B C", "e", "d", "a.1.jpg", "b c.png", "D.PNG", "f.png"]
    path = table(folder, "image,text\n" + "".join(f"{name},{k}\n" for k, name in enumerate(names_written)))
    result, pairs = packed(folder, tmp_path / "out", captions=path)
    assert {name: captions["caption"] for name, captions in names(pairs).items()} == {
        "a.1.png": "0",
        "deep/b c.png": "1",
        "E.PNG": "2",
        "d.png": "6",
    }
    missing = [(p.where, p.detail) for p in result.report.problems if p.kind == "missing file"]
    assert missing == [
        ("table.csv:5", "d; there is d.jpg and d.png"),
        ("table.csv:6", "a.1.jpg; there is a.1.png"),
        ("table.csv:7", "b c.png; there is deep/b c.png"),
        ("table.csv:9", "f.png"),
    ]


def test_coco(folder, tmp_path):
    images = [{"id": 7, "file_name": "a.1.png"}, {"id": 9, "file_name": "d.png"}]
    annotations = [{"id": 1, "image_id": 9, "caption": "four"}, {"id": 2, "image_id": 7, "caption": "one"}]
    annotations += [{"id": 3, "image_id": 9, "caption": "4"}, {"id": 4, "image_id": 1, "caption": "of none"}]
    whole = {"info": {}, "images": images, "annotations": annotations}
    path = table(folder, json.dumps(whole, indent=1), "captions.json")
    result, pairs = packed(folder, tmp_path / "out", captions=path)
    assert names(pairs) == {"d.png": {"caption": "four", "caption.2": "4"}, "a.1.png": {"caption": "one"}}
    assert result.report.problems[0][:2] == ("row without a picture's name", "captions.json:4")
    boxes = table(folder, json.dumps(whole | {"annotations": [{"image_id": 9, "bbox": [1, 2, 3, 4]}]}), "boxes.json")
    with pytest.raises(ValueError, match=r"boxes.json is COCO's, but not of captions \(expected images of id and"):
        packed(folder, tmp_path / "boxes", captions=boxes)


def test_the_name_of_a_picture_stays(folder, tmp_path):
    path = table(folder, "image,name,text\nd.png,Dora,four\n")
    [(_, captions, fields)] = packed(folder, tmp_path / "out", captions=path, caption_columns=["name", "text"])[1]
    assert fields == {"name": "d.png"} | captions
    assert captions == {"name.caption": "Dora", "text": "four"}
    (folder / "d.json").write_text('{"name": "Dora"}')
    [(_, captions, fields)] = packed(folder, tmp_path / "beside", caption_columns=["name"])[1]
    assert fields == {"name": "d.png", "name.caption": "Dora"}


def test_lists_of_captions_beside_pictures(folder, tmp_path, capsys):
    (folder / "d.json").write_text('{"captions": ["one", "two", "one", 3]}')
    result, pairs = packed(folder, tmp_path / "out")
    assert names(pairs) == {"d.png": {"caption": "one", "caption.2": "two"}}
    assert result.report.counts["caption is no text"] == 1
    data = PairDataset(result.shards, languages=("caption",))
    assert list(data[0].captions.values()) == ["one", "two"]
    main(["data", "pack", str(folder), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines()[-1] == f"next: cogview data inspect {tmp_path / 'out'}/*.tar"


def test_shards_are_never_larger_than_asked_for(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.png").write_bytes(picture(number))
        (folder / f"{number:02d}.txt").write_text("x" * (number * 37 % 900))
    (folder / "00.txt").write_text("zero")
    for limit in (20_480, 30_720, 35_000):
        shards = packed(folder, tmp_path / str(limit), max_shard_bytes=limit)[0].shards
        sizes = [path.stat().st_size for path in shards]
        assert max(sizes) <= limit
        assert all(size > limit - 10_240 for size in sizes[:-1])


def test_folders_that_cannot_be_listed_are_named(folder, tmp_path, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (folder / "d.txt").write_text("four")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refused)
        result, pairs = packed(folder, tmp_path / "out")
    assert names(pairs) == {"d.png": {"caption": "four"}}
    assert ("folder not readable", "deep/er", "Permission denied") in map(tuple, result.report.problems)


def test_json_lines_and_lists(folder, tmp_path):
    rows = [{"file_name": name, "text": captions["caption"], "id": 3} for name, captions in EXPECTED.items()]
    lines = "\ufeff" + "\r\n".join(json.dumps(row) for row in rows) + '\n\n{"file_name": \n[1]\n'
    result, pairs = packed(folder, tmp_path / "lines", captions=table(folder, lines, "t.jsonl"))
    assert names(pairs) == EXPECTED
    assert result.report.counts["line not readable"] == 2
    listed = table(folder, json.dumps(rows), "t.json")
    assert names(packed(folder, tmp_path / "list", captions=listed)[1]) == EXPECTED
    (folder / "metadata.jsonl").write_text(lines, "utf-8")  # as Hugging Face's imagefolder has it
    assert names(packed(folder, tmp_path / "found")[1]) == EXPECTED


def test_files_beside_the_pictures(folder, tmp_path):
    (folder / "a.1.txt").write_bytes("\ufeffone\n".encode())
    (folder / "D.png").write_bytes(picture(8))
    (folder / "D.TXT").write_text("another one")
    (folder / "deep" / "b c.JSON").write_text('{"en": "two", "zh": "二", "url": "x"}', "utf-8")
    (folder / "deep" / "er" / "ä.png.txt").write_text("three")
    (folder / "d.json").write_text('{"title": "four"}')
    (folder / ".hidden.png").write_bytes(picture(9))
    result, pairs = packed(folder, tmp_path / "out")
    assert names(pairs) == {
        "D.png": {"caption": "another one"},
        "a.1.png": {"caption": "one"},
        "deep/b c.png": {"en": "two", "zh": "二"},
        "deep/er/ä.png": {"caption": "three"},
    }
    assert [tuple(problem) for problem in result.report.problems] == [
        ("picture without caption", "d.png", "none in caption, en, zh; other fields with text: title")
    ]
    titles = names(packed(folder, tmp_path / "titles", caption_columns=["title"])[1])
    assert titles == {"d.png": {"title": "four"}}


def test_columns(folder, tmp_path):
    both = table(folder, "path,id,text,caption,zh,note\na.1.png,1,no,yes,是,n1\nd.png,2,no,,,n2\n")
    options = {"captions": both}
    assert names(packed(folder, tmp_path / "usual", **options)[1]) == {"a.1.png": {"caption": "yes", "zh": "是"}}
    one = names(packed(folder, tmp_path / "one", **options, caption_columns=["note"])[1])
    assert one == {"a.1.png": {"caption": "n1"}, "d.png": {"caption": "n2"}}
    two = names(packed(folder, tmp_path / "two", **options, caption_columns=["note", "text"])[1])
    assert two["d.png"] == {"note": "n2", "text": "no"}
    assert names(packed(folder, tmp_path / "zh", **options, caption_columns=["zh"])[1]) == {"a.1.png": {"zh": "是"}}
    other = table(folder, "bild,text,text\na.1.png,1,2\n", "other.csv")
    for message, more in (
        (r"expected a column with the pictures' names in other.csv \(file_name, .*got columns bild, text, text", {}),
        ("image-column: expected a column of other.csv .*got 'x'", {"image_column": "x"}),
        ("caption-columns: expected a column of other.csv", {"image_column": "bild", "caption_columns": ["x"]}),
        ("other.csv has several columns 'text'", {"image_column": "bild"}),
    ):
        with pytest.raises(ValueError, match=message):
            packed(folder, tmp_path / "no", captions=other, **more)
    with pytest.raises(ValueError, match=r"expected a column with captions .*got columns image, id; --caption-columns"):
        packed(folder, tmp_path / "no", captions=table(folder, "image,id\na.1.png,3\n"))
    with pytest.raises(ValueError, match=r"captions: expected .csv, .*got 'table.xlsx'"):
        packed(folder, tmp_path / "no", captions=table(folder, "", "table.xlsx"))
    assert not (tmp_path / "no").exists()


def test_further_captions_of_a_picture(folder, tmp_path):
    rows = "image,text\na.1.png,one\nd.png,four\n./a.1.png,other\na.1.png,one\ndeep/../a.1.png,third\n"
    result, pairs = packed(folder, tmp_path / "out", captions=table(folder, rows))
    assert names(pairs)["a.1.png"] == {"caption": "one", "caption.2": "other", "caption.3": "third"}
    assert (result.pairs, result.fields) == (2, ["caption", "caption.2", "caption.3"])


def test_what_cannot_be_packed_is_named(folder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(7))
    (folder / "link.png").symlink_to(secret)
    (folder / "folder").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "d.png")
    (folder / "bad.png").write_bytes(picture(1)[:50])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "scan.tif").write_bytes(b"II*\0")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    os.mkfifo(folder / "pipe.png")
    rows = ["a.1.png,one", "link.png,x", "../secret.png,x", f"{secret},x", "folder/secret.png,x", "no.png,x"]
    rows += ["bad.png,x", "empty.jpg,x", "scan.tif,x", "huge.png,x", "pipe.png,x", ",x", "inside.png,fine", "d.png,"]
    rows += ["deep/b c.png,\u200b", "deep/er/ä.png,a\0b", "d.png,too,many", "x" * 5000 + ",x", "a\0.png,x"]
    out, report = tmp_path / "out", tmp_path / "report.jsonl"
    text = "file_name,caption\n" + "\n".join(rows) + "\n" + "d.png,caf\udce9\n"
    path = table(folder, text.encode("utf-8", "surrogateescape"))
    main(["data", "pack", str(folder), "--out", str(out), "--captions", str(path), "--report", str(report)])
    data = PairDataset([out / "00000.tar"])
    assert [pair.captions["caption"] for pair in data.readable()] == ["one", "fine"]
    told = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    counts: dict[str, list[str]] = {}
    for problem in told:
        counts.setdefault(problem["kind"], []).append(problem["where"])
    assert {kind: sorted(where) for kind, where in counts.items()} == {
        "outside the folder": sorted(f"table.csv:{n}" for n in (3, 4, 5, 6)),
        "missing file": sorted(f"table.csv:{n}" for n in (7, 12, 19, 20)),
        "picture not readable": ["bad.png", "empty.jpg"],
        "picture in a format that is not read (.tif)": ["scan.tif"],
        "picture too large": ["huge.png"],
        "row without a picture's name": ["table.csv:13"],
        "blank caption": ["table.csv:16"],
        "caption not valid Unicode": ["table.csv:17", "table.csv:21"],
        "picture without caption": ["deep/b c.png", "deep/er/ä.png"],
        "row with too many fields": ["table.csv:18"],
        "link to a folder, not followed": ["folder"],
    }


def test_shards_and_their_bytes(folder, tmp_path, capsys):
    out = tmp_path / "shards"
    path = table(folder, CSV + "d.png,four\n")
    arguments = ["data", "pack", str(folder), "--out", str(out), "--captions", str(path), "--shard-pairs", "3"]
    main(arguments)
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f"4 pairs in 2 shards in {out}, captions: caption", f"next: cogview data inspect {out}/*.tar"]
    assert [len(PairDataset([out / name])) for name in ("00000.tar", "00001.tar")] == [3, 1]
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.tar")}
    main(arguments)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("*.tar")} == before
    table(folder, CSV.replace("one", "ONE"))
    main(arguments)  # corrected, and one picture less
    assert sorted(p.name for p in out.iterdir()) == ["00000.tar", "00000.tar.index.npz", "pack.json"]
    assert PairDataset([out / "00000.tar"]).captions(0) == {"caption": "ONE"}
    small = packed(folder, tmp_path / "small", captions=path, max_shard_bytes=1)[0]
    assert len(small.shards) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "shards", "small", "table.csv"]


def test_other_shards_are_not_overwritten_and_nothing_is_half_written(folder, tmp_path, monkeypatch):
    path = table(folder, CSV)
    (tmp_path / "other").mkdir()
    raw_tar(tmp_path / "other" / "00000.tar", [])
    with pytest.raises(ValueError, match=r"out: .* holds shards of something else \(00000.tar\)"):
        packed(folder, tmp_path / "other", captions=path)
    packed(folder, tmp_path / "out", captions=path)
    with pytest.raises(ValueError, match="holds shards of something else"):
        packed(folder / "deep", tmp_path / "out", captions=path)
    for name, text in (("no rows", "image,text\n"), ("no file", "image,text\nno.png,x\n")):
        with pytest.raises(ValueError, match="no picture with a caption in"):
            packed(folder, tmp_path / name, captions=table(folder, text))
    with pytest.raises(ValueError, match="folder: expected a folder of pictures"):
        packed(tmp_path / "nowhere", tmp_path / "out")
    monkeypatch.setattr("cogview.data.pack.decode_image", lambda data, side: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed(folder, tmp_path / "broken", captions=table(folder, CSV))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out", "pictures", "table.csv"]
    assert len(PairDataset([tmp_path / "out" / "00000.tar"])) == 3


def test_a_mark_that_names_other_files_removes_none(folder, tmp_path):
    path, out = table(folder, CSV), tmp_path / "out"
    packed(folder, out, captions=path)
    mark = json.loads((out / "pack.json").read_text("utf-8"))
    (out / "pack.json").write_text(json.dumps(mark | {"shards": ["00000.tar", "../table.csv", "00007.tar"]}))
    packed(folder, out, captions=path)
    assert path.exists()


def test_names_that_are_no_unicode(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    (folder / name).write_bytes(picture(1))
    (folder / name.replace("png", "txt")).write_text("a café")
    (folder / "two\nlines.gif").write_bytes(picture(2, kind="GIF"))
    (folder / "two\nlines.txt").write_text("two")
    assert names(packed(folder, tmp_path / "out")[1]) == {
        "caf\\xe9.png": {"caption": "a café"},
        "two\nlines.gif": {"caption": "two"},
    }


def test_pictures_go_by_their_contents(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, kind in (("a.jfif", "JPEG"), ("b.JPG", "PNG"), ("c.jpeg", "JPEG")):
        (folder / name).write_bytes(picture(1, kind=kind))
        (folder / name).with_suffix(".txt").write_text("text")
    result, _ = packed(folder, tmp_path / "out")
    with tarfile.open(result.shards[0]) as tar:
        assert [n for n in tar.getnames() if "json" not in n] == ["00000000.jpg", "00000001.png", "00000002.jpg"]
