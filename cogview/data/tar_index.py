"""Where the samples of a tar lie: an index by offset, kept in a sidecar file.

The sidecar is `<shard>.index.npz` beside the shard, or in a cache folder if that one is read-only. It holds
the tar's size, inode and times and is rebuilt when one of them changes (tools can set the time of a change back, but
not that of the inode) or when it is damaged. Reading headers goes on after damaged blocks, so a corrupt or truncated
tar gives every member that is whole.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from cogview.data.files import written_beside
from cogview.data.samples import Samples
from cogview.data.tar_members import Problem, compressed, members

VERSION = 2


class ShardLost(OSError):
    """A shard cannot be read at the moment, or is another than it was: that says nothing of what is in it."""


@dataclass(frozen=True)
class TarIndex:
    """offsets, sizes: int64 [N, 3] by IMAGE, JSON, TEXT, offset -1 where a sample has no such member.
    Keys are UTF-8 in one byte array, each ending at key_ends (int64 [N]). problems: what is damaged or left out.
    unread: by extension how many members are of other kinds (features, say), and the first one's name."""

    path: Path
    offsets: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    problems: tuple[Problem, ...]
    unread: dict[str, tuple[int, str]]
    stamp: tuple[int, ...]
    places: list[Path] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None) -> "TarIndex":
        """The index of the tar at `path`, from its sidecar or by reading the tar's headers."""
        path = Path(path)
        if not path.is_file():
            hint = "; cogview data pack makes tar files of a folder" if path.is_dir() else ""
            raise ValueError(f"paths: expected a tar file, got {str(path)!r}{hint}")
        places = _sidecars(path, cache_dir)
        for place in places:
            if index := _load(path, place, places):
                return index
        index = dataclasses.replace(cls.build(path), places=places)
        index._save()
        return index

    @classmethod
    def build(cls, path: Path) -> "TarIndex":
        """Reads the headers of the tar at `path`, and nothing else of it."""
        stamp, samples = _stamp(path), Samples()
        with open(path, "rb") as file:
            for name, offset, size in members(file, stamp[1], samples.problems):
                samples.add(name, offset, size)
            if not samples.members and samples.problems:
                how = compressed(file) or samples.problems[0][0]
                raise ValueError(f"paths: {str(path)!r} is no uncompressed tar of samples ({how})")
        whole = samples.finish()
        return cls(
            path,
            np.array([sample.offsets for sample in whole], np.int64).reshape(-1, 3),
            np.array([sample.sizes for sample in whole], np.int64).reshape(-1, 3),
            np.frombuffer(b"".join(sample.key for sample in whole), np.uint8),
            np.cumsum([len(sample.key) for sample in whole], dtype=np.int64),
            tuple(samples.problems),
            samples.unread,
            stamp,
        )

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")

    def read(self, row: int, limits: Mapping[int, int]) -> dict[int, bytes]:
        """The members of one sample by column; ValueError if one is larger than its limit.

        ShardLost if they cannot be read now: that says nothing of what is in them.
        """
        contents = {}
        try:
            with open(self.path, "rb", buffering=0) as file:
                for column, limit in limits.items():
                    offset, size = int(self.offsets[row, column]), int(self.sizes[row, column])
                    if offset < 0:
                        continue
                    if size > limit:
                        raise ValueError(f"member: expected at most {limit} bytes, got {size}")
                    contents[column] = os.pread(file.fileno(), size, offset)
                    if (got := len(contents[column])) < size:
                        raise OSError(f"got {got} of {size} bytes; it has changed since it was opened")
        except OSError as error:
            raise _lost(self.path, error) from error
        return contents

    def check_unchanged(self) -> None:
        """ShardLost if the tar is not the one that was indexed, or gone."""
        if _stamp(self.path) != self.stamp:
            raise ShardLost(f"shard {str(self.path)!r} changed while it was read")

    @cached_property
    def digest(self) -> str:
        """sha256 of the whole tar, in hex; computed when first asked for, unless another process has by then, and kept
        in the sidecar."""
        for place in self.places:
            if (kept := _load(self.path, place, self.places)) and "digest" in kept.__dict__:
                return kept.digest
        try:
            with open(self.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _lost(self.path, error) from error
        self.check_unchanged()
        self._save(digest)
        return digest

    def _save(self, digest: str = "") -> None:
        arrays = {name: getattr(self, name) for name in ("offsets", "sizes", "keys", "key_ends")}
        notes = json.dumps([self.stamp, self.problems, self.unread, digest]).encode()
        for place in self.places:
            try:
                with written_beside(place) as beside, open(beside, "wb") as file:
                    np.savez(file, notes=np.frombuffer(notes, np.uint8), **arrays)
                break
            except OSError:  # read-only or full: the next place, else the next run reads the headers again
                continue


def _lost(path: Path, error: OSError) -> ShardLost:
    return ShardLost(f"shard {str(path)!r}: cannot be read ({error.strerror or error})")


def _sidecars(path: Path, cache_dir: str | Path | None) -> list[Path]:
    """Places for the sidecar, best first."""
    cache = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    return [path.with_name(path.name + ".index.npz"), cache / "cogview" / f"{name}.index.npz"]


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError as error:
        raise _lost(path, error) from error
    return VERSION, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _load(path: Path, place: Path, places: list[Path]) -> TarIndex | None:
    """None if there is no sidecar, or it is damaged or that of another tar."""
    stamp = _stamp(path)
    try:
        with np.load(place, allow_pickle=False) as file:
            kept, problems, unread, digest = json.loads(file["notes"].tobytes())
            if tuple(kept) != stamp:
                return None
            offsets, sizes, keys, ends = (file[name] for name in ("offsets", "sizes", "keys", "key_ends"))
        problems = tuple((str(kind), str(name), str(detail)) for kind, name, detail in problems)
        unread = {str(kind): (int(count), str(first)) for kind, (count, first) in unread.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return None
    shapes = keys.ndim == ends.ndim == 1 and offsets.shape == sizes.shape == (len(ends), 3)
    if not shapes or not bool(((offsets >= -1) & (sizes >= 0) & (offsets + sizes <= stamp[1])).all()):
        return None
    index = TarIndex(path, offsets, sizes, keys, ends, problems, unread, stamp, places)
    if digest:
        index.__dict__["digest"] = str(digest)  # where cached_property keeps it
    return index
