"""Pairs of pictures and captions in tar shards (WebDataset layout), read by offset.

A shard is a plain tar; consecutive members that share a name up to its first dot are one sample:
`panda.webp`, `panda.json`. Captions: `.json` with {"en": ..., "zh": ...} (two-letter language codes)
or {"caption": ...}, else `.txt`, UTF-8. Member names are only keys: nothing is ever extracted.

Order of epoch e: the shards are shuffled, then cut into windows of `window` shards, and the samples of a
window are shuffled together; all of it a function of (seed, epoch) alone. Rank r of R takes positions
s + r, s + r + R, … of that order, s being the position resumed from, so the state (epoch, samples_seen)
is exact for any number of ranks and reading threads. Threads, not processes, decode: Pillow and
`read` release the GIL, and the report stays in one place.
"""

import io
import json
import re
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cogview.data.files import written_beside
from cogview.data.images import MAX_BYTES, MAX_PIXELS, decode_image
from cogview.data.shuffle import permutation
from cogview.data.tar_index import IMAGE, JSON, TEXT, TarIndex

MAX_CAPTION_BYTES = 1 << 20
_LANGUAGE = re.compile(r"caption|[a-z]{2}(-[A-Za-z]{2,4})?")


class ShardWriter:
    """Writes one shard; the file appears under its name only when complete.

    Use as a context manager; `write(key, {"webp": bytes, "json": bytes})` adds a sample. The bytes of the
    tar depend on its contents alone (no times, no owners).
    """

    def __init__(self, path: str | Path):
        self._path = path
        self._stack = ExitStack()
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        beside = self._stack.enter_context(written_beside(self._path))
        self._tar = self._stack.enter_context(tarfile.open(beside, "w", format=tarfile.PAX_FORMAT))
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """key: relative, no dots, not written before, without empty parts. members: extension to contents."""
        if not re.fullmatch(r"[^./\\\0]+(/[^./\\\0]+)*", key) or key in self._keys:
            raise ValueError(f"key: expected a new relative name without dots, got {key!r}")
        self._keys.add(key)
        for extension, contents in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(contents)
            self._tar.addfile(info, io.BytesIO(contents))


