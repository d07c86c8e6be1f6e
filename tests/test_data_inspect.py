"""`cogview data inspect`: what it says of shards."""

import gzip
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from cogview.cli import main
from cogview.data.ahead import cores
from cogview.data.shards import ShardWriter
from cogview.tokenizers.text import TextTokenizer
from tests.test_data_shards import picture, raw_tar

CORES = f"{cores()} core{'s' * (cores() > 1)}"


def texture(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def said(capsys, *arguments) -> list[str]:
    main(["data", "inspect", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def shards(tmp_path):
    first = [(f"{n}.{e}", c) for n in range(12) for e, c in (("png", texture(n)), ("txt", b"a red fox above a tree"))]
    first += [("0.png", texture(100)), ("0.json", b'{"caption": "the same key", "title": "t"}')]
    first += [("12.png", texture(3)), ("12.json", b'{"en": "the same picture", "zh": "half \\ud83d", "url": "x"}')]
    first += [("13.png", b"none"), ("13.txt", b"bad picture"), ("14.png", texture(14)), ("14.txt", b" ")]
    second = [("0.png", texture(15)), ("0.json", b'{"title": "no caption asked for"}'), ("1.txt", b"no picture")]
    second += [("2.png", texture(16)), ("2.txt", b"word " * 70), ("IMG.1.jpg", b""), ("2.npy", b"")]
    return raw_tar(tmp_path / "a.tar", first), raw_tar(tmp_path / "b.tar", second)


def test_everything_is_said(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cogview.progress.FIRST", 0.0)  # else short work has no lines
    report = tmp_path / "deep" / "report.jsonl"
    lines = said(capsys, *shards, "--report", report)
    assert any(line.startswith("reading: 100%") and line.endswith(f"pairs a second on {CORES}") for line in lines)
    assert any(re.fullmatch(rf"15 of 18 pairs can be read \([\d,]+ pairs a second on {CORES}\)", x) for x in lines)
    assert "sizes: 32 x 24 (17)" in lines
    assert "captions: caption (14), en (1)" in lines
    assert "other string fields: title (2), url (1); --languages title takes one" in lines
    lengths = next(
        line for line in lines if line.startswith("caption lengths in tokens of a tokenizer trained on them:")
    )
    assert lengths.endswith("1 over the limit of 64")
    assert "members not read: npy (1, first 2.npy)" in lines
    expected = {
        "1 blank caption, first a.tar:14 (.txt)",
        "1 caption not valid Unicode, first a.tar:12 "
        "(\"zh\": 'utf-8' codec can't encode character '\\ud83d' in position 5: surrogates not allowed)",
        "3 duplicate key, first a.tar:0 (pair 13, the same as pair 1)",
        "1 duplicate picture, first a.tar:12 (pair 14, the same as pair 4, a.tar:3)",
        "1 name with dots before its extension, first b.tar:IMG.1.jpg "
        "(a sample's name ends at its first dot; rename it)",
        "1 picture not readable, first a.tar:13 (image: not a readable picture (no PNG, JPEG, WEBP, GIF or BMP))",
        "2 sample without caption, first a.tar:14 (none in caption, en, zh)",
        "1 sample without picture, first b.tar:1",
    }
    problems = {line.strip() for line in lines if line.startswith("  ")}
    assert {line for line in problems if "too long" not in line} == expected
    assert [line.split(":")[0] for line in problems - expected] == ["1 caption too long, first b.tar"]
    written = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    assert len(written) == 12
    assert {"kind": "duplicate key", "where": "b.tar:0", "detail": "pair 17, the same as pair 1, a.tar:0"} in written
    without = {"kind": "sample without caption", "where": "b.tar:0"}
    assert without | {"detail": "none in caption, en, zh; other fields with text: title"} in written
    assert f"12 problems in {report}" in lines
    assert not list(report.parent.glob(".*"))


def test_the_languages_asked_for(shards, capsys):
    lines = said(capsys, shards[0], "--languages", "title", "en")
    assert any(line.startswith("2 of 16 pairs can be read") for line in lines)
    assert "captions: title (1), en (1)" in lines
    assert "other string fields: caption (14), zh (1), url (1); --languages caption takes one" in lines


def test_lengths_are_those_of_the_runs_tokenizer(shards, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    TextTokenizer.train(["abc def ghi"] * 3, 300).save(run / "text.model")
    tokens = len(TextTokenizer.load(run / "text.model").encode("a red fox above a tree"))
    lines = said(capsys, shards[0], "--run", run, "--max-text", tokens - 1)
    text = f"caption lengths in tokens of {run / 'text.model'}: median {tokens}, "
    assert next(line for line in lines if line.startswith(text)).endswith(f" over the limit of {tokens - 1}")
    first = f'  12 caption too long, first a.tar:0 ("caption": {tokens} tokens, at most {tokens - 1})'
    assert first in lines or first.replace("12", "13") in lines


def test_the_sheet(tmp_path, capsys):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("0", {"png": picture(200, (40, 30)), "txt": b"red"})
    assert f"contact sheet: {tmp_path / 's.png'}" in said(capsys, tmp_path / "a.tar", "--sheet", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").getpixel((60, 60)) == (200, 0, 7)


def test_no_readable_pair_is_an_error(tmp_path, capsys):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(SystemExit, match=r"^cogview: shards: no pair can be read \(1 shard without samples\)$"):
        main(["data", "inspect", str(tmp_path / "empty.tar")])
    out = capsys.readouterr().out
    assert "0 of 0 pairs can be read" in out
    assert f"  1 shard without samples, first {tmp_path / 'empty.tar'}\n" in out
    assert "no problems" not in out
    other = raw_tar(tmp_path / "other.tar", [("a.npy", b""), ("b.cls", b"")])
    with pytest.raises(SystemExit, match="no pair can be read"):
        main(["data", "inspect", str(other)])
    assert "members not read: npy (1, first a.npy), cls (1, first b.cls)" in capsys.readouterr().out
    titles = raw_tar(tmp_path / "titles.tar", [("0.png", picture(0)), ("0.json", b'{"id": "x", "title": "t"}')])
    with pytest.raises(SystemExit, match=r"other string fields: id \(1\), title \(1\); --languages title takes one\)"):
        main(["data", "inspect", str(titles)])
    dotted = raw_tar(tmp_path / "dotted.tar", [("IMG.1.jpg", picture(0)), ("IMG.1.txt", b"text")])
    with pytest.raises(SystemExit, match=r"no pair can be read \(2 name with dots before its extension\)"):
        main(["data", "inspect", str(dotted)])


def test_a_shard_that_cannot_be_read_does_not_end_the_others(shards, tmp_path, capsys, monkeypatch):
    bad = {name: tmp_path / name for name in ("zero.tar", "text.tar", "page.tar", "packed.tar", "missing.tar")}
    for path, contents in zip(
        bad.values(), (b"", b"text", b"<!DOCTYPE html>" * 99, gzip.compress(shards[0].read_bytes())), strict=False
    ):
        path.write_bytes(contents)
    report = tmp_path / "report.jsonl"
    lines = said(capsys, shards[0], *bad.values(), shards[1], "--report", report)
    assert any(line.startswith("15 of 18 pairs can be read (") for line in lines)
    zero = bad["zero.tar"]
    text = f"{zero} (paths: '{zero}' is no uncompressed tar of samples (truncated tar))"
    assert f"  5 shard not readable, first {text}" in lines
    text = f"(paths: '{bad['packed.tar']}' is no uncompressed tar of samples (compressed with gzip: gunzip it))"
    assert f"    {bad['packed.tar']} {text}" in lines
    written = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    assert [p["where"] for p in written if p["kind"] == "shard not readable"] == [str(p) for p in bad.values()]
    for path in bad.values():
        with pytest.raises(SystemExit, match=rf"^cogview: shards: none can be read; paths: .*{path.name}"):
            said(capsys, path)
    with monkeypatch.context() as patch:
        pread = os.pread

        def broken(file: int, size: int, offset: int) -> bytes:
            if offset > 20_000:
                raise OSError(5, "Input/output error")
            return pread(file, size, offset)

        patch.setattr(os, "pread", broken)
        lines = said(capsys, shards[0], shards[1])
    lost = next(line for line in lines if " pair not read, first a.tar:" in line)
    assert lost.endswith(f"(shard '{shards[0]}': cannot be read (Input/output error))")
    assert not [line for line in lines if "picture not readable" in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-text", "0"], "max-text: expected at least 1 token, got 0"),
        (["--run", "TYPO"], "run: expected a run's folder with text.model, got 'TYPO'"),
    ],
)
def test_options_are_checked_before_anything_is_read(shards, options, message, capsys):
    with pytest.raises(SystemExit, match=f"^cogview: {message}$"):
        said(capsys, shards[0], *options)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["inspect", "a.tar"], ["pack", "in", "--out", "out"], ["build", "--out", "out"]])
def test_only_what_goes_on_says_so_when_it_is_stopped(arguments, monkeypatch):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cogview.commands.data.{arguments[0].title()}.run", stop)
    end = "; the same command goes on from here" if arguments[0] == "build" else ""
    with pytest.raises(SystemExit, match=f"^cogview: stopped{end}$"):
        main(["data", *arguments])
