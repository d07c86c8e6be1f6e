"""Direct super-resolution of CogView2 (arXiv 2204.14217): all fine cells at once, from the coarse ones around them.

    text    coarse cells    [SOI] ... [SOI]

Text sees itself, the coarse picture that and itself, and fine cells the coarse ones in a window and each other in one,
under one softmax. In each layer the fine cells have projections of their own, which begin as the base's; norms and MLPs
are the same for all. Every fine cell is [SOI] and predicts its own code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview.config import ModelConfig, TrainConfig
from cogview.parts.attend import Attention, chosen
from cogview.parts.linear import Linear
from cogview.recipes.fine import Fine, FineConfig, check_window, presets
from cogview.recipes.recipe import Draws, Recipe
from cogview.sequence import Context
from cogview_ops import cogview2_attention
from cogview_ops import pairs as pairs_of

_OWN = ("query_key_value", "dense")


@dataclass(frozen=True)
class DirectConfig(FineConfig):
    coarse_kernel_size: tuple[int, int] = (5, 5)

    def __post_init__(self):
        super().__post_init__()
        check_window("coarse_kernel_size", self.coarse_kernel_size, self.image_grid)


class DirectAttention(Attention):
    takes = ("text_mask",)
    emphasises = True

    def __init__(self, config: DirectConfig, index: int):
        super().__init__(config, index)
        c = config
        self.fine_query_key_value = Linear(c.hidden_size, 3 * c.hidden_size)
        self.fine_dense = Linear(c.hidden_size, c.hidden_size)
        self.pattern: dict[str, Any] = {
            "text_len": c.max_caption,
            "coarse_grid": (c.image_grid,) * 2,
            "grid": (c.fine_grid,) * 2,
            "kernel_size": c.kernel_size,
            "coarse_kernel_size": c.coarse_kernel_size,
        }
        self.before = c.max_caption + c.image_tokens

    def forward(self, x, context, cache=None):
        base, fine = x.tensor_split([self.before], dim=1)
        q, k, v = self.split(torch.cat([self.query_key_value(base), self.fine_query_key_value(fine)], dim=1))
        bias = 0.0 if context.emphasis is None else context.emphasis.value
        how: dict[str, Any] = {"text_mask": context.attention["text_mask"], "text_bias": bias}
        out = cogview2_attention(q, k, v, **how, **self.pattern).transpose(1, 2).flatten(2)
        base, fine = out.tensor_split([self.before], dim=1)
        return chosen(torch.cat([self.dense(base), self.fine_dense(fine)], dim=1), context.only)

    def pairs(self, tokens):
        return pairs_of.cogview2(**self.pattern)

    def also_saved(self, tokens):
        return 2 * self.num_heads * tokens * self.head_dim  # the outputs of both parts, and they together


class Direct(Fine):
    name = "direct"
    Config = DirectConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {}
    """Those of CogLM."""
    config: DirectConfig

    def attention(self, index: int) -> Attention:
        return DirectAttention(self.config, index)

    @property
    def before(self) -> int:
        return self.config.max_caption + self.config.image_tokens

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes: coarse and fine ones."""
        c = self.config
        self.vocab.check(text, [codes], c.max_caption + self.length, commands=0)
        coarse, fine = codes.split([c.image_tokens, c.fine_grid**2], dim=1)
        given = torch.cat([self.text(text, c.max_caption), coarse], dim=1)
        inputs = torch.cat([given, torch.full_like(fine, self.vocab["SOI"])], dim=1)
        return inputs, torch.cat([torch.full_like(given, self.vocab["PAD"]), fine], dim=1)

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        c = self.config
        return self.placed(inputs, (0, c.max_caption), (c.text_rows + 1, c.image_tokens))

    def inherited(self, tensors: dict[str, Tensor], before: Recipe, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fine projections begin as the base's."""
        if not isinstance(before, Direct):
            copies = {
                name.replace(f"attention.{part}.", f"attention.fine_{part}."): value
                for part in _OWN
                for name, value in tensors.items()
                if f"attention.{part}." in name
            }
            tensors = tensors | copies
        return super().inherited(tensors, before, new)


Direct.presets |= presets(Direct)
