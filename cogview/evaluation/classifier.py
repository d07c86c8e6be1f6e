"""A small convolutional network that tells classes of pictures, trained here, to see pictures with: for scores of
pictures that are far from photographs, and where no published network is at hand.

Four convolutions of stride 2, each with a norm and GELU, and the mean over places: those are its features. A linear
layer makes logits of the classes of them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import TrainConfig, require
from cogview.data.images import resized
from cogview.data.shuffle import permutation
from cogview.tokenizers import stored
from cogview.train.loop import Result, Trainer
from cogview.train.ranks import ALONE

FORMAT = "cogview-features"
TRAINING: dict[str, Any] = {
    "batch_size": 64,
    "learning_rate": 3e-3,
    "final_rate": 0.02,
    "warmup": 0.05,
    "dtype": "float32",
    "save_seconds": 60.0,
    "validate_every": 250,
    "validate_samples": 1024,
}
"""Of a TrainConfig."""
_GROUPS, MOST = 8, 10_000  # channels are multiples of the one; classes at most


class Seen(NamedTuple):
    """What a network sees in N pictures."""

    features: Tensor
    """float32 [N, D]."""
    logits: Tensor | None
    """float32 [N, C] of its classes; None of a network that has none."""


@dataclass(frozen=True)
class ClassifierConfig:
    classes: tuple[str, ...]
    side: int = 64
    """Pixels that pictures are resized to."""
    width: int = 32
    """Channels of the first convolution; the second has twice, the third four times as many."""
    features: int = 64
    """Channels of the last one."""

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON has lists
        fits = len(set(self.classes)) == len(self.classes) and 2 <= len(self.classes) <= MOST
        require(fits, "classes", f"2 to {MOST:,} different ones", len(self.classes))
        require(32 <= self.side <= 1024, "side", "32 to 1,024 pixels", self.side)
        for name in ("width", "features"):
            value = getattr(self, name)
            fits = 0 < value <= 4096 and value % _GROUPS == 0
            require(fits, name, f"a multiple of {_GROUPS}, at most 4,096", value)


@dataclass(frozen=True)
class Trained:
    """What a network was trained on, as its file says."""

    fields: tuple[str, ...]
    """Of the pairs' JSON, which make a class together."""
    pictures: int
    """Trained on."""
    data: str
    """SHA-256 of all pictures and their classes, those held out too."""
    held_out: int
    """Pictures that it is judged by."""
    right: float
    """Share of these whose likeliest class is theirs."""

    def __post_init__(self):
        object.__setattr__(self, "fields", tuple(map(str, self.fields)))
        fits = all(type(n) is int and n >= 0 for n in (self.pictures, self.held_out))
        require(fits, "pictures, held_out", "whole numbers", (self.pictures, self.held_out))
        require(isinstance(self.data, str), "data", "a text", self.data)
        require(isinstance(self.right, float) and 0 <= self.right <= 1, "right", "a share", self.right)


class Classifier(nn.Module):
    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config, w = config, config.width
        layers = list[nn.Module]()
        for before, after in pairwise((3, w, 2 * w, 4 * w, config.features)):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(_GROUPS, after), nn.GELU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(config.features, len(config.classes))

    def forward(self, pictures: Tensor) -> Seen:
        """uint8 [N, 3, H, W], square."""
        side = self.config.side
        sized = pictures if pictures.shape[2:] == (side, side) else resized(pictures, side)
        features = self.layers(sized.float() / 127.5 - 1).mean(dim=(2, 3))
        return Seen(features, self.head(features))


class Labelled:
    """Pictures uint8 [N, 3, H, W] and their classes int64 [N], all or some rows, as samples."""

    def __init__(self, pictures: Tensor, classes: Tensor, rows: np.ndarray):
        self.pictures, self.classes, self.rows = pictures, classes, rows

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return permutation(len(self), seed, epoch)


@dataclass(frozen=True)
class LabelledBatch:
    pictures: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def chunk(self, count: int) -> list["LabelledBatch"]:
        parts = zip(self.pictures.chunk(count), self.classes.chunk(count), strict=True)
        return [LabelledBatch(*part) for part in parts]


