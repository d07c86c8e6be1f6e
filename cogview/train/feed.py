"""Which samples each step of a training takes, and what is drawn for them.

Both are functions of the seed, the step and the sample's number in its batch alone, however a batch is divided among
processes and parts. So the next batch can be made while a step is computed.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cogview.config import TrainConfig
from cogview.data.shuffle import hashes
from cogview.train.state import State
from cogview.train.task import Task

Place = tuple[int, int, int]
"""A step, and the epoch and the samples of it that the steps before have seen."""


def streams(rows: range, *key: int) -> list[torch.Generator]:
    """A stream of random numbers for each of some samples, which (key, number) decide."""
    return [torch.Generator().manual_seed(int(n)) for n in hashes(rows.stop, *key)[rows.start :]]


def _be_alone() -> None:
    """Has what this thread computes computed by it alone."""
    torch.get_num_threads()  # the first time it would undo what follows
    torch.set_num_threads(1)


class Feed:
    """Of a task's training data, this process's rows."""

    def __init__(self, task: Task, config: TrainConfig):
        self.task, self.config, self.rows = task, config, task.ranks.rows(config.batch_size)
        self._order: tuple[int, np.ndarray] | None = None  # of which epoch
        self._thread = ThreadPoolExecutor(1, "feed")
        # Without a team of OpenMP's: with more threads than processors those of no team wait by spinning any more.
        threads = torch.get_num_threads()
        self._thread.submit(_be_alone).result()
        torch.set_num_threads(threads)  # which is also what other threads begin with
        self._ahead: tuple[Place, Future[Any]] | None = None

    def next(self, state: State) -> Any:
        """The batch of the step behind a state, which then has seen it."""
        here = state.step, state.epoch, state.samples_seen
        indices, epoch, seen = self._indices(*here[1:])
        if self._ahead is not None and self._ahead[0] == here:
            batch = self._ahead[1].result()
        else:
            batch = self._thread.submit(self._batch, here[0], indices).result()  # where all are computed alike
        state.epoch, state.samples_seen = epoch, seen
        following = here[0] + 1, epoch, seen
        self._ahead = following, self._thread.submit(self._batch, following[0], self._indices(epoch, seen)[0])
        return batch

    def wait(self) -> None:
        """For what is being made."""
        if self._ahead is not None:
            self._ahead[1].exception()

    def _batch(self, step: int, indices: np.ndarray) -> Any:
        draws = streams(self.rows, self.config.seed, step)
        return self.task.batch(self.task.data, indices[self.rows.start : self.rows.stop], draws)

    def _indices(self, epoch: int, seen: int) -> tuple[np.ndarray, int, int]:
        """Of a batch of all processes, and where it ends; it may reach into the next epoch."""
        indices, missing = list[np.ndarray](), self.config.batch_size
        while missing:
            if seen == len(self.task.data):
                epoch, seen = epoch + 1, 0
            if self._order is None or self._order[0] != epoch:
                self._order = epoch, self.task.data.order(self.config.seed, epoch)
            indices.append(self._order[1][seen : seen + missing])
            seen += len(indices[-1])
            missing -= len(indices[-1])
        return np.concatenate(indices), epoch, seen
