"""Pictures decoded once: some samples of a data set at one size, in a file that is mapped, not read."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogview.data.files import written_beside
from cogview.data.parts import part_name
from cogview.data.shards import PairDataset
from cogview.progress import track


class Decoded:
    """numbers: int64 [N], samples of the data set, ascending. images: uint8 [N, 3, size, size]. name: of what they are
    from."""

    def __init__(self, numbers: np.ndarray, images: Tensor, name: str):
        self.numbers, self.images, self.name = numbers, images, name
        self._rows = {int(number): row for row, number in enumerate(numbers)}

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def __getitem__(self, number: int) -> Tensor:
        """The picture of a sample, uint8 [3, size, size]."""
        return self.images[self._rows[number]]

    @classmethod
    def of(cls, data: PairDataset, numbers: np.ndarray, size: int, folder: Path) -> "Decoded":
        """The readable ones of some samples, decoded by all cores, or as they were decoded before. ValueError if there
        is none; others that `folder` holds are removed."""
        shards, filters = [shard.digest for shard in data.shards], data.filters.made_with()
        which = {"filters": filters} if filters else {}
        name = part_name(shards=shards, size=size, numbers=numbers.tolist(), **which)
        images_path = folder / f"{name}.npy"
        numbers_path = images_path.with_suffix(".numbers.npy")
        if not (numbers_path.exists() and images_path.exists()):
            remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            found: list[int] = []
            with written_beside(images_path) as beside:
                shape = (len(numbers), 3, size, size)
                images = np.lib.format.open_memmap(beside, "w+", np.uint8, shape)
                pictures = data.pictures(size, track(numbers.tolist(), "reading pictures"))
                for row, (number, picture) in enumerate(pictures):
                    images[row] = picture.numpy()
                    found.append(number)
                images.flush()
                for shard in data.shards:
                    shard.check_unchanged()
            with written_beside(numbers_path) as beside, open(beside, "wb") as file:
                np.save(file, np.array(found, np.int64))
        numbers = np.load(numbers_path, allow_pickle=False)
        if not len(numbers):
            raise ValueError(f"dataset: no readable picture ({data.report})")
        images = np.load(images_path, mmap_mode="c", allow_pickle=False)[: len(numbers)]  # never written to
        return cls(numbers, torch.from_numpy(images), name)


def remove(folder: Path) -> None:
    """Deletes what was decoded into a folder."""
    for path in [*folder.glob("*.npy"), *folder.glob(".*.tmp")]:  # the last of a killed process
        path.unlink()
    if folder.exists():
        folder.rmdir()
