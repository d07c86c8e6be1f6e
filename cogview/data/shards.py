"""Pairs of pictures and captions in tar shards (WebDataset layout), read by offset.

A shard is a plain tar; consecutive members that share a name up to its first dot are one sample:
`panda.webp`, `panda.json`. Captions: those fields of `.json` that are asked for ({"en": ..., "zh": ...} or
{"caption": ...}), and `.txt`, which is "caption". Member names are only keys: nothing is ever extracted.

Order of epoch e: the shards are shuffled, then cut into windows of `window` shards, and the samples of a
window are shuffled together; all of it a function of (seed, epoch) alone. Rank r of R takes positions
s + r, s + r + R, … of that order, s being the position resumed from, so the state (epoch, samples_seen)
is exact for any number of ranks and reading threads. Threads, not processes, decode: Pillow and
`read` release the GIL, and the report stays in one place.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from cogview.data.ahead import ahead
from cogview.data.captions import NO_JSON, Captions, none_in, read_captions, read_object
from cogview.data.files import written_beside
from cogview.data.filters import Filters
from cogview.data.images import MAX_BYTES, MAX_PIXELS, TooLarge, decode_image, open_image, pixels
from cogview.data.report import Report, printable
from cogview.data.samples import IMAGE, JSON, TEXT
from cogview.data.shuffle import permutation
from cogview.data.stream import Pair, PairStream, Position
from cogview.data.tar_index import TarIndex
from cogview.data.translation import Translation

LANGUAGES = ("caption", "en", "zh")  # fields that hold captions, where others are not asked for
MAX_CAPTION_BYTES = 1 << 20
NOT_READ = "pair not read"  # for a reason that says nothing of the pair
UNREADABLE = "pictures that cannot be read"
OF_PICTURES = TOO_LARGE, NO_PICTURE = "picture too large", "picture not readable"  # problems


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


class PairDataset:
    """Pairs of a list of shards, by number or as a stream that resumes exactly.

    paths: tar files, or their indexes. languages: the fields of a pair that count as its captions; its .txt is
    "caption". filters: which pictures and captions are good enough. translation: of captions. window: shards shuffled
    together. Images of more than max_image_bytes or max_pixels are refused. cache_dir: where indexes go if the shard's
    own folder is read-only. What cannot be used is counted in `report`, each problem of a sample once, and never fatal;
    a path that is no tar at all, or the same as another, is a ValueError. Where a shard cannot be read at the moment,
    which says nothing of what is in it, a ShardLost names it; only whole pairs count that, too.
    """

    def __init__(
        self,
        paths: Sequence[str | Path | TarIndex],
        *,
        languages: Sequence[str] = LANGUAGES,
        filters: Filters = Filters(),  # noqa: B008  # frozen
        translation: Translation | None = None,
        window: int = 8,
        max_image_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        cache_dir: str | Path | None = None,
    ):
        if isinstance(paths, (str, Path)) or not paths:
            raise ValueError(f"paths: expected a non-empty list of tar files, got {paths!r}")
        if isinstance(languages, str) or not languages or not all(languages):
            raise ValueError(f"languages: expected a non-empty list of names, got {languages!r}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 shard, got {window}")
        named: dict[Path, str | Path] = {}
        for path in (shard.path if isinstance(shard, TarIndex) else shard for shard in paths):
            if (place := Path(path).resolve()) in named:
                raise ValueError(f"paths: {str(path)!r} is the same shard as {str(named[place])!r}; name it once")
            named[place] = path
        self.shards = [path if isinstance(path, TarIndex) else TarIndex.open(path, cache_dir) for path in paths]
        self.languages = tuple(dict.fromkeys(languages))
        self.filters, self.translation = filters, translation
        self._read = self.languages
        if translation is not None:
            if translation.target not in self.languages:
                known = ", ".join(self.languages)
                raise ValueError(f"translate_to: expected one of the languages {known}, got {translation.target!r}")
            self._read = tuple(dict.fromkeys((*self.languages, translation.source)))
        self.window, self.max_image_bytes, self.max_pixels = window, max_image_bytes, max_pixels
        self.report = Report()
        names = Counter(shard.path.name for shard in self.shards)
        self._labels = {
            path: printable(path.name if names[path.name] == 1 else str(path)) for path in (s.path for s in self.shards)
        }
        for shard in self.shards:
            for kind, name, detail in shard.problems:
                self.report.add(kind, f"{self._labels[shard.path]}:{name}", detail)
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def numbers(self, shard: int) -> range:
        """The samples of a shard."""
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def chosen(self) -> dict[str, Any]:
        """What decides which samples there are, besides shards and languages, to name what is made with them."""
        filters = self.filters.made_with()
        translation = {} if self.translation is None else {"translation": self.translation.made_with()}
        return ({"filters": filters} if filters else {}) | translation

    def __getitem__(self, index: int) -> Pair | None:
        """Sample `index` in storage order; None, and an entry in `report`, if it cannot be read."""
        try:
            captions = self.captions(index)
            image = UNREADABLE if captions is None else self._image(index)
        except OSError as error:
            self.report.add(NOT_READ, self.where(index), str(error), sample=index)
            return None
        return None if captions is None or isinstance(image, str) else Pair(self.key(index), image, captions)

    def key(self, index: int) -> str:
        shard, row = self._place(index)
        return shard.key(row)

    def where(self, index: int) -> str:
        """A sample's shard and key, as the report names it."""
        shard, row = self._place(index)
        return self.named(shard, shard.key(row))

    def named(self, shard: TarIndex, key: str) -> str:
        """The same of a key in a shard."""
        return f"{self._labels[shard.path]}:{printable(key)}"

    def captions(self, index: int) -> dict[str, str] | None:
        """The captions of a sample by the fields asked for, read without its picture; None if it has none."""
        return self.captions_of([index])[0] or None

    def captions_of(self, indices: Sequence[int], left_out: Counter[str] | None = None) -> list[dict[str, str]]:
        """Those of some samples, translated together. left_out: counts samples without any, and what the filters leave
        out."""
        each = [self.read_captions(index).found for index in indices]
        if self.translation is not None:
            each = self.translation.added(each, self.translation.source in self.languages)
        dropped = Counter[str]() if left_out is None else left_out
        dropped["pairs without a caption"] += sum(not captions for captions in each)
        return [self.filters.suiting(captions, dropped) for captions in each]

    def read_captions(self, index: int) -> Captions:
        """Captions as they are, with what is wrong with them (which goes to `report` too) and what other fields hold
        text."""
        shard, row = self._place(index)
        members, problems = dict[int, bytes](), list[tuple[str, str]]()
        for column in (JSON, TEXT):
            try:
                members |= shard.read(row, {column: MAX_CAPTION_BYTES})
            except ValueError as error:
                problems.append(("caption file not readable", str(error)))
        captions = read_captions(members.get(JSON), members.get(TEXT), self._read)
        problems += captions.problems
        if not captions.found:
            problems.append(("sample without caption", none_in(captions, self._read)))
        for kind, detail in problems:
            self.report.add(kind, self.where(index), detail, sample=index)
        return captions._replace(problems=problems)

    def fields(self, index: int) -> Mapping[str, Any]:
        """A sample's JSON, which may hold more than captions; nothing where it has none that can be read."""
        shard, row = self._place(index)
        try:
            return read_object(shard.read(row, {JSON: MAX_CAPTION_BYTES}).get(JSON, b"{}"))
        except ValueError as error:
            self.report.add(NO_JSON, self.where(index), str(error), sample=index)
            return {}

    def picture_bytes(self, index: int) -> bytes | None:
        """The encoded picture of a sample; None, and an entry in `report`, if it is too large."""
        shard, row = self._place(index)
        try:
            return shard.read(row, {IMAGE: self.max_image_bytes})[IMAGE]
        except ValueError as error:
            self.report.add(TOO_LARGE, self.where(index), str(error), sample=index)
        return None

    def decode(self, index: int, data: bytes | None, side: int | None = None) -> Image.Image | None:
        """`decode_image` of a sample's picture; None, and an entry in `report`, if it cannot be decoded."""
        try:
            if data is not None:
                return decode_image(data, side=side, max_bytes=self.max_image_bytes, max_pixels=self.max_pixels)
        except ValueError as error:
            kind = TOO_LARGE if isinstance(error, TooLarge) else NO_PICTURE
            self.report.add(kind, self.where(index), str(error), sample=index)
        return None

    def picture(self, index: int, size: int) -> Tensor | str:
        """uint8 [3, size, size] of one picture, or why there is none: UNREADABLE, with an entry in `report`, or what
        the filters say."""
        image = self._image(index, size)
        return image if isinstance(image, str) else pixels(image, size)

    def _image(self, index: int, side: int | None = None) -> Image.Image | str:
        data = self.picture_bytes(index)
        if data is not None and self.filters.of_pictures:
            try:
                size = open_image(data, max_bytes=self.max_image_bytes, max_pixels=self.max_pixels).size
            except ValueError:  # as decoding says
                pass
            else:
                if why := self.filters.picture(size):
                    return why
        image = self.decode(index, data, side)
        return UNREADABLE if image is None else image

    def pictures(
        self,
        size: int,
        indices: Iterable[int] | None = None,
        *,
        threads: int | None = None,
        left_out: Counter[str] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, uint8 [3, size, size]) of those pictures of some samples (None: all) that can be read and pass the
        filters, in their order. left_out: counts the others, by kinds.

        Decoded by `threads` threads (default: all cores). Memory: for each thread the largest file and its picture,
        decoded (a JPEG at its reduced size), and four results. A decoded picture takes 3 or 4 bytes a pixel, and three
        times that while its transparency is resolved.
        """
        indices = range(len(self)) if indices is None else indices
        found = ahead(lambda index: (index, self.picture(index, size)), indices, threads)
        return _readable(found, Counter() if left_out is None else left_out)

    def readable(self, start: int = 0, end: int | None = None) -> Iterator[Pair]:
        """The readable ones of samples start to end (excluded; None: all), in storage order."""
        for index in self._range(start, end):
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
    ) -> PairStream:
        """The rest of the epoch that `state` = (epoch, samples_seen) points into, as this rank sees it."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if state[0] < 0 or not 0 <= state[1] <= len(self):
            raise ValueError(f"state: expected epoch >= 0 and samples_seen in 0..{len(self)}, got {tuple(state)}")
        position, order = Position(*state), self.order(seed, state[0])
        return PairStream(self.__getitem__, order, position, rank=rank, world_size=world_size, threads=threads)

    def _place(self, index: int) -> tuple[TarIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[number], index - int(self._starts[number])

    def _range(self, start: int, end: int | None) -> range:
        return range(start, len(self) if end is None else min(end, len(self)))


def _readable(found: Iterator[tuple[int, Tensor | str]], left_out: Counter[str]) -> Iterator[tuple[int, Tensor]]:
    for index, picture in found:
        if isinstance(picture, str):
            left_out[picture] += 1
        else:
            yield index, picture
