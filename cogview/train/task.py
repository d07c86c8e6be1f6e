"""What the loop trains: a task is a model, its samples, and the loss between them."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Samples(Protocol):
    """A list of samples and its orders."""

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Permutation of all indices, int64."""
        ...


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
    counts: dict[str, int]
    """Of what the log should tell besides losses; kept in checkpoints."""

    def batch(self, samples: Any, indices: np.ndarray, draws: torch.Generator) -> Any:
        """Some samples as the model takes them; its `chunk(n)` are n parts at most. What only training changes about
        them is left alone while the model is not training."""

    def loss(self, part: Any, batch: Any) -> tuple[Tensor, Any]:
        """The part's share of the batch's loss, and what `metrics` needs of it."""

    def metrics(self, outputs: list[Any]) -> dict[str, float]:
        """Of all the parts together, by name; one of them is "loss"."""

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before: recipe, config, data."""