class ClassifierTask:
    """As the loop trains it; the metrics are the loss and the share of pictures whose likeliest class is theirs."""

    title, unit, units, flops, ranks, inside = "feature network", "pictures", 1, 0, ALONE, None

    def __init__(self, model: Classifier, data: Labelled, held_out: Labelled):
        self.model, self.data, self.held_out, self.counts = model, data, held_out, dict[str, int]()
        self.digest = stored.digest({}, {"pictures": data.pictures, "classes": data.classes})

    def batch(
        self, samples: Labelled, indices: np.ndarray, draws: Sequence[torch.Generator], training: bool = True
    ) -> LabelledBatch:
        rows = samples.rows[indices]
        return LabelledBatch(samples.pictures[rows], samples.classes[rows])

    def loss(self, part: LabelledBatch, batch: LabelledBatch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = self.model(part.pictures).logits
        losses = F.cross_entropy(logits, part.classes, reduction="none")
        return losses.sum() / len(batch), (losses.detach(), logits.detach().argmax(dim=1) == part.classes)

    def compile(self) -> None:
        self.model.compile()

    def metrics(self, outputs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        losses, right = map(torch.cat, zip(*outputs, strict=True))
        return {"loss": float(losses.mean()), "right": float(right.float().mean())}

    def identity(self) -> dict[str, Any]:
        about = {"config": asdict(self.model.config), "data": len(self.data), "pictures": self.digest}
        return {"recipe": "features", **about}


def train(
    out: Path,
    pictures: Tensor,
    labels: Sequence[str],
    training: TrainConfig,
    *,
    fields: Sequence[str] = (),
    hold_out: float = 0.1,
    **sizes: int,
) -> tuple[Result, Classifier]:
    """Trains on pictures uint8 [N, 3, S, S] and their classes' names, but for a share that it is judged by; what is
    done stands in a folder named as `out` without its suffix, where the same call goes on. Writes `out` at the end.
    fields: where the names are from, which the file says. sizes: width and features, as ClassifierConfig has them."""
    classes = tuple(sorted(set(labels)))
    require(len(labels) == len(pictures), "labels", f"one for each of {len(pictures)} pictures", len(labels))
    number = {name: n for n, name in enumerate(classes)}
    torch.manual_seed(training.seed)
    model = Classifier(ClassifierConfig(classes, pictures.shape[-1], **sizes))
    order, held = permutation(len(labels), training.seed), int(len(labels) * hold_out)
    require(1 <= held < len(labels), "labels", "enough to hold some out, and to train on the others", len(labels))
    targets = torch.tensor([number[label] for label in labels])
    data, held_out = (Labelled(pictures, targets, rows) for rows in (order[held:], order[:held]))
    task = ClassifierTask(model, data, held_out)
    trainer = Trainer(task, training, out.with_suffix(""))
    trainer.resume()
    result = trainer.run()
    if result.finished:
        judged = min(held, training.validate_samples)
        trained = Trained(tuple(fields), len(data), task.digest, judged, result.validation["right"])
        stored.write(out, FORMAT, asdict(model.config), model.state_dict(), trained=json.dumps(asdict(trained)))
    return result, model.eval()


def read(path: Path) -> Classifier:
    """What `train` wrote; ValueError in one sentence of anything else."""
    config, tensors = stored.read(path, FORMAT)
    try:
        made = ClassifierConfig(**config)
    except TypeError as error:
        raise ValueError(f"features: {path} has no valid config ({error})") from error
    model = Classifier(made)
    stored.give(model, tensors, path)
    return model.eval().requires_grad_(False)


def trained_of(path: Path) -> Trained | None:
    """What the file that `train` wrote says of its training; None of one that says nothing."""
    said = stored.metadata_of(path).get("trained")
    try:
        return None if said is None else Trained(**json.loads(said))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"features: {path} has no valid record of its training ({error})") from error
