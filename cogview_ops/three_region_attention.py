"""Three-region block-sparse attention: a causal blockwise window plus pivot tokens, in one softmax.

CogView, arXiv 2105.13290, appendix B, figure 11. The pattern is in `patterns.three_region_window` and
`three_region_pivot`; training, evaluation and decoding use the same one.
"""

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import _checks, _cuda_limits, _dispatch, _registration, _sharding, reference
from ._remembered import remembered


class _Options(TypedDict, total=False):
    """Of `three_region_attention`, but for return_lse: what type checkers read."""

    block_size: int
    window_blocks: int
    pivot_bias: float
    scale: float | None
    impl: str


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
    numbers = _checked(False, query, key, value, pivots, None, block_size, window_blocks, pivot_bias, scale)

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
    impl: str = "auto",
) -> Tensor:
    r"""The last Sq tokens of `three_region_attention` against a cache; inference only.

    Token by token it equals the full forward; the cost of a token does not grow with the sequence.

    Args:
        query: `[B, H, Sq, D]`; row t of sample b stands at position `cache_seqlens[b] - Sq + t`.
        key_cache, value_cache: `[B, Hkv, Smax, D]`, the new tokens written in already.
        pivots: as in `three_region_attention`; those still to come are not seen.
        cache_seqlens: int32 or int64 `[B]`, tokens in the cache with the new ones, from Sq to Smax.
        block_size, window_blocks, pivot_bias, scale, impl: as in `three_region_attention`.

    Returns:
        `[B, H, Sq, D]` in query's dtype and layout.
    """
    query, key_cache, value_cache = _registration.autocast(query, key_cache, value_cache)
    numbers = _checked(
        True, query, key_cache, value_cache, pivots, cache_seqlens, block_size, window_blocks, pivot_bias, scale
    )

    def values() -> None:
        _checks.pivot_values(pivots, query, key_cache.shape[2])
        _checks.seqlen_values(cache_seqlens, query, key_cache.shape[2])

    namespace = _dispatch.select("three_region_attention_decode", impl, query)
    tensors = query, key_cache, value_cache, _sharding.beside(pivots, query)
    if namespace is None:
        values()
        at = cache_seqlens[:, None] - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        return reference.three_region_attention(*tensors, *numbers, at)[0]
    name, ends = "three_region_attention_decode", _sharding.beside(cache_seqlens, query)
    return _dispatch.run(namespace, name, *tensors, ends, *numbers, values=values)


@remembered
def _checked(
    decode: bool,
    query: Any,
    key: Any,
    value: Any,
    pivots: Any,
    cache_seqlens: Any,
    block_size: Any,
    window_blocks: Any,
    pivot_bias: Any,
    scale: Any,
) -> tuple[int, int, float, float]:
    """The last arguments of the operators; the values of pivots and lengths are looked at elsewhere."""
    if decode:
        _checks.attention(query, key, value, "key_cache", "value_cache")
        _checks.cache_seqlens(cache_seqlens, query)
    else:
        _checks.attention(query, key, value)
        _checks.same_tokens(key, query)
    _checks.pivots(pivots, query)
    block_size = _checks.integer(block_size, "block_size", 1)
    window_blocks = _checks.integer(window_blocks, "window_blocks", 1)
    pivot_bias = _checks.finite(pivot_bias, "pivot_bias", query.dtype)
    return block_size, window_blocks, pivot_bias, _checks.scale(scale, query)


def _bwd_fake(dout: Any, dlse: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _registration.empty_rows(query), _registration.empty_rows(key), _registration.empty_rows(value)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, pivots, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, pivots)


def _backward_of(namespace: str) -> Any:
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        if dout is None and dlse is None:
            return (None,) * 8
        arguments = dout, dlse, *ctx.saved_tensors, *ctx.options
        grads = _dispatch.run(namespace, "three_region_attention_bwd", *arguments)
        return *grads, None, None, None, None, None

    return backward


_NUMBERS = "SymInt block_size, SymInt window_blocks, float pivot_bias, float scale"


def define_forward(namespace: str, backward: str) -> None:
    """In a namespace, with the backward of another."""
    _registration.define(
        "three_region_attention_fwd",
        f"(Tensor query, Tensor key, Tensor value, Tensor pivots, {_NUMBERS}) -> (Tensor, Tensor)",
        _registration.empty_attention,
        namespace=namespace,
        backward=_backward_of(backward),
        setup_context=_setup_context,
    )


def register(namespace: str) -> None:
    """Define the three operators in a namespace."""
    _registration.define(
        "three_region_attention_bwd",
        "(Tensor? dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor pivots, "
        f"{_NUMBERS}) -> (Tensor, Tensor, Tensor)",
        _bwd_fake,
        namespace=namespace,
    )
    define_forward(namespace, namespace)
    _registration.define(
        "three_region_attention_decode",
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor pivots, Tensor cache_seqlens, "
        f"{_NUMBERS}) -> Tensor",
        _registration.empty_decode,
        namespace=namespace,
    )


register("cogview_ops")
