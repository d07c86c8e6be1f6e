"""Which checkpoint a run goes on from, and what it takes from it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.train import checkpoint
from cogview.train.checkpoint import Damaged
from cogview.train.damage import aside
from cogview.train.optimizer import Optimizer
from cogview.train.ranks import Ranks


class Found:
    """A checkpoint that is whole: `path`, `header`, and for a process alone its `tensors`."""

    def __init__(self, path: Path, ranks: Ranks):
        """Damaged, on all processes, where any has found so."""
        self.path, self.ranks, self.tensors = path, ranks, dict[str, Tensor]()
        if ranks.mesh is None:
            self.tensors, self.header = checkpoint.read(path)
            self.shapes = checkpoint.shapes(self.tensors)
            return
        ranks.alike(self._check)
        from cogview.train import shards

        self.header, self.shapes = checkpoint.read_header(path), shards.shapes(path)

    def _check(self) -> None:
        """This process's part of the files; a file the first process."""
        if self.path.is_dir():
            if wrong := checkpoint.folder_damage(self.path, self.ranks.rank, self.ranks.count):
                raise Damaged(wrong)
        elif self.ranks.first:
            checkpoint.read(self.path)
            checkpoint.check_version(self.path)

    def load(self, optimizer: Optimizer, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gives a run's optimizer and some other tensors, by name, what they had; random states are in the result."""
        if self.ranks.mesh is None:
            optimizer.load(self.tensors)
            for name, value in others.items():
                value.copy_(self.tensors[name])
            return self.tensors
        from cogview.train import shards

        places = {**optimizer.places(self.shapes), **others}
        small = [name for name in self.shapes if name.startswith("random.")]
        places |= {name: torch.zeros(self.shapes[name], dtype=torch.uint8) for name in small}
        shards.load_into({name: value for name, value in places.items() if name in self.shapes}, self.path, self.ranks)
        optimizer.load_rest(places, self.shapes)
        return places


def find(paths: list[Path], ranks: Ranks) -> tuple[Found | None, dict[Path, Damaged]]:
    """The newest checkpoint that is whole, and those behind it that are not. Damaged when all are."""
    damaged: dict[Path, Damaged] = {}
    for path in reversed(paths):
        try:
            return Found(path, ranks), damaged
        except Damaged as error:
            damaged[path] = error
    if damaged:
        folder = paths[0].parent
        raise Damaged(f"{folder}: no checkpoint can be read: {'; '.join(map(str, damaged.values()))}")
    return None, {}


def set_aside(damaged: dict[Path, Damaged], step: int) -> None:
    """What is damaged is kept, and said."""
    for bad, reason in damaged.items():
        print(f"{reason}; it is kept as {bad.rename(aside(bad)).name}, and step {step:,} taken")


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of what a model draws of its own."""
    found = {"random.cpu": torch.get_rng_state()}
    return found | ({"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(tensors: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
