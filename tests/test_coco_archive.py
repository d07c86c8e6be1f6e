"""Pictures and captions in archives of COCO's layout, as they are downloaded: packed without being unpacked, whatever
is wrong with them, and trained on."""

import gzip
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.coco import large_table, layout
from cogview import cli
from cogview.data import archive
from cogview.data.images import MAX_BYTES
from cogview.data.pack import Packed, pack
from cogview.data.shards import PairDataset
from cogview.data.tokens import TokenDataset
from tests.test_data_shards import picture
from tests.test_train_command import SMALL

TABLE = "annotations/captions_val2017.json"
COUNT = 12


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> tuple[Path, Path]:
    """The archives of pictures and of captions."""
    return layout(tmp_path_factory.mktemp("coco"), COUNT, 64, 48)


def packed(pictures: Path, captions: Path | str | None, out: Path) -> tuple[Packed, list[Any], list[str]]:
    """What `pack` says, the pairs, and the names that their pictures had."""
    result = Packed()
    captions = None if captions is None else Path(captions)
    pack(pictures, out, lambda done, note=None: None, result, captions=captions)
    names = []
    for path in result.shards:
        with tarfile.open(path) as tar:
            names += [json.load(tar.extractfile(m))["name"] for m in tar if m.name.endswith(".json")]
    return result, list(PairDataset(result.shards, languages=["caption"]).readable()), names


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, contents in members.items():
            file.writestr(name, contents)
    return path


