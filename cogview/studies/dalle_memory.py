"""Bytes of a training, by what its tensors are."""

from typing import Any

import torch
from torch import Tensor

from cogview.train.loop import Trainer


def memory(trainer: Trainer) -> dict[str, int]:
    """Of a trainer that has taken no step yet: "parameters", masters and what the model computes with; "activations",
    what a forward of a batch keeps for its backward, parameters left out."""
    there = (*trainer.task.model.parameters(), *trainer.optimizer.master.values())
    parameters = {p.untyped_storage().data_ptr(): p for p in there}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no other takes its place
        return x

    batch: Any = trainer.feed.next(trainer.state)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        trainer.task.loss(batch, batch)

    def size(tensors: Any) -> int:
        return sum(x.untyped_storage().nbytes() for x in tensors)

    return {"parameters": size(parameters.values()), "activations": size(kept.values())}
