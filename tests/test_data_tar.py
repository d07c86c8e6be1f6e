"""What is in a tar besides samples, how that is said, and how a tar is known again."""

import gzip
import io
import os
import shutil
import tarfile

import numpy as np
import pytest

from cogview.data.shards import PairDataset, ShardWriter
from cogview.data.tar_index import TarIndex
from tests.test_data_shards import keys, picture, raw_tar, write_shards


def problems(data: PairDataset) -> list[tuple[str, str, str]]:
    return [tuple(problem) for problem in data.report.problems]


def test_the_digest_is_that_of_the_contents(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    path = write_shards(tmp_path / "a", 1, 3)[0]
    data = PairDataset([path])
    first = data.shards[0].digest
    assert len(first) == 64
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)  # would fail if it were called: it is kept
        assert PairDataset([path]).shards[0].digest == first
    copy = shutil.copy2(path, tmp_path / "b")
    shutil.copy2(f"{path}.index.npz", tmp_path / "b")
    assert TarIndex.open(copy).digest == first
    before = path.stat()
    contents = path.read_bytes()
    path.write_bytes(contents.replace(b'"number 1"', b'"NUMBER 1"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(OSError, match="changed while it was read"):
        _ = TarIndex.digest.func(data.shards[0])
    corrected = PairDataset([path])
    assert corrected.captions(1) == {"en": "NUMBER 1"}
    assert corrected.shards[0].digest not in ("", first)
    path.write_bytes(contents)
    assert PairDataset([path]).shards[0].digest == first


def test_a_corrected_member_that_moves_nothing_is_read_anew(tmp_path):
    """Same size, same times, other places: an index that stayed would read the wrong bytes."""
    path = raw_tar(
        tmp_path / "a.tar", [("0.png", picture(1)), ("0.txt", b"one"), ("1.png", picture(2)), ("1.txt", b"2")]
    )
    before = path.stat()
    assert PairDataset([path]).captions(0) == {"caption": "one"}
    raw_tar(path, [("0.txt", b"two"), ("0.png", picture(1)), ("1.png", picture(2)), ("1.txt", b"2")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    data = PairDataset([path])
    assert data.captions(0) == {"caption": "two"}
    assert keys(data.readable()) == ["0", "1"]


def test_names_with_dots_are_left_out_and_named(tmp_path):
    names = ["IMG_2021.05.1.jpg", "IMG_2021.05.1.txt", "IMG_2021.05.2.jpg", "d.x/v1.5 b.PNG"]
    members = [(name, b"x") for name in names] + [("good.PNG", picture(1)), ("good.TXT", b"text")]
    data = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    detail = "a sample's name ends at its first dot; rename it"
    assert problems(data) == [("name with dots before its extension", f"a.tar:{name}", detail) for name in names]
    assert keys(data.readable()) == ["good"]
    assert PairDataset([tmp_path / "a.tar"]).report.counts == data.report.counts  # from the sidecar too


def test_further_members_of_a_sample_are_no_problem(tmp_path):
    members = [
        ("0.png", picture(1)),
        ("0.seg.png", b""),
        ("0.cls.txt", b""),
        ("0.npy", b""),
        ("0.json", b'{"en": "a"}'),
    ]
    members += [("1.npy", b""), ("README", b""), (".gitkeep", b"")]
    members += [("3.png", picture(1)), ("3.1.png", b""), ("3.txt", b"a")]
    data = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    assert len(data) == 2
    assert list(data.report.counts) == ["name with dots before its extension"]
    unread = {"npy": (2, "0.npy"), "": (1, "README"), "gitkeep": (1, ".gitkeep")}
    unread |= {"seg.png": (1, "0.seg.png"), "cls.txt": (1, "0.cls.txt")}
    assert data.shards[0].unread == TarIndex.open(tmp_path / "a.tar").unread == unread


def test_names_of_all_kinds_keep_the_index_small(tmp_path):
    raw_tar(tmp_path / "a.tar", [(f"{n}.x{n}", b"") for n in range(300)])
    unread = TarIndex.open(tmp_path / "a.tar").unread
    assert len(unread) == 101
    assert unread["others"] == (200, "100.x100")


def test_pictures_that_are_not_read_are_named_by_their_format(tmp_path):
    members = [(f"{n}.{e}", b"x") for n, e in enumerate(["tif", "HEIC", "avif", "jfif", "heic"])]
    members += [("2.txt", b"text"), ("5.png", picture(1)), ("5.tif", b"raw"), ("5.txt", b"text"), ("6.txt", b"alone")]
    data = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    assert data.report.counts == {
        "picture in a format that is not read (.heic)": 2,
        "picture in a format that is not read (.tif)": 1,
        "picture in a format that is not read (.avif)": 1,
        "picture in a format that is not read (.jfif)": 1,
        "sample without picture": 2,
    }
    assert data.shards[0].unread["tif"] == (2, "0.tif")
    assert keys(data.readable()) == ["5"]


def test_what_macos_adds_is_told_apart(tmp_path):
    members = [("._0.png", b"x"), ("0.png", picture(1)), ("._0.txt", b"x"), ("0.txt", b"text"), (".DS_Store", b"x")]
    members += [("__MACOSX/0.png", b"x"), ("a/__MACOSX/._b.txt", b"x"), (".jpg", b"x")]
    data = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    assert keys(data.readable()) == ["0"]
    assert data.shards[0].unread == {"files of macOS": (5, "._0.png")}
    assert problems(data) == [("name that begins with a dot", "a.tar:.jpg", "")]


def test_members_that_do_not_stand_together(tmp_path):
    members = [("0.png", picture(1)), ("1.png", picture(2)), ("0.txt", b"zero"), ("2.txt", b"two")]
    data = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    assert data.report.counts == {"sample without caption": 2, "sample without picture": 2}
    apart = [p.where for p in data.report.problems if "members of a sample stand together" in p.detail]
    assert apart == ["a.tar:0", "a.tar:0"]


def test_names_from_outside_are_shown_in_one_line(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for name in ("two\nlines.png", "bad\udcff.png", "\x1b[31m.txt"):
            tar.addfile(tarfile.TarInfo(name))
    data = PairDataset([tmp_path / "a.tar"])
    assert [p.where for p in data.report.problems] == ["a.tar:two\\nlines", "a.tar:bad\ufffd", "a.tar:\\x1b[31m"]
    data.report.write(tmp_path / "report.jsonl")
    assert len((tmp_path / "report.jsonl").read_text("utf-8").splitlines()) == 3


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_folders_and_links_are_not_those_of_the_next_member(tmp_path, form):
    long = "d" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        folder, link = tarfile.TarInfo(f"{long}/"), tarfile.TarInfo("0.gif")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "l" * 150
        tar.addfile(folder)
        for name, contents in ((f"{long}/0.png", picture(1)), (f"{long}/0.txt", b"long"), ("1.png", picture(2))):
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
        tar.addfile(link)
        last = tarfile.TarInfo("1.txt")
        last.size = 3
        tar.addfile(last, io.BytesIO(b"one"))
    data = PairDataset([tmp_path / "a.tar"])
    assert keys(data.readable()) == [f"{long}/0", "1"]
    assert problems(data) == [("not a regular file", "a.tar:0.gif", "symbolic link")]


def test_sparse_members_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.0/0.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.png"}
        info.size = 512
        tar.addfile(info, io.BytesIO(b"1\n0\n7\n".ljust(512, b"\0")))
    old = tarfile.TarInfo("1.png")
    old.type, old.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # one more block of pieces
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    contents = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    contents += bytes(-len(contents) % 512) + bytes(header) + bytes(512) + b"x" * 512
    good = raw_tar(tmp_path / "b.tar", [("2.png", picture(1)), ("2.txt", b"two")]).read_bytes()
    (tmp_path / "a.tar").write_bytes(contents + good)
    data = PairDataset([tmp_path / "a.tar"])
    assert problems(data) == [("not a regular file", f"a.tar:{n}.png", "sparse file") for n in (0, 1)]
    assert keys(data.readable()) == ["2"]


def test_tars_that_were_appended_are_read(tmp_path):
    a, b = write_shards(tmp_path, 2, 2)
    (tmp_path / "both.tar").write_bytes(a.read_bytes() + b.read_bytes())
    data = PairDataset([tmp_path / "both.tar"])
    assert keys(data.readable()) == ["00000", "00001", "00002", "00003"]
    assert not data.report.counts


def test_an_empty_tar_has_no_pairs(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    assert len(PairDataset([tmp_path / "a.tar"])) == 0
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="no uncompressed tar"):
        PairDataset([tmp_path / "b.tar"])


def test_a_compressed_tar_says_so(tmp_path):
    path = write_shards(tmp_path, 1, 3)[0]
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a.tar.gz' is no uncompressed tar .*compressed with gzip: gunzip it"):
        PairDataset([tmp_path / "a.tar.gz"])
    with pytest.raises(ValueError, match=r"expected a tar file, got .*; cogview data pack makes tar files of a folder"):
        PairDataset([tmp_path])
    with ShardWriter(tmp_path / "b.tar") as writer:
        writer.write("BZh91", {"png": picture(1), "txt": b"a name that begins like bzip2's files"})
    assert len(PairDataset([tmp_path / "b.tar"])) == 1


def test_shards_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        raw_tar(tmp_path / folder / "0.tar", [("0.png", b"no picture"), ("0.txt", b"text")])
    data = PairDataset([tmp_path / folder / "0.tar" for folder in ("a", "b")])
    assert not list(data.readable())
    assert [p.where for p in data.report.problems] == [f"{tmp_path}/{folder}/0.tar:0" for folder in ("a", "b")]


def test_a_tar_that_cannot_be_read_now_says_nothing_of_its_pictures(tmp_path, monkeypatch):
    path = write_shards(tmp_path, 1, 3)[0]
    data = PairDataset([path])
    shard = data.shards[0]
    shard.check_unchanged()

    def reads():
        yield from (lambda: data.read_captions(2), lambda: data.captions(2), lambda: data.picture_bytes(2))
        yield from (lambda: data.picture(2, 8), lambda: list(data.pictures(8)), lambda: list(data.pictures(8, [2])))

    def fails(message: str) -> None:
        for read in reads():
            with pytest.raises(OSError, match=rf"^shard '.*000.tar': cannot be read \({message}"):
                read()
        assert not data.report.counts

    contents = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        fails("Input/output error")
    with monkeypatch.context() as patch:
        pread = os.pread
        patch.setattr(os, "pread", lambda file, size, offset: pread(file, size - 1, offset))
        fails(r"got \d+ of \d+ bytes")
    path.rename(tmp_path / "away")
    fails("No such file or directory")
    with pytest.raises(OSError, match=r"000\.tar': cannot be read"):
        shard.check_unchanged()
    assert [data[k] for k in range(3)] == [None] * 3  # a stream goes on
    assert data.report.counts == {"pair not read": 3}
    before = (tmp_path / "away").stat()
    for change in (contents, contents + bytes(512)):  # another file of the same times, a longer one
        path.write_bytes(change)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(OSError, match=r"^shard '.*000.tar' changed while it was read$"):
            shard.check_unchanged()
        path.unlink()
    (tmp_path / "away").rename(path)


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    path = write_shards(tmp_path, 1, 3)[0]
    data = PairDataset([path])
    os.truncate(path, int(data.shards[0].offsets[2].max()) + 1)
    assert data[2] is None
    assert data.report.counts == {"pair not read": 1}
    assert np.array_equal([p.key for p in data.readable()], ["00000", "00001"])


def test_a_shard_is_named_once(tmp_path, monkeypatch):
    path, other = write_shards(tmp_path, 2, 2)
    (tmp_path / "link.tar").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for same in (path, str(path), "000.tar", "./000.tar", "link.tar"):
        with pytest.raises(ValueError, match=rf"^paths: '.*{os.path.basename(same)}' is the same shard as .*000.tar'"):
            PairDataset([path, other, same])
    assert len(PairDataset([path, other])) == 4
