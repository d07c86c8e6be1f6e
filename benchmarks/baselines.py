"""What the operators are compared with: formulas in plain torch, SDPA, FlexAttention."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def vanilla_attention(mask: Tensor | None) -> Callable[..., Tensor]:
    """softmax(q k' / sqrt(d)) v with the whole score matrix in memory; mask is bool, True = attend."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ value

    return attention


def sdpa(mask: Tensor | None = None, causal: bool = False) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)

    return attention


def flex_attention(mask: Tensor) -> Callable[..., Tensor]:
    """FlexAttention with the same mask `[Sq, Sk]`, compiled at the first call; on CPU forward only."""

    @cache
    def compiled() -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        rows, columns = mask.shape
        blocks = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, rows, columns, device=mask.device.type)
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)

    return lambda query, key, value: compiled()(query, key, value)


def compile_formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it, at its first call (making the object alone imports the compiler)."""
    compiled = cache(lambda: torch.compile(formula, dynamic=False))
    return lambda *inputs, **options: compiled()(*inputs, **options)


def relaxed_softmax(alpha: float, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """CogView's PB-relax formula, eq. 4."""

    def softmax(scores: Tensor) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return ((scores - scores.detach().amax(-1, keepdim=True)) * alpha).softmax(-1)

    return softmax


def torch_softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.layer_norm, without PB-relax."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def relaxed_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    peak = x.detach().abs().amax(-1, keepdim=True)
    return F.layer_norm(x / torch.where(peak == 0, 1, peak), x.shape[-1:], weight, bias)


def sandwich(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One step with the given norm: h = residual + norm(branch), x = norm(h)."""

    def step(branch: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + norm(branch, *weights[:2])
        return h, norm(h, *weights[2:])

    return step
