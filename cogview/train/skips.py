"""Steps that are not taken, since the loss or a gradient was not finite: where a row of them began."""

import math
import re
from collections.abc import Sequence
from typing import Any

from cogview.config import TrainConfig
from cogview.train.optimizer import Optimizer
from cogview.train.task import Task

MOST = 20  # in a row, after which a run is hopeless


class Skips:
    """Those in a row."""

    def __init__(self, task: Task, optimizer: Optimizer, config: TrainConfig):
        self.task, self.optimizer = task, optimizer
        self.count, self.words = 0, ""
        self._finite = True  # the loss that the words are of
        # float16 begins with a scale that is too large, and tries larger ones
        self._expected = optimizer.scale is not None and not config.watch

    def add(self, taken: bool, step: int, loss: float, parts: Sequence[Any]) -> str:
        """Takes note of a step, all processes together, and of the samples that it was of. Where a row begins, or its
        loss is not finite any more, a sentence about it that is worth saying, otherwise an empty one."""
        finite, first, scale = math.isfinite(loss), self.count == 0, self.optimizer.scale
        self.count = 0 if taken else self.count + 1
        if taken and scale is not None and (stuck := scale.stuck(MOST)):
            return f"step {step:,}: {stuck}, which they are left out of"
        if taken or not (first or self._finite > finite):
            return ""
        self._finite = finite
        self.words = f"step {step:,}: {self._gradient() if finite else self._loss(parts)}"
        return "" if finite and self._expected else f"{self.words}; the step is skipped"

    def _loss(self, parts: Sequence[Any]) -> str:
        where = "" if self.task.inside is None else self.task.inside.first_not_finite(parts)
        return "the loss is not finite" + (where and f"; first {where}")

    def _gradient(self) -> str:
        name, scale = self.optimizer.last_not_finite, self.optimizer.scale
        words = "the loss is finite, the norm of its gradients is not"
        if name is not None:
            place = re.sub(r"^stack\.layers\.(\d+)\.", lambda found: f"layer {int(found[1]) + 1}, ", name)
            words = f"the loss is finite, not so its gradients, in the backward first that of {place}"
        return words if scale is None else words + scale.said(name or "")

    def hopeless(self, step: int) -> str:
        """In a sentence, why a run is; "" while it is not."""
        if self.count < MOST:
            return ""
        return (
            f"the loss was not finite for {MOST} steps, up to step {step}: resume from the last checkpoint "
            f"with a lower learning_rate ({self.words})"
        )
