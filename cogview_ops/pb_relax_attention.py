"""Attention whose weights can be seen and whose scores cannot overflow float16 (CogView, arXiv 2105.13290, eq. 4).

A composition: two matrix products around `pb_relax_softmax`. It stores all scores; the fused operators store none and
need no relaxation, because they keep scores in float32.
"""

from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import _checks, _registration
from .pb_relax_softmax import pb_relax_softmax


class _Options(TypedDict, total=False):
    """Of `pb_relax_attention`, but for return_weights: what type checkers read."""

    alpha: float
    mask: Tensor | None
    causal: bool
    scale: float | None
    impl: str


@overload
def pb_relax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_weights: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...


@overload
def pb_relax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_weights: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def pb_relax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_weights: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...


def pb_relax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float = 32.0,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_weights: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`softmax(alpha * (s - max(s))) @ v` with `s = (scale / alpha * q) @ k.T`: softmax attention, all in q's dtype.

    Queries are divided by alpha before the product, so that float16 holds scores up to 65504 * alpha. A query that
    sees no key gives zeros. Hidden keys have weight 0, so their values must be finite, as with SDPA.

    Args:
        query: `[B, H, Sq, D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        key, value: `[B, Hkv, Sk, D]`, Sk >= 1, Hkv divides H (grouped queries), in query's dtype. Under
            autocast in any: all are cast to autocast's, as SDPA does.
        alpha: above 0; a power of two rounds nothing more than plain attention does.
        mask: broadcastable to `[B, H, Sq, Sk]`; bool, True = attend, or float, added to the scaled scores, where its
            dtype's lowest value and -inf hide a key.
        causal: query i of Sq sees keys j <= i + Sk - Sq: the queries are the last of the keys' tokens. Needs no mask
            tensor. (SDPA's `is_causal` is j <= i, the same where Sq = Sk.)
        scale: `D ** -0.5` by default.
        return_weights: also return the weights.
        impl: of the softmax: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `[B, H, Sq, D]` in query's dtype; with `return_weights` the pair (out, weights `[B, H, Sq, Sk]`), both
        differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    query, key, value = _registration.autocast(query, key, value)
    _checks.attention(query, key, value)
    _checks.require(key.shape[2] >= 1, "key", "at least one token", lambda: f"shape {tuple(key.shape)}")
    alpha = _checks.finite(alpha, "alpha", query.dtype, positive=True)
    if mask is not None:
        _checks.mask(mask, query, (*query.shape[:3], key.shape[2]), (torch.bool, *_checks.FLOATS))
    scale = _checks.scale(scale, query)
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = query.shape, key.shape
    rows = heads // max(kv_heads, 1) * queries  # of all queries that share a key head
    scores = (query * (scale / alpha)).reshape(batch, kv_heads, rows, dim) @ key.mT
    scores = scores.view(batch, heads, queries, keys)
    if mask is not None and mask.is_floating_point():
        bias, mask = mask, mask > torch.finfo(mask.dtype).min
        scores = scores + (bias.masked_fill(~mask, 0) / alpha).to(scores.dtype)
    weights = pb_relax_softmax(scores, alpha=alpha, mask=mask, causal=causal, impl=impl)
    out = (weights.view(batch, kv_heads, rows, keys) @ value).view(batch, heads, queries, dim)
    return (out, weights) if return_weights else out
