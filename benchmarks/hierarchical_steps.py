"""Training steps of CogView2's direct super-resolution, with local attention, and with dense attention under the same
mask; see `benchmarks.hierarchical`.

As `benchmarks.steps` has it: 96 of text, 20 x 20 and 60 x 60 codes, 4,096 tokens, and a batch is one sequence. The text
fills its places, so that one mask is that of all. Few codes, so that few layers stand for a model of many.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview.flops import forward_flops
from cogview.recipes.direct import Direct, DirectAttention, DirectConfig
from cogview_ops import patterns

from . import steps


def _config(layers: int, hidden: int, codes: int = 512, grid: int = 20, text: int = 96) -> DirectConfig:
    sizes: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": hidden // 64,
        "image_vocab": codes,
    }
    sizes |= {"text_vocab": 500, "chinese_from": 250, "max_caption": text, "text_rows": text + 1}
    sizes |= {"image_grid": grid, "fine_grid": 3 * grid, "max_positions": text + 2 + 10 * grid**2}
    return DirectConfig(**sizes, relax=None, embedding_grad_scale=1.0, dropout=0.0)


CASES = {
    "direct-4x512": _config(4, 512),
    "direct-4x256": _config(4, 256),
    "direct-4x512-20000-codes": _config(4, 512, codes=20_000),
    "direct-1x2560": _config(1, 2560),
    "direct-quick": _config(1, 64, grid=4, text=16),
}


@cache
def mask(device: torch.device, **pattern: Any) -> Tensor:
    """bool [S, S]."""
    text, (fine, coarse) = pattern["text_len"], (pattern[name] for name in ("grid", "coarse_grid"))
    i = torch.arange(text + fine[0] * fine[1] + coarse[0] * coarse[1], device=device)
    return patterns.cogview2(i[:, None], i, **pattern, raster_causal=False)


class Masked(DirectAttention):
    """Of all pairs, under a mask."""

    def forward(self, x, context, cache=None):
        base, fine = x.tensor_split([self.before], dim=1)
        q, k, v = self.split(torch.cat([self.query_key_value(base), self.fine_query_key_value(fine)], dim=1))
        out = self.masked(q, k, v, mask(x.device, **self.pattern)).transpose(1, 2).flatten(2)
        base, fine = out.tensor_split([self.before], dim=1)
        return torch.cat([self.dense(base), self.fine_dense(fine)], dim=1)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Materialised(Masked):
    def masked(self, q, k, v, mask):
        return steps.materialised(q, k, v, mask.to(q.dtype))


class MaskedDirect(Direct):
    def attention(self, index):
        return Masked(self.config, index)


class MaterialisedDirect(Direct):
    def attention(self, index):
        return Materialised(self.config, index)


def recipes(config: DirectConfig) -> dict[str, Direct]:
    kinds = {"local": Direct, "masked SDPA": MaskedDirect, "materialised scores": MaterialisedDirect}
    return {name: kind(config) for name, kind in kinds.items()}


def bound(recipe: Direct) -> float:
    """How many times the operations of a step attention to all pairs comes to: no more can be gained by operations."""
    c, own = recipe.config, forward_flops(recipe)
    pairs = c.num_layers * recipe.length**2
    return own._replace(attention=2 * 2 * c.hidden_size * pairs).total / own.total


def rows(case: str, dtype: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """The whole step is the last."""
    all_of = recipes(CASES[case])
    contestants = steps.Steps(all_of, steps.DTYPES[dtype], device)
    found = steps.rows(contestants, {"local": case}, dtype, rounds, same_result=True)
    return [row | {"flops_bound": bound(all_of["local"])} for row in found]


def line(row: dict[str, Any]) -> str:
    return f"{steps.line(row)}; {row['flops_bound']:.2f} times as many operations with all pairs"