def table(path: Path, names: list[str]) -> Path:
    path.write_text("file_name,caption\n" + "".join(f"{name},a caption of {name}\n" for name in names))
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def as_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            file.addfile(info, io.BytesIO(contents))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "folder"])
def test_archives_are_packed_as_they_are(coco, tmp_path, kind):
    pictures, annotations = coco
    members = members_of(pictures)
    if kind == "folder":
        with zipfile.ZipFile(pictures) as file:
            file.extractall(tmp_path / "unpacked")
        pictures = tmp_path / "unpacked" / "val2017"
    elif kind != "zip":
        pictures = as_tar(tmp_path / f"val2017.{kind}", members, "w:gz" if kind == "tar.gz" else "w")
    result, pairs, names = packed(pictures, f"{annotations}:{TABLE}", tmp_path / "out")
    assert not result.report.counts
    assert (len(pairs), result.pairs) == (COUNT, COUNT)
    assert result.table == Path(f"{annotations}:{TABLE}")
    whole = {"folder": lambda name: f"val2017/{name}"}.get(kind, lambda name: name)
    assert sorted(map(whole, names)) == sorted(members)
    assert names == sorted(names) or kind == "folder"  # in the order of the archive
    with zipfile.ZipFile(annotations) as file:
        read = json.loads(file.read(TABLE))
    texts: dict[str, list[str]] = {}
    for one in read["annotations"]:
        texts.setdefault(f"val2017/{one['image_id']:012d}.jpg", []).append(one["caption"].strip())
    for pair, name in zip(pairs, map(whole, names), strict=True):
        assert list(pair.captions.values()) == list(dict.fromkeys(texts[name]))  # of five, none twice
        assert pair.image.size == (64, 48)
    with tarfile.open(result.shards[0]) as tar:
        kept = {tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")}
    assert kept == set(members.values())  # byte for byte
    grey = [Image.open(io.BytesIO(data)).mode for data in kept]
    assert grey.count("L") == 2
    assert not list(tmp_path.glob("**/*.tmp"))


def test_the_table_is_found(coco, tmp_path):
    pictures, annotations = coco
    for name, more in (("one.zip", {}), ("two.zip", {"annotations/labels.csv": b"a,b\n", "README.txt": b"hello"})):
        alone = zipped(tmp_path / name, {TABLE: members_of(annotations)[TABLE], **more})
        result, pairs, _ = packed(pictures, alone, tmp_path / f"out-{name}")
        assert len(pairs) == COUNT
        assert result.table == Path(f"{alone}:{TABLE}")
    inside = zipped(tmp_path / "all.zip", {**members_of(pictures), "captions.json": members_of(annotations)[TABLE]})
    assert len(packed(inside, None, tmp_path / "inside")[1]) == COUNT


def test_what_table_is_meant_has_to_be_clear(coco, tmp_path):
    pictures, annotations = coco
    two = "annotations/captions_train2017.json, annotations/captions_val2017.json"
    objects = "annotations/instances_val2017.json"
    boxes = zipped(tmp_path / "boxes.zip", {objects: members_of(annotations)[objects]})
    cut = tmp_path / "cut.zip"
    cut.write_bytes(annotations.read_bytes()[:-300])
    damaged = zipped(tmp_path / "damaged.zip", {"captions.csv": b"file_name,caption\n" * 40})
    damaged.write_bytes(damaged.read_bytes().replace(b"name,caption\nfile", b"name,kaption\nfile", 1))
    nothing = zipped(tmp_path / "nothing.zip", {"a.jpg": b"", "a.txt": b"beside"})
    for captions, words in (
        (
            annotations,
            f"captions: expected one table in '{annotations}', got {two}; --captions {annotations}:NAME",
        ),
        (f"{annotations}:captions.json", f"captions: expected the table 'captions.json' in '{annotations}', got {two}"),
        (f"{tmp_path}/no.zip:a.json", f"captions: expected a file, got '{tmp_path}/no.zip:a.json'"),
        (tmp_path / "no.zip", f"captions: expected a file, got '{tmp_path}/no.zip'"),
        (boxes, "captions: instances_val2017.json is COCO's, but not of captions (expected images of id and file_name"),
        (cut, f"captions: '{cut}' is no whole zip (File is not a zip file)"),
        (damaged, f"captions: captions.csv of '{damaged}' cannot be read (Bad CRC-32"),
        (nothing, f"captions: expected one table in '{nothing}', got none; --captions"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            packed(pictures, captions, tmp_path / "out")
        assert str(caught.value).startswith(words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_members_that_are_damaged_or_missing_are_left_out(coco, tmp_path):
    pictures, annotations = coco
    members = members_of(pictures)
    names = list(members)
    broken = zipped(tmp_path / "broken.zip", members | {names[2]: b"no picture", names[4]: members[names[4]][:300]})
    data = broken.read_bytes()
    start = data.index(members[names[1]][200:400])
    broken.write_bytes(data[:start] + bytes(200) + data[start + 200 :])
    with zipfile.ZipFile(broken) as file:
        flagged = file.getinfo(names[3])
        place = file.start_dir
    data = bytearray(broken.read_bytes())
    entry = data.index(names[3].encode(), place) - 46
    data[entry + 8] |= 1  # encrypted
    broken.write_bytes(data)
    assert flagged.filename == names[3]
    result, pairs, kept = packed(broken, f"{annotations}:{TABLE}", tmp_path / "out")
    assert kept == [names[0], *names[5:]]
    problems = {(one.kind, one.where) for one in result.report.problems if one.kind != "missing file"}
    assert problems == {
        ("damaged member", names[1]),
        ("picture not readable", names[2]),
        ("encrypted member", names[3]),
        ("picture not readable", names[4]),
    }
    assert result.report.counts["missing file"] == 5  # rows of the encrypted one
    assert len(pairs) == COUNT - 4


def test_a_tar_that_is_cut_short_gives_what_is_whole(coco, tmp_path):
    pictures, annotations = coco
    members = members_of(pictures)
    names = list(members)
    whole = as_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(members[names[6]]) + 100])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-9000])
    result, _, kept = packed(tmp_path / "cut.tar", f"{annotations}:{TABLE}", tmp_path / "out")
    assert kept == names[:6]
    assert result.report.counts["truncated member"] == 1
    result, _, kept = packed(tmp_path / "cut.tar.gz", f"{annotations}:{TABLE}", tmp_path / "out-gz")
    assert kept == names[: len(kept)]
    assert 0 < len(kept) < COUNT
    assert result.report.counts["compressed file damaged"] == 1


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_names_are_of_the_tables_own_folder_too(tmp_path, kind):
    """As Hugging Face's imagefolder has them: the same names in train and test, and others from there."""
    rows = b"file_name,caption\n0.png,zero\n../test/1.png,one\n../../secret.png,x\n/0.png,x\n"
    members = {"test/0.png": picture(1), "train/0.png": picture(2), "test/1.png": picture(3)}
    members["train/metadata.csv"] = rows
    (tmp_path / "secret.png").write_bytes(picture(4))
    if kind == "folder":
        with zipfile.ZipFile(zipped(tmp_path / "a.zip", members)) as file:
            file.extractall(path := tmp_path / "a")
        captions = f"{path}/train/metadata.csv"
    else:
        path = (zipped if kind == "zip" else as_tar)(tmp_path / f"a.{kind}", members)
        captions = f"{path}:train/metadata.csv"
    result, pairs, names = packed(path, captions, tmp_path / "out")
    assert dict(zip(names, (pair.captions["caption"] for pair in pairs), strict=True)) == {
        "train/0.png": "zero",
        "test/1.png": "one",
    }
    assert result.report.counts == {"outside the folder": 2, "picture that the table does not name": 1}


