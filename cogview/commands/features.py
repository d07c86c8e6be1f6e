"""`cogview train-features`: a small network to see pictures with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from cogview.commands.console import console
from cogview.config import TrainConfig, require

_MOST_BYTES = 8 << 30  # of pictures, all of which are in memory


@dataclass(frozen=True)
class TrainFeatures:
    """Train a small convolutional network to tell the classes of pictures, whose features `cogview evaluate` compares
    pictures by; the same command goes on where it was stopped."""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")]
    """Tar shards of pairs to train on; not those that models are evaluated on."""
    label: tuple[str, ...]
    """Fields of the pairs' JSON that make a class together, inner ones behind dots: scene.first scene.background of the
    demo's scenes. Pairs without them are left out."""
    out: Path = Path("features.safetensors")
    """The network; its training stands in a folder beside it of the same name without the suffix."""
    pictures: int = 20_000
    """Pairs to take at most, drawn by chance."""
    side: int = 64
    """Pixels that pictures are cropped and resized to."""
    steps: int = 1_200
    """Of 64 pictures."""
    seed: int = 0
    """Of the first weights, of the order, and of which tenth is held out."""

    def run(self) -> None:
        import torch

        from cogview.data.shards import PairDataset
        from cogview.data.shuffle import permutation
        from cogview.evaluation import classifier
        from cogview.pictures import check_place
        from cogview.progress import track
        from cogview.train.interrupts import Interrupted

        require(self.out.suffix == ".safetensors", "out", "a name that ends in .safetensors", str(self.out))
        require(self.pictures >= 20, "pictures", "at least 20", self.pictures)
        require(32 <= self.side <= 1024, "side", "32 to 1,024 pixels", self.side)
        training = TrainConfig(steps=self.steps, seed=self.seed, **classifier.TRAINING)
        check_place(self.out)
        data = PairDataset(self.shards)
        count = min(self.pictures, len(data))
        fits = f"at most {_MOST_BYTES // (3 * self.side**2):,} of {self.side} pixels a side, {_MOST_BYTES >> 30} GB"
        require(count * 3 * self.side**2 <= _MOST_BYTES, "pictures", fits, count)
        chosen = permutation(len(data), self.seed)[: self.pictures].tolist()
        classes = {n: label for n in chosen if (label := label_of(data.fields(n), self.label)) is not None}
        fields = " and ".join(self.label)
        require(bool(classes), "label", f"fields of the pairs' JSON with a text or a number, {fields}", "none of them")
        found = dict(track(data.pictures(self.side, classes), "reading pictures", len(classes)))
        enough = "at least 10 pictures that can be read and have a class"
        require(len(found) >= 10, "shards", enough, f"{len(found)} ({data.report})")
        labels = [classes[n] for n in found]
        kinds, most = len(set(labels)), classifier.MOST
        require(2 <= kinds <= most, "label", f"fields of 2 to {most:,} different classes, {fields}", kinds)
        result, model = classifier.train(
            self.out, torch.stack(list(found.values())), labels, training, fields=self.label
        )
        if not result.finished:
            raise Interrupted
        right = result.validation["right"]
        left = len(chosen) - len(found)
        console.print(
            f"{self.out}: {model.config.features} features, {len(model.config.classes)} classes of {fields}; held out "
            f"{right:.1%} right; {len(found):,} pictures{f', {left:,} left out' if left else ''}"
        )


def label_of(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The values of some fields, one behind the other; None where one is not there, or neither text nor number."""
    values = list[str]()
    for name in names:
        value: Any = fields
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, str | int | float):
            return None
        values.append(str(value)[:100])
    return " ".join(values)
