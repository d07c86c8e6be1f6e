"""Self-attention of one layer: the projections, and who sees whom in training and with a cache.

A kind of attention is a subclass with `attend`, and `decode` if it generates. Shapes: B batch, S tokens, H heads, D
head size, L layers, P pivots, C hidden size.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import ModelConfig, require
from cogview.parts import emphasis
from cogview.parts.linear import Linear
from cogview.sequence import Context
from cogview_ops import pairs as pairs_of
from cogview_ops import patterns, pb_relax_attention, three_region_attention, three_region_attention_decode
from cogview_ops.modules import KVCache


class Attention(nn.Module):
    """Projections around an attention of layer `index`, counted from 0."""

    takes: tuple[str, ...] = ()
    """The names in Context.attention that it needs."""
    emphasises = False
    """Whether its decode heeds Context.emphasis."""
    fused = True
    """Whether an operator of its own computes it, whose output selective checkpointing keeps."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.num_heads, self.head_dim, self.index = config.num_heads, config.head_dim, index
        # head by head, each its query, key and value: a part of its rows is some heads, so that it can be sharded
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        """The branch [B, S, C] of x [B, S, C], or of the context's `only` places. With a cache the tokens continue its
        rows, which grow by S."""
        q, k, v = self.split(self.query_key_value(x))
        if cache is None:
            out = self.attend(q, k, v, context)
        else:
            out = self.decode(q, k, v, context, cache, cache.append(k, v))
        return chosen(self.dense(out.transpose(1, 2).flatten(2)), context.only)

    def split(self, query_key_value: Tensor) -> list[Tensor]:
        """Queries, keys, values [B, H, S, D] of the projection's output [B, S, 3 H D], of the heads that are here."""
        B, S, _ = query_key_value.shape
        heads = query_key_value.shape[-1] // (3 * self.head_dim)  # fewer where processes share them
        # unbound before they are transposed: the backward puts the gradients together where they belong, in one copy
        return [x.transpose(1, 2) for x in query_key_value.view(B, S, heads, 3, self.head_dim).unbind(3)]

    def own(self, context: Context) -> Context:
        """What of the context is this layer's."""
        return context

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """[B, H, S, D] of a whole sequence's q, k, v, alike."""
        raise NotImplementedError

    def decode(self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: KVCache, ends: Tensor) -> Tensor:
        """The same for new tokens that stand in the cache already, each row's last at `ends` - 1 (int32 [B])."""
        raise NotImplementedError

    def added(self, context: Context, tokens: int) -> Tensor:
        """What is added to the scaled scores of a whole sequence of so many tokens S, float32, broadcastable to
        [B, H, S, S]: -inf where a query does not see a key. context: this layer's own."""
        raise NotImplementedError

    def pairs(self, tokens: int) -> int:
        """Of query and key that it sees, of one head and a sequence of so many tokens; causal attention sees these."""
        return pairs_of.causal(tokens)

    def also_saved(self, tokens: int) -> int:
        """Elements that it keeps of a sequence for its backward, beside q, k, v and the output."""
        return 0


def chosen(x: Tensor, places: Tensor | None) -> Tensor:
    """[B, n, C] of x [B, S, C] at places [B, n], or all of it."""
    return x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def seen(cache: KVCache, ends: Tensor, count: int) -> Tensor:
    """bool [B, 1, count, Smax]: cached tokens at or before each of the `count` new ones."""
    keys = torch.arange(cache.keys.shape[2], device=ends.device)
    last = ends[:, None] - count + torch.arange(count, device=ends.device)
    return (keys <= last[..., None])[:, None]


