"""DALL-E (arXiv 2102.12092): rows, columns and squares of the image, which sees all text before it.

Its text has a fixed length, so that every image token has the same place in every sequence.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig, require
from cogview.parts.attend import Attention, summand
from cogview.recipes.cogview import CogView
from cogview.recipes.recipe import Draws, Recipe
from cogview.sequence import Context
from cogview_ops import dalle_attention, dalle_attention_decode, patterns
from cogview_ops import pairs as pairs_of


@dataclass(frozen=True)
class DalleConfig(ModelConfig):
    def __post_init__(self):
        super().__post_init__()
        require(self.relax != "tensor", "relax", "row or None, since padding would count", self.relax)

    @property
    def text_slots(self) -> int:
        """Places of the longest text and of [ROI1] [BASE] [BOI1]."""
        return self.max_text + 3


def kind_of(index: int, num_layers: int) -> str:
    """Of layer `index`, from 0: row, column, row, row, and again; the last is convolutional (appendix B.1)."""
    if index == num_layers - 1:
        return "convolutional"
    return "column" if index % 4 == 1 else "row"


class DalleAttention(Attention):
    takes = ("text_mask",)

    def __init__(self, config: DalleConfig, index: int):
        super().__init__(config, index)
        self.kind, self.text_len, self.side = kind_of(index, config.num_layers), config.text_slots, config.image_grid
        self.pattern: dict[str, Any] = {
            "kind": self.kind,
            "wrap": self.kind == "row",
            "text_len": self.text_len,
            "kernel_size": 11,
        }

    def attend(self, q, k, v, context):
        text_mask, image = context.attention["text_mask"], q.shape[2] - self.text_len
        if image == 0:
            mask = text_mask[:, None, None].expand(-1, 1, self.text_len, -1).tril()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        require(image > 0 and image % self.side == 0, "inputs", f"whole rows of {self.side} image tokens", image)
        grid = image // self.side, self.side
        return dalle_attention(q, k, v, grid=grid, text_mask=text_mask, **self.pattern)

    def added(self, context, tokens):
        place = torch.arange(tokens, device=context.positions.device)
        grid = (tokens - self.text_len) // self.side, self.side
        near = patterns.dalle(place[:, None], place, grid=grid, **self.pattern)
        there = F.pad(context.attention["text_mask"], (0, tokens - self.text_len), value=True)
        return summand(near & (there[:, None] | (place[:, None] == place)))  # padding sees itself

    def pairs(self, tokens):
        return pairs_of.dalle(grid=((tokens - self.text_len) // self.side, self.side), **self.pattern)

    def also_saved(self, tokens):
        return self.num_heads * tokens * self.head_dim  # text's and image's outputs are copied into one

    def decode(self, q, k, v, context, cache, ends):
        if context.prompt:
            return self.attend(q, k, v, context)
        whole = self.text_len + self.side**2
        keys, values, how = cache.keys[:, :, :whole], cache.values[:, :, :whole], context.attention
        return dalle_attention_decode(q, keys, values, ends, grid=(self.side,) * 2, **how, **self.pattern)


class Dalle(Recipe):
    name = "dalle"
    Config = DalleConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {
        name: (DalleConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)}), training)
        for name, (config, training) in CogView.presets.items()
        if config.relax != "tensor"
    }
    config: DalleConfig

    def attention(self, index: int) -> Attention:
        return DalleAttention(self.config, index)

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        return self.vocab.fixed_text(text, codes, self.config.max_text)

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        there = inputs != self.vocab["PAD"]
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        if self.config.image_positions == "following":  # as if the holes were not there
            positions = there.cumsum(dim=1) - 1
        return Context(positions, {"text_mask": there[:, : self.config.text_slots]})
