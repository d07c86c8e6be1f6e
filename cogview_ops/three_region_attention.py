"""Three-region block-sparse attention: a causal blockwise window plus pivot tokens, in one softmax.

CogView, arXiv 2105.13290, appendix B, figure 11. The pattern is in `patterns.three_region_window` and
`three_region_pivot`; training, evaluation and decoding use the same one.
"""

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import _checks, _cuda_limits, _dispatch, _namespaces, _registration, _sharding, reference
from ._remembered import remembered
from ._three_region_operators import register


class _Options(TypedDict, total=False):
    """Of `three_region_attention`, but for return_lse: what type checkers read."""

    block_size: int
    window_blocks: int
    pivot_bias: float
    scale: float | None
    impl: str


class _VarlenOptions(_Options, total=False):
    max_seqlen: int | None


class _DecodeOptions(_Options, total=False):
    cache_leftpad: Tensor | None


@overload
def three_region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def three_region_attention(
    query: Tensor, key: Tensor, value: Tensor, pivots: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def three_region_attention(
    query: Tensor, key: Tensor, value: Tensor, pivots: Tensor, *, return_lse: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, Tensor]: ...


def three_region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    *,
    block_size: int = 128,
    window_blocks: int = 6,
    pivot_bias: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`softmax(scale * q @ k.T + bias) @ v` over two disjoint sets of keys; B(i) = i // block_size.

    - window: j <= i with B(j) > B(i) - window_blocks,
    - pivots: p in pivots[b] with B(p) <= B(i) - window_blocks; `pivot_bias` is added to their scores.

    With every token a pivot this is causal attention. CogView trains with `pivot_bias = log(S // P)`: each pivot
    stands for that many tokens.

    Args:
        query: `[B, H, S, D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        key, value: `[B, Hkv, S, D]`, Hkv divides H (grouped queries), in query's dtype. Under
            autocast in any: all are cast to autocast's, as SDPA does.
        pivots: int32 or int64 `[B, P]`, strictly ascending, then -1 as padding (`sample_pivots` makes them).
        block_size, window_blocks: at least 1; S need not be a multiple.
        scale: `D ** -0.5` by default.
        return_lse: also return the log-sum-exp of each row, `[B, H, S]` float32 (float64 for float64).
        impl: "auto", "reference", "cpp", "cuda" or "triton". "cuda" takes bfloat16 and float16, head_dim 32, 64, 96 or
            128, and rows aligned to 16 bytes.

    Returns:
        `[B, H, S, D]` in query's dtype and layout; with `return_lse` the pair (out, lse), both differentiable.
    """
    query, key, value = _registration.autocast(query, key, value)
    numbers = _checked(query, key, value, pivots, block_size, window_blocks, pivot_bias, scale)

    def values() -> None:
        _checks.pivot_values(pivots, query, key.shape[2])

    def limits() -> str | None:
        return _cuda_limits.attention(query=query, key=key, value=value)

    namespace = _dispatch.select("three_region_attention_fwd", impl, query, limits)
    if namespace is None:
        values()
        out, lse = reference.three_region_attention(query, key, value, _sharding.beside(pivots, query), *numbers)
    else:
        name, seen = "three_region_attention_fwd", _sharding.beside(pivots, query)
        out, lse = _dispatch.run(namespace, name, query, key, value, seen, *numbers, values=values)
    return (out, lse) if return_lse else out


@overload
def three_region_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    cu_seqlens: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_VarlenOptions],
) -> Tensor: ...


@overload
def three_region_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    cu_seqlens: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[_VarlenOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def three_region_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    cu_seqlens: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[_VarlenOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def three_region_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    block_size: int = 128,
    window_blocks: int = 6,
    pivot_bias: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`three_region_attention` of sequences of any lengths, one after the other without padding.

    No sequence sees another; positions, blocks and pivots count from the begin of each. The layout is that of
    flash-attention's `flash_attn_varlen_func`; for a padded batch, take its tokens out and put them back.

    Args:
        query: `[total, H, D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        key, value: `[total, Hkv, D]`, Hkv divides H (grouped queries), in query's dtype or under autocast in any.
        pivots: int32 or int64 `[sequences, P]`, of each sequence strictly ascending, then -1 as padding
            (`sample_pivots` with cu_seqlens makes them).
        cu_seqlens: int32 or int64 `[sequences + 1]`, where the sequences begin and the last one ends: ascending from 0
            to total; one may be empty. Its values, as those of pivots, are checked on CPU, on other devices with
            COGVIEW_OPS_CHECK=1.
        max_seqlen: at least the longest sequence, by default total. No result depends on it; on a GPU, where lengths
            are not looked at, a smaller one may be faster.
        block_size, window_blocks, pivot_bias, scale, return_lse, impl: as in `three_region_attention`.

    Returns:
        `[total, H, D]` in query's dtype and layout; with `return_lse` the pair (out, lse), both differentiable, lse
        `[H, total]` float32 (float64 for float64).
    """
    query, key, value = _registration.autocast(query, key, value)
    longest, numbers = _checked_varlen(
        query, key, value, pivots, cu_seqlens, max_seqlen, block_size, window_blocks, pivot_bias, scale
    )

    def values() -> None:
        _checks.cu_seqlens_values(cu_seqlens, query.shape[0], longest)
        _checks.packed_pivot_values(pivots, cu_seqlens)

    def limits() -> str | None:
        return _cuda_limits.attention(query=query, key=key, value=value)

    name = "three_region_attention_varlen_fwd"
    namespace = _dispatch.select(name, impl, query, limits)
    tensors = query, key, value, _sharding.beside(pivots, query), _sharding.beside(cu_seqlens, query)
    if namespace is None:
        values()
        out, lse = reference.three_region_attention_varlen(*tensors, *numbers)
    else:
        out, lse = _dispatch.run(namespace, name, *tensors, longest, *numbers, values=values)
    return (out, lse) if return_lse else out


@overload
def three_region_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pivots: Tensor,
    cache_seqlens: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_DecodeOptions],
) -> Tensor: ...


@overload
def three_region_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pivots: Tensor,
    cache_seqlens: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[_DecodeOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def three_region_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pivots: Tensor,
    cache_seqlens: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[_DecodeOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def three_region_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pivots: Tensor,
    cache_seqlens: Tensor,
    *,
    block_size: int = 128,
    window_blocks: int = 6,
    pivot_bias: float = 0.0,
    scale: float | None = None,
    cache_leftpad: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The last Sq tokens of `three_region_attention` against a cache; inference only.

    Token by token it equals the full forward; the cost of a token does not grow with the sequence.

    Args:
        query: `[B, H, Sq, D]`; row t of sample b stands at position `cache_seqlens[b] - Sq + t`.
        key_cache, value_cache: `[B, Hkv, Smax, D]`, the new tokens written in already.
        pivots: as in `three_region_attention`; those still to come are not seen.
        cache_seqlens: int32 or int64 `[B]`, tokens in the cache with the new ones, from Sq to Smax.
        block_size, window_blocks, pivot_bias, scale, impl: as in `three_region_attention`.
        cache_leftpad: int32 or int64 `[B]`, of a left-padded batch: where in the cache each sequence begins, by default
            at 0. Positions, blocks and pivots count from there, cache_seqlens from the begin of the cache. What lies
            before is not read; a query that stands there sees nothing and gives 0, its log-sum-exp is -inf.
        return_lse: also return the log-sum-exp of each row, `[B, H, Sq]` float32 (float64 for float64).

    Returns:
        `[B, H, Sq, D]` in query's dtype and layout; with `return_lse` the pair (out, lse).
    """
    query, key_cache, value_cache = _registration.autocast(query, key_cache, value_cache)
    numbers = _checked_decode(
        query,
        key_cache,
        value_cache,
        pivots,
        cache_seqlens,
        cache_leftpad,
        block_size,
        window_blocks,
        pivot_bias,
        scale,
    )

    def values() -> None:
        _checks.pivot_values(pivots, query, key_cache.shape[2])
        _checks.seqlen_values(cache_seqlens, query, key_cache.shape[2])
        _checks.leftpad_values(cache_leftpad, cache_seqlens)

    namespace = _dispatch.select("three_region_attention_decode", impl, query)
    tensors = query, key_cache, value_cache, _sharding.beside(pivots, query)
    if namespace is None:
        values()
        at = cache_seqlens[:, None] - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        out, lse = reference.three_region_attention(*tensors, *numbers, at, cache_leftpad)
    else:
        name, ends = "three_region_attention_decode", _sharding.beside(cache_seqlens, query)
        begins = _sharding.beside(cache_leftpad, query)
        out, lse = _dispatch.run(namespace, name, *tensors, ends, *numbers, begins, values=values)
    return (out, lse) if return_lse else out


@remembered
def _checked(
    query: Any,
    key: Any,
    value: Any,
    pivots: Any,
    block_size: Any,
    window_blocks: Any,
    pivot_bias: Any,
    scale: Any,
) -> tuple[int, int, float, float]:
    """The last arguments of the operator; the values of pivots are looked at elsewhere."""
    _checks.attention(query, key, value)
    _checks.same_tokens(key, query)
    _checks.pivots(pivots, query, query.shape[0])
    return _numbers(query, block_size, window_blocks, pivot_bias, scale)


@remembered
def _checked_varlen(
    query: Any,
    key: Any,
    value: Any,
    pivots: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    block_size: Any,
    window_blocks: Any,
    pivot_bias: Any,
    scale: Any,
) -> tuple[int, tuple[int, int, float, float]]:
    _checks.packed_attention(query, key, value)
    _checks.cu_seqlens(cu_seqlens, query, "query")
    _checks.pivots(pivots, query, cu_seqlens.shape[0] - 1)
    longest = query.shape[0] if max_seqlen is None else _checks.integer(max_seqlen, "max_seqlen", 0)
    return longest, _numbers(query, block_size, window_blocks, pivot_bias, scale)


@remembered
def _checked_decode(
    query: Any,
    key: Any,
    value: Any,
    pivots: Any,
    cache_seqlens: Any,
    cache_leftpad: Any,
    block_size: Any,
    window_blocks: Any,
    pivot_bias: Any,
    scale: Any,
) -> tuple[int, int, float, float]:
    _checks.attention(query, key, value, "key_cache", "value_cache")
    _checks.pivots(pivots, query, query.shape[0])
    _checks.cache_seqlens(cache_seqlens, query)
    if cache_leftpad is not None:
        _checks.cache_seqlens(cache_leftpad, query, "cache_leftpad")
    return _numbers(query, block_size, window_blocks, pivot_bias, scale)


def _numbers(
    query: Tensor, block_size: Any, window_blocks: Any, pivot_bias: Any, scale: Any
) -> tuple[int, int, float, float]:
    block_size = _checks.integer(block_size, "block_size", 1)
    window_blocks = _checks.integer(window_blocks, "window_blocks", 1)
    pivot_bias = _checks.finite(pivot_bias, "pivot_bias", query.dtype)
    return block_size, window_blocks, pivot_bias, _checks.scale(scale, query)


register(_namespaces.COMPILED)