def summand(mask: Tensor) -> Tensor:
    """float32 [B, 1, S, S], of scores: 0 where a mask [B, S, S] or [S, S] is true, else -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf).view(-1, 1, *mask.shape[-2:])


def causal(context: Context, tokens: int) -> Tensor:
    """What causal attention to all tokens adds, see `Attention.added`."""
    place = torch.arange(tokens, device=context.positions.device)
    return summand(patterns.causal(place[:, None], place, tokens, tokens))


class Dense(Attention):
    """Causal attention to all tokens."""

    emphasises = True

    def attend(self, q, k, v, context):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def added(self, context, tokens):
        return causal(context, tokens)

    def decode(self, q, k, v, context, cache, ends):
        if context.prompt:  # many queries: SDPA takes them in tiles
            return emphasis.masked(q, cache.keys, cache.values, seen(cache, ends, q.shape[2]), context)
        # few: a window of one block that is the whole cache, of which only what is there is read
        pivots = ends.new_full((len(q), 1), -1)
        whole: dict[str, Any] = {"block_size": cache.keys.shape[2], "window_blocks": 1, "return_lse": True}
        found = three_region_attention_decode(q, cache.keys, cache.values, pivots, ends, **whole)
        return emphasis.merged(found, q, cache, context)


class Leading(Dense):
    """Attention to the first `sees` tokens of the sequence, a number of each token's own; what is drawn sees all before
    it."""

    takes = ("sees",)
    fused = False

    def attend(self, q, k, v, context):
        return emphasis.masked(q, k, v, self._mask(q.shape[2], context), dataclasses.replace(context, emphasis=None))

    def decode(self, q, k, v, context, cache, ends):
        if context.prompt:
            return emphasis.masked(q, k, v, self._mask(q.shape[2], context), context)
        return super().decode(q, k, v, context, cache, ends)

    def added(self, context, tokens):
        return summand(self._mask(tokens, context)[:, 0])

    def _mask(self, tokens: int, context: Context) -> Tensor:
        sees = context.attention["sees"][:, None, :tokens, None]
        return patterns.leading(torch.arange(tokens, device=sees.device), sees)


class PBRelax(Attention):
    """As Dense, by the formula that cannot overflow float16. `record_weights` shows its weights."""

    emphasises = True
    fused = False

    def __init__(self, config: ModelConfig, index: int):
        super().__init__(config, index)
        self.record: list[Tensor] | None = None

    def attend(self, q, k, v, context):
        return self._recorded(pb_relax_attention(q, k, v, causal=True, return_weights=True))

    def decode(self, q, k, v, context, cache, ends):
        mask = seen(cache, ends, q.shape[2])
        mask = emphasis.in_mask(mask, context, q.dtype)
        return self._recorded(pb_relax_attention(q, cache.keys, cache.values, mask=mask, return_weights=True))

    def added(self, context, tokens):
        return causal(context, tokens)

    def also_saved(self, tokens):
        return self.num_heads * tokens * tokens  # the weights

    def _recorded(self, result: tuple[Tensor, Tensor]) -> Tensor:
        if self.record is not None:
            self.record.append(result[1])
        return result[0]


@contextmanager
def record_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives each layer's attention weights [B, H, S, keys] of the calls inside."""
    layers = [module for module in model.modules() if isinstance(module, PBRelax)]
    if not layers:
        raise ValueError("model: expected layers of attention dense_pb_relax, which alone has weights, got none")
    weights: list[Tensor] = []
    for layer in layers:
        layer.record = weights
    try:
        yield weights
    finally:
        for layer in layers:
            layer.record = None


class ThreeRegion(Attention):
    """A window of blocks and the layer's own pivots (CogView paper, appendix B).

    Each pivot stands for floor(S / P) tokens of the S fed, in training `fed`.
    """

    takes = ("pivots",)
    emphasises = True

    def __init__(
        self, config: ModelConfig, index: int, *, block_size: int, window_blocks: int, num_pivots: int, fed: int
    ):
        super().__init__(config, index)
        bias = math.log(max(1, fed // num_pivots))
        self.num_layers, self.num_pivots = config.num_layers, num_pivots
        self.pattern: dict[str, Any] = {"block_size": block_size, "window_blocks": window_blocks, "pivot_bias": bias}

    def pairs(self, tokens):
        """As if the pivots were the first tokens: an upper bound, which FlopCounterMode counts too."""
        c = self.pattern
        return pairs_of.three_region(tokens, self.num_pivots, c["block_size"], c["window_blocks"])

    def own(self, context):
        pivots = context.attention["pivots"]
        fits = pivots.ndim == 3 and pivots.shape[1] == self.num_layers
        require(fits, "pivots", f"[B, {self.num_layers}, P]", list(pivots.shape))
        return dataclasses.replace(context, attention={**context.attention, "pivots": pivots[:, self.index]})

    def attend(self, q, k, v, context):
        return three_region_attention(q, k, v, context.attention["pivots"], **self.pattern)

    def added(self, context, tokens):
        pivots, c = context.attention["pivots"], self.pattern
        place = torch.arange(tokens, device=pivots.device)[None]
        window, pivot = patterns.three_region_masks(place, tokens, pivots, c["block_size"], c["window_blocks"])
        return summand(window | pivot) + c["pivot_bias"] * pivot[:, None]

    def decode(self, q, k, v, context, cache, ends):
        pivots = context.attention["pivots"]
        found = three_region_attention_decode(
            q, cache.keys, cache.values, pivots, ends, **self.pattern, return_lse=True
        )
        return emphasis.merged(found, q, cache, context, self._bias(cache, ends, q.shape[2]))

    def _bias(self, cache: KVCache, ends: Tensor, count: int) -> Tensor | None:
        """Of pivots, [B, 1, count, Smax] as the last tokens see all of the cache."""
        if self.pattern["pivot_bias"] == 0:
            return None
        last = ends[:, None, None] - count + torch.arange(count, device=ends.device)[:, None]
        keys = torch.arange(cache.keys.shape[2], device=ends.device)
        window = self.pattern["block_size"], self.pattern["window_blocks"]
        return self.pattern["pivot_bias"] * patterns.three_region_pivot(last, keys, *window)[:, None]
