"""Exponentially weighted averages of a model's parameters over its training (DALL-E, arXiv 2102.12092, section 2.2)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cogview.train.ranks import local


class Average:
    """Of float32 parameters, `values` by name; of several processes each has the averages of its parts."""

    def __init__(self, master: dict[str, Tensor], decay: float, every: int):
        """every: steps between two parameters that are averaged."""
        self.values = {name: p.detach().clone() for name, p in master.items()}
        self._master, self._add, self._every = master, get_ema_multi_avg_fn(decay), every

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Behind a step of the run, counted from 1. The first parameters that are averaged are what it begins with; up
        to them it is what the parameters are."""
        own, now = ([local(p) for p in tensors.values()] for tensors in (self.values, self._master))
        if step <= self._every:
            torch._foreach_copy_(own, now)
        elif step % self._every == 0:
            self._add(own, now, step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the averages inside, and the averages the parameters, without memory for both."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._master.items():
            own, now = local(self.values[name]), local(p)
            kept = now.clone()
            now.copy_(own)
            own.copy_(kept)
