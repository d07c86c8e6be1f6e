"""Iterative super-resolution of CogView2 (arXiv 2204.14217): some fine cells anew, in place, from the others.

    text    fine cells, those that are drawn [SOI]

Fine cells see the first tokens of the text and each other in a window, in one softmax. The order in which cells are
drawn is that of `cogview.lopar`; a training sample hides what one of its rounds hides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview import lopar
from cogview.config import ModelConfig, TrainConfig, require
from cogview.parts.attend import Attention
from cogview.recipes.fine import Fine, FineConfig, presets
from cogview.recipes.recipe import Draws, without
from cogview.sequence import Batch, Context
from cogview_ops import cogview2_attention, local_attention_2d_decode
from cogview_ops import pairs as pairs_of


@dataclass(frozen=True)
class IterativeConfig(FineConfig):
    text_slots: int = 16
    """Text tokens that are seen, the first ones."""
    tile: lopar.Tile = ()
    """Its order is that of the rounds. Default: `lopar.fitting` of the fine grid."""

    def __post_init__(self):
        super().__post_init__()
        if not self.tile:  # filled in, so that checkpoints say it
            object.__setattr__(self, "tile", lopar.fitting(self.fine_grid))
        require(self.text_slots >= 1, "text_slots", "at least 1", self.text_slots)
        lopar.order(self.tile, self.fine_grid)


class IterativeAttention(Attention):
    takes = ("text_mask",)
    emphasises = True

    def __init__(self, config: IterativeConfig, index: int):
        super().__init__(config, index)
        self.text_len = config.text_slots
        self.window: dict[str, Any] = {"grid": (config.fine_grid,) * 2, "kernel_size": config.kernel_size}

    def forward(self, x, context, cache=None):
        if context.only is None:
            return super().forward(x, context)
        q, k, v = self.split(self.query_key_value(x))
        out = self._some(q, k, v, context, context.only)
        return self.dense(out.transpose(1, 2).flatten(2))

    def attend(self, q, k, v, context):
        how: dict[str, Any] = {"text_mask": context.attention["text_mask"], "text_bias": self._bias(context)}
        return cogview2_attention(q, k, v, text_len=self.text_len, **how, **self.window)

    def _some(self, q: Tensor, k: Tensor, v: Tensor, context: Context, places: Tensor) -> Tensor:
        """Of fine cells at some places of the sequence, int64 [B, n]."""
        (text_k, cells_k), (text_v, cells_v) = (x.tensor_split([self.text_len], dim=2) for x in (k, v))
        queries = q.gather(2, places[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        every = torch.full((len(q),), cells_k.shape[2], device=q.device)
        return local_attention_2d_decode(
            queries,
            cells_k,
            cells_v,
            every,
            query_index=places - self.text_len,
            raster_causal=False,
            prefix_key=text_k,
            prefix_value=text_v,
            prefix_mask=context.attention["text_mask"],
            prefix_bias=self._bias(context),
            **self.window,
        )

    def _bias(self, context: Context) -> float:
        return 0.0 if context.emphasis is None else context.emphasis.value

    def pairs(self, tokens):
        return pairs_of.cogview2(text_len=self.text_len, **self.window)

    def also_saved(self, tokens):
        return self.num_heads * tokens * self.head_dim  # text's and cells' outputs are copied into one


class Iterative(Fine):
    name = "iterative"
    Config = IterativeConfig
    presets: ClassVar[dict[str, tuple[ModelConfig, TrainConfig]]] = {}
    """Those of CogLM."""
    config: IterativeConfig

    def attention(self, index: int) -> Attention:
        return IterativeAttention(self.config, index)

    @property
    def before(self) -> int:
        return self.config.text_slots

    @property
    def order(self) -> Tensor:
        """int64 [fine cells]."""
        return lopar.order(self.config.tile, self.config.fine_grid).flatten()

    def hidden(self, text: Tensor, fine: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of fine codes [B, N] of which some, bool [B, N] or [N], are hidden, and predicted."""
        c, vocab = self.config, self.vocab
        vocab.check(text, [fine], c.max_caption + fine.shape[1], commands=0)
        head = self.text(text, c.text_slots)
        inputs = torch.cat([head, fine.long().masked_fill(hidden, vocab["SOI"])], dim=1)
        return inputs, torch.cat([torch.full_like(head, vocab["PAD"]), fine.long().where(hidden, vocab["PAD"])], dim=1)

    def layout(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """codes: coarse and fine ones, of which these are taken: the first round."""
        return self.hidden(text, codes[:, self.config.image_tokens :], self.order >= 1)

    def training_batch(
        self, text: Tensor, *codes: Tensor, draws: Draws = None, dropped: Tensor | None = None, **weights: Any
    ) -> Batch:
        """Each row by its own stream one of the rounds."""
        self.check_codes(codes)
        streams = draws if isinstance(draws, Sequence) else [draws] * len(text)
        rounds = torch.cat([torch.randint(1, int(self.order.max()) + 1, (1,), generator=s) for s in streams])
        inputs, targets = self.hidden(without(text, dropped), codes[1], self.order >= rounds[:, None])
        return self.weighed(inputs, targets, self.context(inputs), **weights)

    def context(self, inputs: Tensor, draws: Draws = None) -> Context:
        return self.placed(inputs, (0, self.config.text_slots))

    @classmethod
    def fit(cls, config: Any, **sizes: int) -> Any:
        """With the config's tile, or where that does not fit the default."""
        fits = lopar.fits(config.tile, sizes["image_grid"])
        own: dict[str, Any] = {"tile": config.tile if fits else ()}
        return super().fit(config, **sizes, **own)


Iterative.presets |= presets(Iterative)
