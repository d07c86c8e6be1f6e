"""The factor of float16 gradients."""

from torch import Tensor

FIRST = 2.0**16
LEAST = 2.0**-16  # below which it is not the scale that is wrong


class LossScale:
    """So that small gradients do not vanish: halved where one was not finite, doubled after `patience` good steps (the
    paper's training, "O2" of NVIDIA's apex). The loss has one; a block of layers could have its own."""

    def __init__(self, patience: int) -> None:
        self.patience, self.value, self.good_steps = patience, FIRST, 0

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(LEAST, self.value / 2)
        elif self.good_steps >= self.patience:
            self.value, self.good_steps = 2 * self.value, 0

    def tensor(self) -> Tensor:
        """float32 [2], for a checkpoint."""
        return Tensor([self.value, self.good_steps])

    def load(self, saved: Tensor) -> None:
        self.value, self.good_steps = saved.tolist()
