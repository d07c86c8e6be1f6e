"""What is in some shards: every pair read once, and what a user has to know of them before training."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cogview.data.ahead import ahead, cores
from cogview.data.captions import Captions
from cogview.data.images import open_image, pixels
from cogview.data.report import Problem, printable
from cogview.data.shards import NOT_READ, PairDataset
from cogview.data.tar_index import TarIndex
from cogview.progress import Update

SIDE = 128  # pixels of the first pictures, which are kept
BAD_SHARD, NO_SAMPLES = "shard not readable", "shard without samples"


class Caption(NamedTuple):
    sample: int
    language: str
    text: str


class _Look(NamedTuple):
    sample: int
    captions: Captions
    size: tuple[int, int] | None
    digest: bytes
    picture: Tensor | None


@dataclass
class Inspection:
    """What was found; problems, duplicates among them, are in the dataset's report."""

    readable: int = 0
    seconds: float = 0.0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    """Fields that hold text and were not asked for, by how many pairs have them."""
    captions: list[Caption] = field(default_factory=list)
    first: list[tuple[str, Tensor]] = field(default_factory=list)
    """Some captions with their pictures, uint8 [3, 128, 128]."""


def rate(count: int, seconds: float, what: str) -> str:
    """As "1,234 pairs a second on 8 cores"."""
    return f"{count / max(seconds, 1e-9):,.0f} {what} a second on {cores()} core{'s' * (cores() > 1)}"


def readable(paths: Sequence[Path]) -> tuple[list[Path], list[Problem]]:
    """Those paths that are tar files, and what is wrong with the others."""
    good, problems = list[Path](), list[Problem]()
    for path in paths:
        try:
            TarIndex.open(path)
            good.append(path)
        except (ValueError, OSError) as error:
            problems.append(Problem(BAD_SHARD, printable(str(path)), str(error)))
    return good, problems


def inspect(data: PairDataset, update: Update, keep: int = 24) -> Inspection:
    """Reads every pair, by all cores. update: is told the share that is done. keep: how many `first` takes."""
    found, begun, total = Inspection(), time.monotonic(), len(data)
    keys, pictures = dict[str, int](), dict[bytes, int]()

    for shard in data.shards:
        if not len(shard) and not shard.problems:
            data.report.add(NO_SAMPLES, printable(str(shard.path)))

    def look(index: int) -> _Look:
        try:
            captions, encoded = data.read_captions(index), data.picture_bytes(index)
        except OSError as error:
            data.report.add(NOT_READ, data.where(index), str(error), sample=index)
            return _Look(index, Captions({}, [], ()), None, b"", None)
        image = data.decode(index, encoded, SIDE)
        if encoded is None or image is None:
            return _Look(index, captions, None, b"", None)
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        return _Look(index, captions, open_image(encoded).size, digest, pixels(image, SIDE))

    for done, seen in enumerate(ahead(look, range(total)), 1):
        found.others.update(seen.captions.others)
        _same("duplicate key", data.key(seen.sample), keys, seen.sample, data)
        if seen.size is not None and seen.picture is not None:
            found.sizes[seen.size] += 1
            _same("duplicate picture", seen.digest, pictures, seen.sample, data)
            if texts := seen.captions.found:
                found.readable += 1
                found.languages.update(texts.keys())
                found.captions += [Caption(seen.sample, name, text) for name, text in texts.items()]
                if len(found.first) < keep:
                    found.first.append((next(iter(texts.values())), seen.picture))
        found.seconds = time.monotonic() - begun
        update(done / total, rate(done, found.seconds, "pairs"))
    return found


def _same(kind: str, what: str | bytes, before: dict, index: int, data: PairDataset) -> None:
    if (first := before.setdefault(what, index)) != index:
        other = "" if data.where(first) == data.where(index) else f", {data.where(first)}"
        data.report.add(kind, data.where(index), f"pair {index + 1}, the same as pair {first + 1}{other}", sample=index)
