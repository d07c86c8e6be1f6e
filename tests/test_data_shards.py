import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogview.data.images import decode_image
from cogview.data.shards import PairDataset, ShardWriter
from cogview.data.shuffle import draws, hashes, permutation
from cogview.data.tar_index import TarIndex


def picture(number: int, size=(8, 8), kind="PNG") -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 7)).save(encoded, kind)
    return encoded.getvalue()


def write_shards(folder: Path, shards: int, samples: int) -> list[Path]:
    paths = []
    for shard in range(shards):
        paths.append(folder / f"{shard:03d}.tar")
        with ShardWriter(paths[-1]) as writer:
            for number in range(shard * samples, (shard + 1) * samples):
                members = {"png": picture(number), "json": json.dumps({"en": f"number {number}"}).encode()}
                writer.write(f"{number:05d}", members)
    return paths


def raw_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as anyone might make it, without the writer's checks."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def keys(pairs) -> list[str]:
    return [pair.key for pair in pairs]


def test_pairs_come_back(tmp_path):
    dataset = PairDataset(write_shards(tmp_path, 2, 3))
    assert len(dataset) == 6
    pair = dataset[4]
    assert (pair.key, pair.captions) == ("00004", {"en": "number 4"})
    assert (pair.image.mode, pair.image.getpixel((0, 0))) == ("RGB", (4, 0, 7))
    assert not dataset.report.counts
    with pytest.raises(IndexError, match="index: expected 0 to 5"):
        dataset[6]


def test_writer_is_deterministic_and_never_leaves_half_a_file(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a, b = write_shards(tmp_path / "a", 1, 5)[0], write_shards(tmp_path / "b", 1, 5)[0]
    assert a.read_bytes() == b.read_bytes()
    for key in ("../../x", "/x", "a.b", "", "a//b", "a/../b"):
        with pytest.raises(ValueError, match="key: expected"), ShardWriter(tmp_path / "c.tar") as writer:
            writer.write(key, {"png": b""})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("world_size", "threads", "window"), [(1, 1, 1), (3, 2, 2), (4, 1, 8)])
def test_ranks_cover_everything_once(tmp_path, world_size, threads, window):
    dataset = PairDataset(write_shards(tmp_path, 4, 11), window=window)
    for epoch in (0, 1):
        ranks = [
            keys(dataset.stream((epoch, 0), rank=r, world_size=world_size, threads=threads)) for r in range(world_size)
        ]
        whole = keys(dataset.stream((epoch, 0)))
        assert sorted(key for rank in ranks for key in rank) == [f"{i:05d}" for i in range(44)]
        assert all(ranks[r] == whole[r::world_size] for r in range(world_size))
    assert keys(dataset.stream((0, 0))) != keys(dataset.stream((1, 0)))
    assert keys(dataset.stream(seed=1)) != keys(dataset.stream(seed=2))


@pytest.mark.parametrize("stop", [0, 4, 13, 32, 44])
def test_resume_is_exact_for_any_number_of_ranks(tmp_path, stop):
    dataset = PairDataset(write_shards(tmp_path, 4, 11), window=2)
    whole = keys(dataset.stream((2, 0), seed=5))
    stream = dataset.stream((2, 0), seed=5, threads=3)
    assert keys(stream.take(stop)) == whole[:stop]
    state = stream.state
    if stop == 44:
        assert state == (3, 0)
        return
    assert state == (2, stop)
    for world_size in (1, 2, 5):
        fresh = PairDataset(dataset_paths(dataset), window=2)
        rest = [keys(fresh.stream(state, seed=5, rank=r, world_size=world_size)) for r in range(world_size)]
        assert all(rest[r] == whole[stop:][r::world_size] for r in range(world_size))


def dataset_paths(dataset: PairDataset) -> list[Path]:
    return [shard.path for shard in dataset.shards]


def test_ranks_stay_in_step_over_unreadable_samples(tmp_path):
    members = []
    for number in range(20):
        image = b"no picture" if number % 5 == 0 else picture(number)
        members += [(f"{number:02d}.png", image), (f"{number:02d}.txt", b"text")]
    dataset = PairDataset([raw_tar(tmp_path / "a.tar", members)])
    streams = [dataset.stream(rank=r, world_size=2) for r in range(2)]
    seen = []
    for _ in range(3):
        seen += [key for stream in streams for key in keys(stream.take(2))]
        assert streams[0].state == streams[1].state
    seen += keys(dataset.stream(streams[0].state))
    assert sorted(seen) == [f"{i:02d}" for i in range(20) if i % 5]
    assert dataset.report.counts == {"picture not readable": 4}


def test_corrupt_members_are_counted_and_skipped(tmp_path):
    bomb = bytearray(picture(0))
    bomb[16:24] = (9000).to_bytes(4, "big") * 2  # a small PNG that claims 9000 x 9000
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    path = raw_tar(
        tmp_path / "a.tar",
        [
            ("good.png", picture(1)),
            ("good.json", b'{"caption": "fine", "url": "x", "zh": 3}'),
            ("bad.png", picture(2)[:40]),
            ("bad.txt", b"half a picture"),
            ("bomb.png", bytes(bomb)),
            ("bomb.txt", b"huge"),
            ("notjson.png", picture(3)),
            ("notjson.json", b"{"),
            ("latin.png", picture(3)),
            ("latin.txt", b"caf\xe9"),
            ("blank.png", picture(3)),
            ("blank.txt", b"  "),
            ("alone.png", picture(4)),
            ("twice.png", picture(5)),
            ("twice.jpg", picture(6, kind="JPEG")),
            ("twice.txt", b"two pictures"),
            ("good2.webp", picture(7, kind="WEBP")),
            ("good2.npy", b"other members are ignored"),
            ("good2.txt", "文字".encode()),
        ],
    )
    dataset = PairDataset([path])
    pairs = {pair.key: pair.captions for pair in dataset.stream()}
    assert pairs == {
        "good": {"caption": "fine"},
        "twice": {"caption": "two pictures"},
        "good2": {"caption": "文字"},
    }
    assert dataset.report.counts == {
        "sample without caption": 4,
        "JSON not readable": 1,
        "caption not valid Unicode": 1,
        "blank caption": 1,
        "caption is no text": 1,
        "duplicate member": 1,
        "picture not readable": 1,
        "picture too large": 1,
    }
    assert any(p.where == "a.tar:bomb" and "9000 x 9000" in p.detail for p in dataset.report.problems)


