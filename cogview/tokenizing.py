"""One shard of pairs as one part of a folder of tokens: what it is made with, and how."""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.config import require
from cogview.data.crops import Both, Crops, Reduced, Row, Squares, Whole
from cogview.data.decoded import Decoded
from cogview.data.parts import PartWriter, group, part_name
from cogview.data.shards import OF_PICTURES, PairDataset
from cogview.data.tar_index import TarIndex
from cogview.data.tokens import VERSION
from cogview.tokenizers.image_tokenizer import ImageTokenizer
from cogview.tokenizers.text import TextTokenizer

_GRIDS = {"codes": "grid", "small": "small_grid"}  # as meta.json calls those of the rows' codes
_TOGETHER = 1024  # samples whose captions are read, and translated, at once


@dataclass
class Tokenizing:
    """How pairs become tokens. See `pipeline.tokenize_pairs` for what each is."""

    text: TextTokenizer
    image: ImageTokenizer
    image_size: int = 64
    max_text: int = 64
    crops: Crops | Reduced | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        step = self.image.config.downsample
        require(self.image_size % step == 0, "image_size", f"a multiple of {step}", self.image_size)
        self.grids = {"codes": self.image_size // step}
        """Codes along a side, by the array that they are for."""
        if self.crops is not None:
            times = self.crops.times if isinstance(self.crops, Reduced) else 2
            both = times * step
            require(self.image_size % both == 0, "image_size", f"a multiple of {both} for pairs", self.image_size)
            if isinstance(self.crops, Crops):
                self.crops.check(self.image_size, both)
            self.grids["small"] = self.grids["codes"] // times
        self.image.eval()
        self.made_by = {"text_sha256": self.text.sha256, "image_sha256": self.image.sha256}
        most = (128 * 64**2) // self.image_size**2 // (self.crops.count if isinstance(self.crops, Crops) else 1)
        self.batch = max(1, most) if self.batch is None else self.batch

    def made_with(self, data: PairDataset) -> dict[str, Any]:
        """All that the tokens of a shard depend on besides its contents."""
        settings: dict[str, Any] = {
            "languages": list(data.languages),
            "image_size": self.image_size,
            "max_text": self.max_text,
            **self.made_by,
        }
        if self.crops is not None:
            settings["crops"] = asdict(self.crops)
        return settings | data.chosen()

    def settings(self, data: PairDataset) -> dict[str, Any]:
        """The same, and the sizes, as `complete` takes them."""
        sizes = {"text_vocab_size": self.text.vocab_size, "codebook_size": self.image.config.codebook_size}
        if self.text.chinese_from is not None:
            sizes["chinese_from"] = self.text.chinese_from
        grids = {_GRIDS[key]: [grid, grid] for key, grid in self.grids.items()}
        return {**self.made_with(data), **sizes, **grids}

    def part(self, data: PairDataset, shard: TarIndex) -> str:
        """The name of a shard's."""
        return part_name(version=VERSION, shard=shard.digest, **self.made_with(data))

    def write(
        self,
        data: PairDataset,
        number: int,
        out: Path,
        tell: Callable[[int], Any],
        *,
        threads: int | None = None,
        decoded: Decoded | None = None,
    ) -> None:
        """Writes the part of shard `number`. tell: is told how many further pairs are done. threads: that decode."""
        shard, numbers = data.shards[number], data.numbers(number)
        with PartWriter(out, self.part(data, shard), {key: grid**2 for key, grid in self.grids.items()}) as writer:
            texts, skipped = self._texts(data, numbers)
            size = self.image_size * (2 if isinstance(self.crops, Crops) else 1)
            pictures = _pictures(data, list(texts), size, decoded, threads, skipped)
            last = numbers.start
            for k, rows in self._codes(pictures, self._rows(shard, numbers.start)):
                ids, hashed = texts[k]
                for caption, codes in itertools.product(ids, rows):
                    writer.write(caption, codes, hashed)
                if k + 1 - last >= (self.batch or 1):
                    tell(k + 1 - last)
                    last = k + 1
            shard.check_unchanged()
            writer.finish(skipped, _problems(data, numbers, texts))
        tell(numbers.stop - last)

    def _texts(self, data: PairDataset, numbers: range) -> "tuple[Texts, Counter[str]]":
        """Of the samples that have a caption of at most max_text tokens, and how many have none."""
        found: Texts = {}
        skipped = Counter[str]()
        too_long = f"captions of more than {self.max_text} tokens"
        for start in range(0, len(numbers), _TOGETHER):
            some = numbers[start : start + _TOGETHER]
            for number, captions in zip(some, data.captions_of(some, skipped), strict=True):
                ids = [self.text.encode(caption) for caption in captions.values()]
                fitting = [caption for caption in ids if len(caption) <= self.max_text]
                skipped[too_long] += len(ids) - len(fitting)
                if fitting:
                    found[number] = fitting, group(next(iter(captions.values())))
        return found, skipped

    def _rows(self, shard: TarIndex, first: int) -> Whole:
        if self.crops is None:
            return Whole()
        if isinstance(self.crops, Reduced):
            return Both(self.crops)
        return Squares(self.crops, 2 * self.image.config.downsample, int(shard.digest[:15], 16), first)

    def _codes(self, pictures: Iterator[tuple[int, Tensor]], of: Whole) -> Iterator[tuple[int, list[Row]]]:
        """(number, rows) of pictures, `batch` of which are encoded at once."""
        while some := list(itertools.islice(pictures, self.batch)):
            parts = [of.pictures(number, picture) for number, picture in some]
            codes = {key: self._encoded(torch.cat([part[key] for part in parts])) for key in parts[0]}
            each = {key: len(rows) for key, rows in parts[0].items()}
            for n, (number, _) in enumerate(some):
                rows = {key: c[n * each[key] : (n + 1) * each[key]] for key, c in codes.items()}
                yield number, of.rows(number, rows)

    def _encoded(self, images: Tensor) -> np.ndarray:
        """int32 [N, h w] of uint8 images."""
        with torch.inference_mode():
            return self.image.encode(images.float() / 255).flatten(1).to(torch.int32).numpy()


Texts = dict[int, tuple[list[list[int]], int]]
"""By sample: the ids of its captions, and a hash of the first."""


def _pictures(
    data: PairDataset,
    numbers: list[int],
    size: int,
    decoded: Decoded | None,
    threads: int | None,
    skipped: Counter[str],
) -> Iterator[tuple[int, Tensor]]:
    """(number, uint8 [3, size, size]) of the samples whose pictures come, ascending. skipped: counts the others."""
    if decoded is None:
        return data.pictures(size, numbers, threads=threads, left_out=skipped)
    known = ((number, decoded[number]) for number in numbers if number in decoded)
    others = [number for number in numbers if number not in decoded]
    read = data.pictures(size, others, threads=threads, left_out=skipped)
    return heapq.merge(known, read, key=lambda pair: pair[0])


def _problems(data: PairDataset, numbers: range, texts: Texts) -> dict[str, tuple[int, str]]:
    """Of some samples: by kind how many there are, and the key of the first that has it."""
    found: dict[str, tuple[int, str]] = {}
    for number in numbers:
        for problem in data.report.of(number):
            if problem.kind in OF_PICTURES and number not in texts:
                continue  # seen when an image tokenizer was trained here: its picture is none of this part's
            count, first = found.get(problem.kind, (0, data.key(number)))
            found[problem.kind] = count + 1, first
    return found
