"""A trained system in one folder: text.model, vqvae.safetensors and gpt/step-*.safetensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.config import require
from cogview.generate import generate
from cogview.parts.transformer import Transformer
from cogview.recipes import named
from cogview.recipes.recipe import Recipe
from cogview.tokenizers.image import VQVAE
from cogview.tokenizers.text import TextTokenizer
from cogview.train import checkpoint


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
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Recipe, Transformer]:
    """Recipe and model of a checkpoint, the model in evaluation mode."""
    tensors, header = checkpoint.read(path, prefix="model.")
    recipe = recipe_of(path, header)
    layers = recipe.config.num_layers
    if layers > len(tensors):
        raise ValueError(f"{path} does not fit the model: expected {layers} layers, got {len(tensors)} tensors")
    with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
        model = recipe.model()
    checkpoint.check_shapes(path, tensors, model.state_dict())
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()}, assign=True)
    return recipe, model.to(device=device, dtype=dtype).eval().requires_grad_(False)


@dataclass(frozen=True)
class System:
    """Both tokenizers and the model between them."""

    text: TextTokenizer
    image: VQVAE
    recipe: Recipe
    model: Transformer

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "System":
        """Reads a folder; ValueError in one sentence where a part is missing or does not fit the others."""
        folder = Path(folder)
        newest = checkpoint.latest(folder / "gpt")
        if newest is None:
            raise ValueError(f"{folder} holds no trained model: expected gpt/step-*.safetensors in it")
        text, image = TextTokenizer.load(folder / "text.model"), VQVAE.load(folder / "vqvae.safetensors")
        trained_on = checkpoint.read_header(newest).get("tokenizers")
        if trained_on != [text.sha256, image.sha256]:
            raise ValueError(f"{folder}: the GPT was trained on tokens of other tokenizers than those beside it")
        return cls(text, image.to(device).eval(), *load_model(newest, device=device))

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Text ids; ValueError names a caption that is too long."""
        ids, longest = [self.text.encode(caption) for caption in captions], self.recipe.config.max_text
        for caption, tokens in zip(captions, ids, strict=True):
            require(len(tokens) <= longest, "captions", f"at most {longest} tokens", f"{len(tokens)}: {caption}")
        return ids

    @torch.no_grad()
    def draw(self, captions: Sequence[str], **how) -> Tensor:
        """Pictures, uint8 [N, 3, H, W], of captions; keywords as `generate.generate`."""
        return self.pictures(generate(self.recipe, self.model, self.encode(captions), **how))

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] of codes [N, h, w]."""
        parts = [self.image.decode(part.to(self.model.device)).cpu() for part in codes.split(64)]
        return (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)
