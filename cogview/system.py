"""A trained CogView in one folder: text.model, vqvae.safetensors and gpt/step-*.safetensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .generate import generate
from .model import GPT
from .tokenizers.image import VQVAE
from .tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class System:
    """Both tokenizers and the GPT between them."""

    text: TextTokenizer
    image: VQVAE
    gpt: GPT

    @classmethod
    def load(cls, folder: str | Path) -> "System":
        """Reads a folder; ValueError in one sentence where a part is missing or does not fit the others."""
        folder = Path(folder)
        newest = checkpoint.latest(folder / "gpt")
        if newest is None:
            raise ValueError(f"{folder} holds no trained model: expected gpt/step-*.safetensors in it")
        text, image = TextTokenizer.load(folder / "text.model"), VQVAE.load(folder / "vqvae.safetensors")
        gpt, trained_on = checkpoint.load_model(newest), checkpoint.read_state(newest).get("tokenizers")
        if trained_on != [text.sha256, image.sha256]:
            raise ValueError(f"{folder}: the GPT was trained on tokens of other tokenizers than those beside it")
        return cls(text, image.eval(), gpt)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """Text ids; ValueError names a caption that is too long."""
        ids = [self.text.encode(caption) for caption in captions]
        for caption, tokens in zip(captions, ids, strict=True):
            if len(tokens) > self.gpt.config.max_text:
                raise ValueError(
                    f"caption too long: {len(tokens)} tokens, this model takes {self.gpt.config.max_text}: {caption!r}"
                )
        return ids

    @torch.no_grad()
    def draw(self, captions: Sequence[str], **how) -> Tensor:
        """Pictures, uint8 [N, 3, H, W], of captions; keywords as `generate.generate`."""
        return self.pictures(generate(self.gpt, self.encode(captions), **how))

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] of codes [N, h, w]."""
        parts = [self.image.decode(part) for part in codes.split(64)]
        return (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)