def test_a_picture_at_the_top_hides_no_folder(coco, tmp_path):
    pictures, annotations = coco
    more = zipped(tmp_path / "more.zip", {"logo.png": picture(1), **members_of(pictures)})
    result, pairs, _ = packed(more, f"{annotations}:{TABLE}", tmp_path / "out")
    assert len(pairs) == COUNT
    assert result.report.counts == {"picture that the table does not name": 1}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_leads_out_of_an_archive(tmp_path, kind):
    outside = ["../up.png", "/root.png", "a/../../b.png", "c:\\d.png", "..\\e.png"]
    (tmp_path / "secret.png").write_bytes(picture(1))
    members = dict.fromkeys([*outside, "__MACOSX/._in.png", "./in.png", "in.png"], picture(7))
    if kind == "zip":
        path = zipped(tmp_path / "a.zip", members)
        link = zipfile.ZipInfo("link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(link, str(tmp_path / "secret.png"))
    else:
        path = as_tar(tmp_path / "a.tar", members)
        with tarfile.open(path, "a") as file:
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
            file.addfile(info)
    wanted = [*outside, "in.png", "link.png", str(tmp_path / "secret.png"), "secret.png", "../secret.png"]
    result, pairs, names = packed(path, table(tmp_path / "captions.csv", wanted), tmp_path / "out")
    assert names == ["in.png"]
    assert len(pairs) == 1
    assert result.report.counts["member named to lie elsewhere"] == len(outside)
    assert result.report.counts["member of a name that was there"] == 1
    assert result.report.counts["not a regular file"] == 1
    assert result.report.counts["outside the folder"] == len(outside) + 2
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["secret.png", path.name, "captions.csv", "out"])


def test_names_of_tables_are_shown_without_what_moves_a_terminal(tmp_path, capsys):
    name = "captions\x1b]0;owned\x07.csv"
    shown = r"a.zip:captions\x1b]0;owned\x07"
    for rows, sentence in (
        ("file_name,caption\nin.png,one\nno.png,two\n", f"captions from {tmp_path}/{shown}.csv"),
        ("file_name,size\nin.png,1\n", f"captions: expected a column with captions in {shown}.csv"),
        ("file_name,caption,caption\nin.png,1,2\n", f"captions: {shown}.csv has several columns 'caption'"),
        ("file_name,\udce9\n", f"{shown}.csv is not UTF-8 (line 1"),
        ("file_name\0,caption\n", f"{shown}.csv is not UTF-8 (NUL"),
        ("file_name,caption\nin.png,one,two\n", f"row with too many fields, first {shown}.csv:2"),
        ('file_name,caption\nin.png,"one\n', f"quote not closed, first {shown}.csv:2"),
    ):
        data = rows.encode("utf-8", "surrogateescape")
        path = zipped(tmp_path / "a.zip", {"in.png": picture(7), "more.png": picture(8), name: data})
        arguments = ["data", "pack", str(path), "--out", str(tmp_path / "out"), "--report", str(tmp_path / "told")]
        try:
            cli.main(arguments)
            said = ""
        except SystemExit as error:
            said = str(error)
        said += capsys.readouterr().out
        assert sentence in said
        assert not {"\x1b", "\x07"} & {*said, *(tmp_path / "told").read_text("utf-8", "replace")}
    for kind, rows, sentence in (
        (".json", "[1", f"captions: {shown}.json is not JSON"),
        (".json", '{"images": [1], "annotations": []}', f"captions: {shown}.json is COCO's, but not of captions"),
        (".jsonl", "1\n", f"line not readable, first {shown}.jsonl:1"),
    ):
        path = zipped(tmp_path / "a.zip", {"in.png": picture(7), name.replace(".csv", kind): rows.encode()})
        with pytest.raises(SystemExit) as caught:
            cli.main(["data", "pack", str(path), "--out", str(tmp_path / "out")])
        said = str(caught.value) + capsys.readouterr().out
        assert sentence in said
        assert not {"\x1b", "\x07"} & {*said}


