"""One call of `local_attention_2d` where modules call NATTEN's pair of scores and products."""

import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._replaced import Replaced
from . import functional
from ._attend import attend, fits, per_axis


def fuse(model: nn.Module) -> Replaced:
    """Replace the forward of attention modules that call the legacy pair by what equals it, until `.remove()`.

    Known by their attributes, rpb, kernel_size and dilation beside

    - query, key, value and num_attention_heads: (Di)NAT of transformers and what was copied from it, 1D and 2D,
    - qkv, proj, num_heads and scale: NeighborhoodAttention1D and 2D of NATTEN up to 0.17 and what was copied from them.

    Others, and causal ones, stay as they are. Dropout of the probabilities, when training, and output_attentions take
    the pair.
    """
    replaced = Replaced()
    for name, module in model.named_modules():
        forward = _fused_forward(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            replaced.add(name, partial(delattr, module, "forward"))
    return replaced


def _fused_forward(module: Any) -> Callable[..., Any] | None:
    causal = getattr(module, "is_causal", False)
    if any(causal) if isinstance(causal, (tuple, list)) else causal:
        return None
    for forward, names in (
        (forward_with_heads, "query key value num_attention_heads dropout"),
        (_forward_of_qkv, "qkv proj proj_drop num_heads scale attn_drop"),
    ):
        if all(hasattr(module, name) for name in f"rpb kernel_size dilation {names}".split()):
            return forward
    return None


def forward_with_heads(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """`[B, *grid, C]` of transformers' attention without its output projection."""
    heads = self.num_attention_heads
    query, key, value = (
        layer(hidden_states).unflatten(-1, (heads, -1)) for layer in (self.query, self.key, self.value)
    )
    if output_attentions or _drops(self.dropout):
        context, weights = _by_the_pair(self, query / math.sqrt(query.shape[-1]), key, value, self.dropout)
        return (context.flatten(-2), weights) if output_attentions else (context.flatten(-2),)
    return (attend(query, key, value, *_window(self, hidden_states), bias=self.rpb)[0].flatten(-2),)


def _forward_of_qkv(self: Any, x: Tensor) -> Tensor:
    """`[B, *grid, C]` of NATTEN's attention with its projections."""
    if _drops(self.attn_drop) or not fits(x.shape[1:-1], *_window(self, x)):
        return type(self).forward(self, x)  # some pad pictures that are smaller than the window
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
    out, _ = attend(query, key, value, *_window(self, x), scale=self.scale, bias=self.rpb)
    return self.proj_drop(self.proj(out.flatten(-2)))


def _window(module: Any, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = x.dim() - 2
    return per_axis(axes, module.kernel_size, "kernel_size", 1), per_axis(axes, module.dilation, "dilation", 1)


def _drops(dropout: Any) -> bool:
    return dropout.training and dropout.p > 0


def _by_the_pair(module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: Any) -> tuple[Tensor, Tensor]:
    two_axes = query.dim() == 5
    scores: Any = functional.na2d_qk if two_axes else functional.na1d_qk
    product: Any = functional.na2d_av if two_axes else functional.na1d_av
    kernel, dilation = _window(module, query[..., 0])
    query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
    weights = dropout(torch.softmax(scores(query, key, kernel, dilation, rpb=module.rpb), -1))
    return product(weights, value, kernel, dilation).movedim(1, -2), weights
