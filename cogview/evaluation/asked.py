"""What models are asked to draw: captions of held-out pairs, drawn by chance, and their true pictures; and pictures of
these captions in a folder, whose names begin with the captions' numbers from 1 on, 000001.png."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogview.data.files import write_text
from cogview.data.numbered import pictures_in
from cogview.data.shards import PairDataset
from cogview.data.shuffle import permutation
from cogview.inputs import BadCaption, images
from cogview.system import System

BATCH = 64  # pictures that are there together


@dataclass(frozen=True)
class Asked:
    """N pairs of a data set, in an order of chance."""

    data: PairDataset
    numbers: list[int]
    captions: list[str]
    side: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> "Asked":
        return Asked(self.data, self.numbers[rows], self.captions[rows], self.side)

    def batches(self) -> Iterator[Tensor]:
        """The true pictures uint8 [B, 3, S, S], cropped to squares, BATCH at a time."""
        for start in range(0, len(self), BATCH):
            some = self.numbers[start : start + BATCH]
            yield torch.stack([picture for _, picture in self.data.pictures(self.side, some)])


def ask(data: PairDataset, systems: Sequence[System], count: int, seed: int) -> tuple[Asked, Counter[str]]:
    """The first `count` of the pairs, in an order of chance, whose picture can be read and whose caption all systems
    take, or as many as there are; and how many others came before, by kinds. Of several captions of a pair, as in two
    languages, one in turn."""
    left_out, numbers, captions = Counter[str](), list[int](), list[str]()
    side = systems[0].side
    for number in permutation(len(data), seed).tolist():
        if len(numbers) == count:
            break
        given = list((data.captions(number) or {}).values())
        if not given:
            left_out["pairs without a caption"] += 1
            continue
        caption = given[len(numbers) % len(given)]
        try:
            for system in systems:
                system.encode(caption)
        except BadCaption:
            left_out["captions that the models do not take"] += 1
            continue
        if isinstance(why := data.picture(number, side), str):
            left_out[why] += 1
            continue
        numbers.append(number)
        captions.append(caption)
    return Asked(data, numbers, captions, side), left_out


def name_of(number: int) -> str:
    """Of the picture of a caption, by the caption's number from 1 on."""
    return f"{number:06d}.png"


def write_captions(out: Path, captions: Sequence[str]) -> None:
    """For who lets another model draw them captions.jsonl, lines of file_name and caption, and for a human evaluation
    captions.txt, a caption a line."""
    named = ({"file_name": name_of(n), "caption": caption} for n, caption in enumerate(captions, 1))
    _write_lines(out / "captions.jsonl", [json.dumps(row, ensure_ascii=False) for row in named])
    _write_lines(out / "captions.txt", [" ".join(caption.replace("\0", " ").split()) for caption in captions])


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))


def compared(folder: Path, count: int) -> list[Path]:
    """Files of the captions 1 to `count` in a folder of --compare; ValueError names those that are missing."""
    found = pictures_in(folder, "compare")
    if missing := [number for number in range(1, count + 1) if number not in found]:
        few, more = ", ".join(map(str, missing[:5])), f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        wanted = f"pictures {name_of(1)} to {name_of(count)} in {folder}"
        raise ValueError(f"compare: expected {wanted}, got none of {few}{more}")
    return [found[number] for number in range(1, count + 1)]


def batches_of(paths: Sequence[Path], side: int) -> Iterator[Tensor]:
    """Pictures uint8 [B, 3, S, S] of files, cropped to squares and resized, BATCH at a time."""
    for start in range(0, len(paths), BATCH):
        yield images(list(paths[start : start + BATCH]), side)
