"""A checkpoint's recipe and model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cogview.parts.transformer import Transformer
from cogview.recipes import named
from cogview.recipes.recipe import Recipe
from cogview.train import checkpoint
from cogview.train.identity import other_tokenizers


def recipe_of(path: Path, header: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint's header names, with its sizes."""
    try:
        recipe = named(header["recipe"])
        config: Any = {name: _tuples(value) for name, value in header["config"].items()}
        return recipe(recipe.Config(**config))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


def _tuples(value: Any) -> Any:
    """JSON has lists where a config had tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def load_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[Recipe, Transformer]:
    """Recipe and model of a checkpoint, the model in evaluation mode. dtype: None: as it is stored."""
    tensors, header = checkpoint.weights(path)
    recipe = recipe_of(path, header)
    layers = recipe.config.num_layers
    if layers > len(tensors):
        raise ValueError(f"{path} does not fit the model: expected {layers} layers, got {len(tensors)} tensors")
    with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
        model = recipe.model()
    checkpoint.check_fits(path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    return recipe, model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def check_tokenizers(run: Path, path: Path, tokenizers: Sequence[str]) -> None:
    """ValueError unless a checkpoint's model was trained on tokens of a run's tokenizers, given by their hashes."""
    trained_on = checkpoint.read_header(path).get("tokenizers")
    if not isinstance(trained_on, list) or len(trained_on) != 2:
        raise ValueError(f"{path} does not say which tokenizers its tokens were made with")
    if changed := other_tokenizers(tokenizers, trained_on):
        which = f"the {' and the '.join(changed)} tokenizer {'were' if len(changed) > 1 else 'was'}"
        raise ValueError(
            f"{run}: {which} trained again after the tokens of its model {path.parent.name}: "
            "tokenize again and train a new model"
        )
