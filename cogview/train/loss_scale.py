"""The factor of float16 gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = 2.0**16
LEAST = 2.0**-16  # below which it is not the scale that is wrong


class LossScale:
    """So that small gradients do not vanish: halved where one was not finite, doubled after `patience` good steps (the
    paper's training, "O2" of NVIDIA's apex). One of the loss; see `block_scales` for others."""

    name = "loss_scale"

    def __init__(self, patience: int) -> None:
        self.patience, self.value, self.good_steps = patience, FIRST, 0

    @property
    def of_loss(self) -> float:
        """What the loss is multiplied by."""
        return self.value

    def is_low(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is float16."""
        return True

    def factors(self, names: Sequence[str]) -> list[float]:
        """What gradients of some parameters have been multiplied by."""
        return [self.value] * len(names)

    def beside(self, bad: Sequence[str], names: Sequence[str]) -> list[str]:
        """Of some parameters those that a step goes on without where the gradients of the bad ones are not finite."""
        return []

    def update(self, finite: bool, bad: Sequence[str]) -> None:
        """After a step whose gradients were finite, or those of some parameters were not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(LEAST, self.value / 2)
        elif self.good_steps >= self.patience:
            self.value, self.good_steps = 2 * self.value, 0

    def stuck(self, steps: int) -> str:
        """In a sentence, what was now left out so many times in a row; "" if nothing."""
        return ""

    def said(self, name: str) -> str:
        """Behind a step in which the gradient of a parameter was not finite."""
        return f"; the loss scale is {self.value:g} from now on"

    def logged(self) -> dict[str, float]:
        return {"loss_scale": self.value}

    def tensor(self) -> Tensor:
        """float32 [2], for a checkpoint."""
        return torch.tensor([self.value, self.good_steps])

    def load(self, saved: Tensor) -> None:
        self.value, self.good_steps = saved.tolist()