def test_names_are_only_keys(tmp_path):
    folder = tmp_path / "deep" / "data"
    folder.mkdir(parents=True)
    names = ["../../x", "/tmp/absolute-x", "..", "C:\\x", "long" * 100, "k\u00e9y"]
    members = [m for n in names for m in ((f"{n}.png", picture(1)), (f"{n}.txt", b"text"))]
    before = set(tmp_path.rglob("*"))
    dataset = PairDataset([raw_tar(folder / "a.tar", members)])
    assert set(keys(dataset.stream())) >= {"../../x", "/tmp/absolute-x", "long" * 100, "k\u00e9y"}
    assert set(tmp_path.rglob("*")) - before == {folder / "a.tar", folder / "a.tar.index.npz"}
    assert not Path("/tmp/absolute-x.png").exists()


def test_links_and_devices_are_reported_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, contents in (("a.png", picture(1)), ("a.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    dataset = PairDataset([tmp_path / "a.tar"])
    assert keys(dataset.stream()) == ["a"]
    assert dataset.report.counts["not a regular file"] == 3


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.77])
def test_truncated_tar_gives_its_whole_members(tmp_path, kept):
    path = write_shards(tmp_path, 1, 20)[0]
    contents = path.read_bytes()
    path.write_bytes(contents[: int(len(contents) * kept)])
    dataset = PairDataset([path])
    found = sorted(keys(dataset.stream()))
    assert 3 <= len(found) < 20
    assert found == [f"{i:05d}" for i in range(len(found))]
    assert any("truncated" in kind for kind in dataset.report.counts)


def test_damaged_header_costs_only_its_sample(tmp_path):
    path = write_shards(tmp_path, 1, 10)[0]
    contents = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("00004.png").offset
    contents[header : header + 512] = os.urandom(512)
    path.write_bytes(contents)
    dataset = PairDataset([path])
    assert sorted(keys(dataset.stream())) == [f"{i:05d}" for i in range(10) if i != 4]
    assert dataset.report.counts == {"damaged header": 1, "sample without picture": 1}


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 1000)
    with pytest.raises(ValueError, match="no uncompressed tar"):
        PairDataset([tmp_path / "a.tar"])
    with pytest.raises(ValueError, match="paths: expected a tar file"):
        PairDataset([tmp_path / "missing.tar"])
    with pytest.raises(ValueError, match="paths: expected a non-empty list"):
        PairDataset([])
    with pytest.raises(ValueError, match="rank: expected 0 to 1"):
        PairDataset(write_shards(tmp_path, 1, 1)).stream(rank=2, world_size=2)


def test_index_is_kept_and_rebuilt_when_the_tar_changes(tmp_path, monkeypatch):
    path = write_shards(tmp_path, 1, 3)[0]
    sidecar = tmp_path / "000.tar.index.npz"
    PairDataset([path])
    with monkeypatch.context() as patch:
        patch.setattr(TarIndex, "build", None)  # would fail if it were called
        assert len(PairDataset([path])) == 3
    write_shards(tmp_path, 1, 5)
    assert len(PairDataset([path])) == 5
    for damage in (b"", b"garbage", sidecar.read_bytes()[:300]):
        sidecar.write_bytes(damage)
        assert len(PairDataset([path])) == 5
    lying = TarIndex.build(path)
    np.savez(
        sidecar,
        notes=np.load(sidecar)["notes"],
        offsets=lying.offsets,
        sizes=lying.sizes + 10**9,
        keys=lying.keys,
        key_ends=lying.key_ends,
    )
    assert len(PairDataset([path])[0].captions) == 1


def test_limits(tmp_path):
    path = write_shards(tmp_path, 1, 2)[0]
    small = PairDataset([path], max_image_bytes=20)
    assert small[0] is None
    assert PairDataset([path], max_pixels=63)[0] is None
    assert PairDataset([path], max_pixels=64)[0] is not None
    with pytest.raises(ValueError, match="expected at most 63 pixels, got 8 x 8"):
        decode_image(picture(0), max_pixels=63)
    with pytest.raises(ValueError, match="not a readable picture"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0")


def test_transparency_becomes_white():
    encoded = io.BytesIO()
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(encoded, "PNG")
    assert decode_image(encoded.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded.getvalue(), mode="RGBA").getpixel((0, 0))[3] == 0


def test_hashes_never_change():
    """A saved state points into these orders: the values are part of the format."""
    assert hashes(3, 1, 2).tolist() == [16613338946343043936, 5167718485781182436, 139405959784801653]
    assert np.array_equal(np.sort(permutation(1000, 7)), np.arange(1000))
    assert np.bincount(draws(6000, 6, 3)).min() > 850
    assert len(set(hashes(100000, 0).tolist())) == 100000
