"""Held-out figures of a run, and which step had the best."""

import math
from typing import Any

import numpy as np
import torch

from cogview.config import TrainConfig
from cogview.train.feed import streams
from cogview.train.state import State
from cogview.train.task import Task


class Validation:
    """The last metrics of a task's held-out data, and the step that they are of."""

    def __init__(self, task: Task, config: TrainConfig):
        self.task, self.config = task, config
        self.metrics: dict[str, float] = {}
        self.step: int | None = None

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Of validate_samples, evenly from all there is and with the same draws every time; empty without any."""
        c, task = self.config, self.task
        if task.held_out is None:
            return {}
        outputs: list[Any] = []
        chosen = np.linspace(0, len(task.held_out) - 1, self._count).astype(np.int64)
        mine, at_once = task.ranks.rows(len(chosen)), c.batch_size // c.accumulate // task.ranks.parts
        task.model.eval()
        for start in range(0, -(-len(chosen) // task.ranks.parts), at_once):  # all processes alike often
            numbers = mine[start : start + at_once]
            some = numbers or range(1)  # that are not counted
            batch = task.batch(task.held_out, chosen[some], streams(some, c.seed), training=False)
            _, output = task.loss(batch, batch)
            outputs += [output] if numbers else []
        task.model.train()
        return task.metrics(outputs)

    def judge(self, state: State) -> bool:
        """Measures; whether the loss is the lowest so far, which the state then says."""
        self.metrics = self.measure()
        self.step = state.step if self.metrics else None
        loss = self.metrics.get("loss", math.nan)
        if not loss < (math.inf if state.best_loss is None else state.best_loss):
            return False
        state.best_step, state.best_loss = state.step, loss
        return True

    def header(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "metrics": self.metrics, "of": self._of()}

    def load(self, header: dict[str, Any] | None, state: State) -> None:
        """Takes a checkpoint's; where losses were of something else, none is the best any more."""
        if header is None:  # of before there was this
            return
        if header["of"] == self._of():
            self.step, self.metrics = header["step"], header["metrics"]
        else:
            if state.best_step is not None and self.task.ranks.first:
                print(f"held-out losses are of something else now: step {state.best_step:,} is the best no more")
            state.forget_best()

    @property
    def _count(self) -> int:
        """Of samples."""
        held_out = self.task.held_out
        return 0 if held_out is None else min(len(held_out), self.config.validate_samples)

    def _of(self) -> list[float | str]:
        """What losses are of, as JSON has it: while this is the same they can be compared."""
        held_out, c = self.task.held_out, self.config
        size, which = 0 if held_out is None else len(held_out), getattr(held_out, "digest", "")
        how = [f"mean of {c.loss_mean}"] * (c.loss_mean != "tokens") + ["averaged"] * (c.average is not None)
        return [size, self._count, c.text_weight, c.image_weight, which, *how]
