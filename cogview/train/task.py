"""What the loop trains: a task is a model, its samples, and the loss between them."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cogview.train.ranks import Ranks


class Samples(Protocol):
    """A list of samples and its orders."""

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Permutation of all indices, int64."""
        ...


class Inside(Protocol):
    """`watch.Inside` is that of Transformers. All processes ask together."""

    def largest(self, part: Any) -> dict[str, float]:
        """Absolute values in a forward of a part of a batch, by names for the log."""

    def first_not_finite(self, parts: Sequence[Any]) -> str:
        """The operation whose output it was in a forward of these parts, in words; empty where all were finite."""


class Task(Protocol):
    """`token_task.TokenTask` is that of all recipes, `tokenizers.train_image.PictureTask` the image tokenizer's."""

    @property
    def model(self) -> nn.Module:
        """Trained in place, on the device it is on."""

    data: Any
    """Samples to train on."""
    held_out: Any
    """Samples to validate on, or None."""
    title: str
    """Of the progress bar."""
    unit: str
    """What the log counts a second."""
    units: int
    """How many of them a sample has."""
    flops: int
    """Floating-point operations that the model takes for a sample, forward and backward; 0: not known."""
    counts: dict[str, int]
    """Of what the log should tell besides losses; kept in checkpoints."""

    @property
    def inside(self) -> Inside | None:
        """What can be told of the inside of the model; None: nothing."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share each batch; `ranks.ALONE` where it cannot be shared."""

    def batch(self, samples: Any, indices: np.ndarray, draws: Sequence[torch.Generator], training: bool = True) -> Any:
        """Some samples as the model takes them, what is drawn for each from a stream of its own; its `chunk(n)` are n
        parts at most. What only training changes about them is left alone where it is not. Called beside the training,
        which it may not change."""

    def loss(self, part: Any, batch: Any) -> tuple[Tensor, Any]:
        """The part's share of the loss of a batch, of all processes, and what `metrics` needs of it."""

    def compile(self) -> None:
        """Lets torch.compile have the model, or its layers."""

    def metrics(self, outputs: list[Any]) -> dict[str, float]:
        """Of all the parts of all processes together, by name; one of them is "loss"."""

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before: recipe, config, data."""
