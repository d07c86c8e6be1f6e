"""Weights of another run to begin with."""

from pathlib import Path

import torch

from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.train import checkpoint


@torch.no_grad()
def start_from(path: Path, before: Recipe, recipe: Recipe, model: Transformer) -> None:
    """Gives a recipe's new model the weights of a checkpoint of another, as `Recipe.inherited` makes them fit."""
    tensors, _ = checkpoint.read(path, prefix="model.")
    found = {name.removeprefix("model."): value for name, value in tensors.items()}
    found = recipe.inherited(found, before, model.state_dict())
    named = {f"model.{name}": value for name, value in found.items()}
    checkpoint.check_shapes(path, checkpoint.shapes(named), model.state_dict())
    model.load_state_dict(found)