@dataclass
class Report:
    """What could not be read: how often each kind of problem occurred, and the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, kind: str, where: str, detail: str = "") -> None:
        self.counts[kind] += 1
        if len(self.examples) < 20:
            self.examples.append(f"{where}: {kind}{f' ({detail})' if detail else ''}")

    def __str__(self) -> str:
        return "; ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items())) or "no problems"


def read_captions(as_json: bytes | None, as_text: bytes | None) -> dict[str, str]:
    """The captions of one sample by language; ValueError if there is none. JSON goes first."""
    if as_json is not None:
        try:
            fields = json.loads(as_json)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"caption: not JSON ({error})") from error
        if isinstance(fields, dict):
            named = {k: v.strip() for k, v in fields.items() if isinstance(v, str) and _LANGUAGE.fullmatch(k)}
            if captions := {k: v for k, v in named.items() if v}:
                return captions
    if as_text is not None and (text := as_text.decode("utf-8").strip()):
        return {"caption": text}
    raise ValueError('caption: expected "caption" or language codes with non-empty text')


class Pair(NamedTuple):
    key: str
    image: Image.Image  # RGB
    captions: dict[str, str]  # by language code, or "caption" where the language is not given


class Position(NamedTuple):
    epoch: int
    samples_seen: int  # positions of the epoch's order that all ranks together are done with


class PairDataset:
    """Pairs of a list of shards, by number or as a stream that resumes exactly.

    paths: tar files. window: shards shuffled together. Images of more than max_image_bytes or max_pixels are
    refused. cache_dir: where indexes go if the shard's own folder is read-only. Unreadable samples are
    counted in `report`, never fatal; a path that is no tar at all is a ValueError.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        window: int = 8,
        max_image_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        cache_dir: str | Path | None = None,
    ):
        if isinstance(paths, (str, Path)) or not paths:
            raise ValueError(f"paths: expected a non-empty list of tar files, got {paths!r}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 shard, got {window}")
        self.shards = [TarIndex.open(path, cache_dir) for path in paths]
        self.window, self.max_image_bytes, self.max_pixels = window, max_image_bytes, max_pixels
        self.report = Report()
        for shard in self.shards:
            for kind, name, detail in shard.problems:
                self.report.add(kind, f"{shard.path.name}:{name}", detail)
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Pair | None:
        """Sample `index` in storage order; None, and an entry in `report`, if it cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, row = self.shards[number], index - int(self._starts[number])
        key = shard.key(row)
        where = f"{shard.path.name}:{key}"
        try:
            contents = shard.read(row, {IMAGE: self.max_image_bytes, JSON: MAX_CAPTION_BYTES, TEXT: MAX_CAPTION_BYTES})
            captions = read_captions(contents.get(JSON), contents.get(TEXT))
            image = decode_image(contents[IMAGE], max_bytes=self.max_image_bytes, max_pixels=self.max_pixels)
        except (ValueError, OSError) as error:
            self.report.add("unreadable sample", where, str(error))
            return None
        return Pair(key, image, captions)

    def readable(self, start: int = 0, end: int | None = None) -> Iterator[Pair]:
        """The readable ones of samples start to end (excluded; None: all), in storage order."""
        for index in range(start, len(self) if end is None else min(end, len(self))):
            if (pair := self[index]) is not None:
                yield pair

    def order(self, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """The sample numbers of one epoch, int64, one array for each window of shards."""
        shards = permutation(len(self.shards), seed, epoch)
        for first in range(0, len(shards), self.window):
            chosen = shards[first : first + self.window]
            numbers = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
            yield numbers[permutation(len(numbers), seed, epoch, first + 1)]

    def stream(
        self,
        state: tuple[int, int] = (0, 0),
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
    ) -> "PairStream":
        """The rest of the epoch that `state` = (epoch, samples_seen) points into, as this rank sees it."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if state[0] < 0 or not 0 <= state[1] <= len(self):
            raise ValueError(f"state: expected epoch >= 0 and samples_seen in 0..{len(self)}, got {tuple(state)}")
        return PairStream(self, Position(*state), seed, rank, world_size, threads)


class PairStream(Iterator[Pair]):
    """One epoch of one rank. `state` is what to resume from after the pairs handed out so far.

    Iterating skips unreadable samples. With several ranks use `take`, which keeps them in step.
    """

    def __init__(self, dataset: PairDataset, state: Position, seed: int, rank: int, world_size: int, threads: int):
        self._dataset, self._start, self._world_size, self._taken = dataset, state, world_size, 0
        self._numbers = self._positions(dataset.order(seed, state.epoch), state.samples_seen + rank, world_size)
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = deque(self._pool.submit(dataset.__getitem__, i) for i in islice(self._numbers, 4 * threads))

    @staticmethod
    def _positions(order: Iterator[np.ndarray], position: int, step: int) -> Iterator[int]:
        for window in order:
            yield from map(int, window[position::step])
            position -= len(window)  # now counted from the start of the next window
            if position < 0:
                position %= step

    @property
    def state(self) -> Position:
        """With several ranks, save rank 0's: it is the last to finish an epoch."""
        if not self._ahead:
            return Position(self._start.epoch + 1, 0)
        return Position(self._start.epoch, self._start.samples_seen + self._taken * self._world_size)

    def take(self, n: int) -> list[Pair]:
        """The readable ones of this rank's next n positions; the epoch is over when `state.epoch` grows."""
        pairs = []
        for _ in range(n):
            if not self._ahead:
                break
            pair = self._ahead.popleft().result()
            for number in islice(self._numbers, 1):
                self._ahead.append(self._pool.submit(self._dataset.__getitem__, number))
            self._taken += 1
            if pair is not None:
                pairs.append(pair)
        return pairs

    def __next__(self) -> Pair:
        while self._ahead:
            if pairs := self.take(1):
                return pairs[0]
        self._pool.shutdown()
        raise StopIteration