def test_bombs_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "ALWAYS", 1 << 20)
    zeros, row = bytes(MAX_BYTES + 1), table(tmp_path / "captions.csv", ["a.png", "b.png"])
    many = {"a.png": zeros, "b.png": picture(3)}
    bomb = zipped(tmp_path / "bomb.zip", many, zipfile.ZIP_DEFLATED)
    wrapped = as_tar(tmp_path / "bomb.tar.gz", many, "w:gz")
    for path in (bomb, wrapped):
        words = r"folder: expected an archive of at most [13],[\d,]* bytes unpacked, got '[\d,]*'"
        with pytest.raises(ValueError, match=words):
            packed(path, row, tmp_path / "out")
    monkeypatch.setattr(archive, "TIMES", 10_000)
    for path in (bomb, wrapped):
        result, _, names = packed(path, row, tmp_path / path.suffix)
        assert names == ["b.png"]
        assert result.report.counts == {"picture too large": 1}
    monkeypatch.setattr("cogview.data.sources.MAX_TABLE_BYTES", 1000)
    long = zipped(tmp_path / "long.zip", {"captions.csv": b"file_name,caption\n" * 100}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"captions: captions.csv of .* cannot be read \(expected at most 1000 bytes"):
        packed(bomb, long, tmp_path / "out")


def test_what_is_no_archive_is_said(coco, tmp_path):
    row, gz = table(tmp_path / "captions.csv", ["a.png"]), "compressed with gzip"
    for name, data, words in (
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "compressed with 7z: unpack it"),
        ("a.tar.xz", b"\xfd7zXZ\0" + bytes(600), "compressed with xz: unxz it"),
        ("a.png", picture(1), "truncated tar"),
        ("a.tar", bytes(10240), "nothing in it"),
        (
            "a.tar.gz",
            gzip.compress(bytes(10240))[:12] + bytes(range(200)),
            "compressed with gzip, of which 0 bytes could be read",
        ),
        ("b.tar.gz", b"\x1f\x8b" + bytes(range(200)), f"{gz}, of which 0 bytes could be read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            packed(tmp_path / name, row, tmp_path / "out")
        wanted = f"folder: expected a zip, a tar or a tar.gz with files, got '{tmp_path / name}' ({words})"
        assert str(caught.value) == wanted
    with pytest.raises(ValueError, match="folder: no picture with a caption in"):
        packed(coco[0], row, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_zips_are_read_or_refused_in_a_sentence(coco, tmp_path):
    whole, draws = coco[0].read_bytes(), random.Random(0)
    row = table(tmp_path / "captions.csv", ["val2017/a.png"])
    for number in range(60):
        data = bytearray(whole)
        for _ in range(8):
            data[draws.randrange(len(data) - 400, len(data))] = draws.randrange(256)  # of the directory
        (tmp_path / "changed.zip").write_bytes(data)
        try:
            packed(tmp_path / "changed.zip", row, tmp_path / f"out-{number}")
        except ValueError as error:
            assert "folder:" in str(error)  # noqa: PT017


def test_a_table_is_measured_alone(tmp_path):
    found = large_table(tmp_path, 30)
    assert (found["pictures"], found["captions"]) == (30, 150)
    assert 21_000 < found["table_bytes"] < 25_000  # of 118,287 pictures 91 MB, as COCO's
    assert found["peak_MiB"] > 50
    assert any(line.startswith("30 pairs in 1 shard") for line in found["said"])


def test_from_the_archives_to_a_picture(coco, tmp_path, capsys):
    pictures, annotations = coco
    shards, run = tmp_path / "shards", tmp_path / "run"
    cli.main(["data", "pack", str(pictures), "--captions", f"{annotations}:{TABLE}", "--out", str(shards)])
    assert f"{COUNT} pairs in 1 shard" in capsys.readouterr().out
    small = ["--codebook", "16", "--code-dim", "8", "--hidden", "8", "--image-size", "32", "--image-passes", "1"]
    cli.main(["tokenize", str(shards / "00000.tar"), "--run", str(run), "--text-pieces", "300", *small])
    tokens = TokenDataset(run / "tokens" / "train")
    assert 4 * COUNT < len(tokens) <= 5 * COUNT  # a row for each caption
    cli.main(["train", "--run", str(run), "--steps", "2", *SMALL])
    caption = ["--captions", "A man sits on a bench.", "--out", str(tmp_path / "drawn.png")]
    cli.main(["generate", "--run", str(run), *caption])
    assert Image.open(tmp_path / "drawn.png").width >= 32
