"""Where the samples of a tar lie: an index by offset, kept in a sidecar file.

The sidecar is `<shard>.index.npz` beside the shard, or in a cache folder if that one is read-only. It holds
the tar's size and modification time and is rebuilt when they change or when it is damaged. Reading headers
goes on after damaged blocks, so a corrupt or truncated tar gives every member that is whole.
"""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cogview.data.files import written_beside
from cogview.data.images import EXTENSIONS

VERSION = 1
IMAGE, JSON, TEXT = range(3)  # columns of the offsets
_COLUMN = dict.fromkeys(EXTENSIONS, IMAGE) | {"json": JSON, "txt": TEXT}
_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME = 1 << 16

Problem = tuple[str, str, str]  # kind, name, detail


@dataclass(frozen=True)
class TarIndex:
    """offsets, sizes: int64 [N, 3] by IMAGE, JSON, TEXT, offset -1 where a sample has no such member.
    Keys are UTF-8 in one byte array, each ending at key_ends (int64 [N])."""

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    problems: tuple[Problem, ...]

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None) -> "TarIndex":
        """The index of the tar at `path`, from its sidecar or by reading the tar's headers."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"paths: expected a tar file, got {str(path)!r}")
        places = _sidecars(path, cache_dir)
        for place in places:
            if index := _load(path, place):
                return index
        index = cls.build(path)
        for place in places:
            try:
                _save(index, place)
                break
            except OSError:  # read-only or full: the next place, else the next run reads the headers again
                continue
        return index

    @classmethod
    def build(cls, path: Path) -> "TarIndex":
        """Reads the headers of the tar at `path`, and nothing else of it."""
        problems: list[Problem] = []
        keys: list[bytes] = []
        rows: list[tuple[list[int], list[int]]] = []
        with open(path, "rb") as file:
            for name, offset, size in _members(file, path.stat().st_size, problems):
                folder, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                column = _COLUMN.get(extension.lower())
                if column is None:
                    continue  # other members of a sample (features, metadata) are not ours to judge
                key = (f"{folder}/{stem}" if folder else stem).encode("utf-8", "surrogateescape")
                if not keys or keys[-1] != key:
                    keys.append(key)
                    rows.append(([-1] * 3, [0] * 3))
                if rows[-1][0][column] >= 0:
                    problems.append(("duplicate member", _printable(name), ""))
                    continue
                rows[-1][0][column], rows[-1][1][column] = offset, size
        if not rows and problems:
            raise ValueError(f"paths: {str(path)!r} is no uncompressed tar of samples ({problems[0][0]})")
        whole = []
        for key, row in zip(keys, rows, strict=True):
            if row[0][IMAGE] >= 0 and max(row[0][JSON], row[0][TEXT]) >= 0:
                whole.append((key, row))
            else:
                missing = "picture" if row[0][IMAGE] < 0 else "caption"
                problems.append((f"sample without {missing}", _printable(key.decode("utf-8", "replace")), ""))
        return cls(
            path,
            np.array([offsets for _, (offsets, _) in whole], np.int64).reshape(-1, 3),
            np.array([sizes for _, (_, sizes) in whole], np.int64).reshape(-1, 3),
            np.frombuffer(b"".join(key for key, _ in whole), np.uint8),
            np.cumsum([len(key) for key, _ in whole], dtype=np.int64),
            tuple(problems),
        )

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")

    def read(self, row: int, limits: Mapping[int, int]) -> dict[int, bytes]:
        """The members of one sample by column; ValueError if one is larger than its limit."""
        contents = {}
        with open(self.path, "rb", buffering=0) as file:
            for column, limit in limits.items():
                offset, size = int(self.offsets[row, column]), int(self.sizes[row, column])
                if offset < 0:
                    continue
                if size > limit:
                    raise ValueError(f"member: expected at most {limit} bytes, got {size}")
                contents[column] = os.pread(file.fileno(), size, offset)
        return contents


def _sidecars(path: Path, cache_dir: str | Path | None) -> list[Path]:
    """Places for the sidecar, best first."""
    cache = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    return [path.with_name(path.name + ".index.npz"), cache / "cogview" / f"{name}.index.npz"]


def _stamp(path: Path) -> np.ndarray:
    stat = path.stat()
    return np.array([VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def _save(index: TarIndex, place: Path) -> None:
    arrays = {name: getattr(index, name) for name in ("offsets", "sizes", "keys", "key_ends")}
    problems = np.array(index.problems, dtype=np.str_).reshape(-1, 3)
    with written_beside(place) as beside, open(beside, "wb") as file:
        np.savez(file, stamp=_stamp(index.path), problems=problems, **arrays)


def _load(path: Path, place: Path) -> TarIndex | None:
    """None if there is no sidecar, or it is damaged or that of another tar."""
    try:
        with np.load(place, allow_pickle=False) as file:
            if not np.array_equal(file["stamp"], _stamp(path)):
                return None
            problems = tuple((str(kind), str(name), str(detail)) for kind, name, detail in file["problems"])
            index = TarIndex(path, file["offsets"], file["sizes"], file["keys"], file["key_ends"], problems)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    n, size = len(index), path.stat().st_size
    shapes = index.offsets.shape == index.sizes.shape == (n, 3) and index.keys.ndim == index.key_ends.ndim == 1
    ends = index.offsets + index.sizes
    inside = shapes and bool(((index.offsets >= -1) & (index.sizes >= 0) & (ends <= size)).all())
    return index if inside else None


def _printable(name: str) -> str:
    return name.encode("utf-8", "replace").decode()[:200]


def _members(file: BinaryIO, end: int, problems: list[Problem]) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file that lies whole in the tar."""
    position, long_name, damaged = 0, None, False
    while position + _BLOCK <= end:
        file.seek(position)
        block = file.read(_BLOCK)
        position += _BLOCK
        if damaged and block[257:262] != b"ustar":
            continue  # look for the next header
        if block == bytes(_BLOCK):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not damaged:
                problems.append(("damaged header", f"byte {position - _BLOCK}", ""))
            damaged = True
            continue
        damaged = False
        offset, position = position, position + -(-header.size // _BLOCK) * _BLOCK
        name = long_name or header.name
        if header.size < 0 or offset + header.size > end:
            problems.append(("truncated member", _printable(name), f"{header.size} bytes"))
            position = offset
            damaged = True
        elif header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if header.size > _MAX_NAME:
                problems.append(("oversized name", f"byte {offset}", f"{header.size} bytes"))
            else:
                long_name = _long_name(header.type, file.read(header.size)) or long_name
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            long_name = None
            yield name, offset, header.size
        elif header.type not in (tarfile.XGLTYPE, tarfile.DIRTYPE):
            long_name = None
            problems.append(("not a regular file", _printable(name), ""))
    problems.append(("truncated tar", f"byte {end}", "no end mark"))


def _long_name(kind: bytes, contents: bytes) -> str | None:
    """The name held by a GNU long-name member, or by the `path` record of a PAX header ("17 path=...\\n")."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return contents.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while contents:
        length, _, _ = contents.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(contents):
            return None
        record, contents = contents[: int(length)], contents[int(length) :]
        keyword, _, value = record[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        if keyword == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None
