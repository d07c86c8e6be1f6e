"""Weights of another run to begin with."""

from pathlib import Path

import torch

from cogview.parts.transformer import Transformer
from cogview.recipes.recipe import Recipe
from cogview.train import checkpoint


@torch.no_grad()
def start_from(path: Path, before: Recipe, recipe: Recipe, model: Transformer) -> None:
    """Gives a recipe's new model the weights of a checkpoint of another, as `Recipe.inherited` makes them fit."""
    found, _ = checkpoint.weights(path)
    found = recipe.inherited(found, before, model.state_dict())
    checkpoint.check_fits(path, found, model.state_dict())
    model.load_state_dict(found)
