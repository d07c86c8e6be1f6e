"""Weights of another run to begin with."""

from pathlib import Path

import torch
from torch import Tensor

from cogview.config import ModelConfig
from cogview.parts.transformer import Transformer
from cogview.train import checkpoint

_POSITIONS = "embedding.positions.weight"


@torch.no_grad()
def start_from(path: Path, before: ModelConfig, model: Transformer) -> None:
    """Gives a new model the weights of a checkpoint, whose model is of config `before`. The new one may have room for
    longer text: rows of the position table that are new stay as they are."""
    tensors, _ = checkpoint.read(path, prefix="model.")
    name = f"model.{_POSITIONS}"
    if name in tensors:
        tensors[name] = _grown(tensors[name], before, model.config, model.state_dict()[_POSITIONS])
    checkpoint.check_shapes(path, checkpoint.shapes(tensors), model.state_dict())
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})


def _grown(old: Tensor, before: ModelConfig, after: ModelConfig, new: Tensor) -> Tensor:
    """A position table of the new size, of which the model's own is `new`. Images at fixed places stand behind the
    longest text, so their rows move."""
    if len(old) != before.max_positions or len(old) > len(new):
        return old  # which does not fit, as is said then
    moved = before.max_text + 2 if before.image_positions == "fixed" else len(old)  # [ROI1] text [BASE] come first
    by = after.max_positions - before.max_positions
    table = new.clone()
    table[:moved], table[moved + by : len(old) + by] = old[:moved], old[moved:]
    return table
