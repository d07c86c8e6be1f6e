"""Self-attention of one layer: every kind that a config can choose, in training and with a cache.

Shapes: B batch, S tokens, H heads, D head size, P pivots, C hidden size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.config import GPTConfig
from cogview_ops import (
    dalle_attention,
    dalle_attention_decode,
    pb_relax_attention,
    three_region_attention,
    three_region_attention_decode,
)


def dalle_kind(index: int, num_layers: int) -> str:
    """Of DALL-E's layer `index`, from 0: row, column, row, row, and again; the last is convolutional (DALL-E, arXiv
    2102.12092, appendix B.1)."""
    if index == num_layers - 1:
        return "convolutional"
    return "column" if index % 4 == 1 else "row"


class LayerCache(NamedTuple):
    """One layer's part of a KVCache and where its new tokens stand."""

    keys: Tensor  # [B, H, Smax, D]
    values: Tensor
    positions: Tensor  # int64 [B, Sq]
    prompt: bool  # with dalle attention: the new tokens are all there is so far

    def append(self, k: Tensor, v: Tensor) -> None:
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[rows, :, self.positions] = k.transpose(1, 2)
        self.values[rows, :, self.positions] = v.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of layer `index`, counted from 0."""

    def __init__(self, config: GPTConfig, index: int):
        super().__init__()
        self.config = config
        self.dalle_kind = dalle_kind(index, config.num_layers)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        pivots: Tensor | None,
        text_mask: Tensor | None,
        cache: LayerCache | None,
        weights: list | None,
    ) -> Tensor:
        c, (B, S, C) = self.config, x.shape
        q, k, v = self.query_key_value(x).view(B, S, 3, c.num_heads, c.head_dim).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache.append(k, v)
        if c.attention == "three_region":
            out = self._three_region(q, k, v, pivots, cache)
        elif c.attention == "dalle":
            out = self._dalle(q, k, v, text_mask, cache)
        elif c.attention == "dense_pb_relax":
            out = self._pb_relax(q, k, v, cache, weights)
        else:
            out = self._dense(q, k, v, cache)
        return self.dense(out.transpose(1, 2).reshape(B, S, C))

    def _three_region(self, q, k, v, pivots, cache):
        c = self.config
        pattern: dict[str, Any] = {
            "block_size": c.block_size,
            "window_blocks": c.window_blocks,
            "pivot_bias": c.pivot_bias,
        }
        if cache is None:
            return three_region_attention(q, k, v, pivots, **pattern)
        seqlens = (cache.positions[:, -1] + 1).int()
        return three_region_attention_decode(q, cache.keys, cache.values, pivots, seqlens, **pattern)

    def _dalle(self, q, k, v, text_mask, cache):
        c, kind = self.config, self.dalle_kind
        pattern: dict[str, Any] = {
            "kind": kind,
            "wrap": kind == "row",
            "text_len": c.text_slots,
            "text_mask": text_mask,
        }
        if cache is None or cache.prompt:  # its image may end early, but with a whole row
            grid = (q.shape[2] - c.text_slots) // c.image_grid, c.image_grid
            return dalle_attention(q, k, v, grid=grid, **pattern)
        keys, values = (x[:, :, : c.text_slots + c.image_tokens] for x in (cache.keys, cache.values))
        seqlens = cache.positions[:, -1] + 1
        return dalle_attention_decode(q, keys, values, seqlens, grid=(c.image_grid,) * 2, **pattern)

    def _dense(self, q, k, v, cache):
        if cache is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, cache.keys, cache.values, attn_mask=_seen(cache))

    def _pb_relax(self, q, k, v, cache, weights):
        if cache is None:
            out, p = pb_relax_attention(q, k, v, causal=True, return_weights=True)
        else:
            out, p = pb_relax_attention(q, cache.keys, cache.values, mask=_seen(cache), return_weights=True)
        if weights is not None:
            weights.append(p)
        return out


def _seen(cache: LayerCache) -> Tensor:
    """bool [B, 1, Sq, Smax]: cached tokens at or before each query."""
    keys = torch.arange(cache.keys.shape[2], device=cache.keys.device)
    return (keys <= cache.positions[..., None])[:, None]
