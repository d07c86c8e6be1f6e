"""2D local attention on an image grid, joint in one softmax with text (prefix) and a coarser image.

CogView2, arXiv 2204.14217. The patterns are `patterns.local_2d` and `coarse_2d`. Kernel sizes (1, 2W-1), (2H-1, 1)
and (k, k), raster-causal with the text as prefix, are strict row, column and convolutional attention.
"""

from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import _checks, _cuda_limits, _dispatch, _namespaces, _registration, _sharding, reference
from ._local_options import SCHEMA, TENSORS, WITH_GRADIENT, Options, flatten, unflatten
from ._remembered import remembered


class _Options(TypedDict, total=False):
    """Of `local_attention_2d`, but for return_lse: what type checkers read."""

    grid: Required[tuple[int, int]]
    kernel_size: Required[tuple[int, int] | None]
    dilation: int | tuple[int, int]
    edge: str
    raster_causal: bool
    bias: Tensor | None
    key_mask: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    prefix_mask: Tensor | None
    prefix_bias: float
    coarse_key: Tensor | None
    coarse_value: Tensor | None
    coarse_grid: tuple[int, int] | None
    coarse_kernel_size: tuple[int, int] | None
    coarse_bias: float
    scale: float | None
    impl: str


@overload
def local_attention_2d(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def local_attention_2d(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def local_attention_2d(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    return_lse: bool,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


def local_attention_2d(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    *,
    grid: tuple[int, int],
    kernel_size: tuple[int, int] | None,
    dilation: int | tuple[int, int] = 1,
    edge: str = "clip",
    raster_causal: bool = False,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    prefix_bias: float = 0.0,
    coarse_key: Tensor | None = None,
    coarse_value: Tensor | None = None,
    coarse_grid: tuple[int, int] | None = None,
    coarse_kernel_size: tuple[int, int] | None = None,
    coarse_bias: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`softmax(scale * q @ k.T + bias) @ v` over up to three sets of keys around each query (y, x).

    - local: kh * kw keys of the same grid around the query, `dilation` rows and columns apart. `edge="clip"`:
      positions outside the image do not exist (they are not zeros). `edge="shift"`: the window moves inward, in steps
      of the dilation, until it is inside, and every query sees kh * kw keys: NATTEN's definition (arXiv 2204.07143,
      2209.15001). `raster_causal` keeps keys at or before the query in raster order, itself included. `bias` is
      learned, by relative position (NATTEN's `rpb`, DiNAT); `key_mask` hides keys, of padding. With `kernel_size=None`
      there is no local set: a grid that attends to a coarser one, or to text, alone.
    - prefix: P dense keys (text), optionally masked; `prefix_bias` (CogView2's textual constant c) is added.
    - coarse: keys of a grid (Hc, Wc) that divides (H, W), in the window around (y // (H/Hc), x // (W/Wc));
      `coarse_bias` is added (CogView2's cross-resolution attention).

    There is no dropout of probabilities: it would need a random number for each pair, in forward and backward.

    Args:
        query: `[B, heads, H*W, D]` in raster order; float64, float32, bfloat16 or float16; any strides, last dimension
            contiguous.
        key, value: `[B, Hkv, H*W, D]`, Hkv divides heads (grouped queries), in query's dtype; None where kernel_size
            is. Under autocast in any: all but the bias are cast to autocast's, as SDPA does.
        grid: (H, W); of one dimension (1, W).
        kernel_size: (kh, kw), at most (2H-1, 2W-1); with a dilation 2 * ceil(H / dilation[0]) - 1, with "shift"
            H // dilation[0], and likewise for columns. The largest has all of the image in every window. One window
            for images of several sizes: `(min(kh, 2 * H - 1), min(kw, 2 * W - 1))`. An even window has kh // 2 rows
            above the query and kh // 2 - 1 below, as NATTEN's.
        dilation: of rows and columns, or one for both, at least 1.
        edge: "clip" or "shift"; with raster_causal only "clip".
        bias: `[heads, 2 * kh - 1, 2 * kw - 1]` in query's dtype or float32: a key that lies dy rows below the query
            and dx columns to the right of it, in units of the dilation, has `bias[head, dy + kh - 1, dx + kw - 1]`
            added to its scaled score. Only shifted windows reach all of the table.
        key_mask: bool `[B, H*W]`, True = attend. A query that sees no key of any set has output 0 and lse -inf.
        prefix_key, prefix_value: `[B, Hkv, P, D]`, together.
        prefix_mask: bool `[B, P]`, True = attend.
        coarse_key, coarse_value: `[B, Hkv, Hc*Wc, D]`, together, with coarse_grid and coarse_kernel_size (at most
            (2Hc-1, 2Wc-1)).
        scale: `D ** -0.5` by default.
        return_lse: also return the log-sum-exp of each row, `[B, heads, H*W]` float32 (float64 for float64).
        impl: "auto", "reference", "cpp", "cuda" or "triton". "cuda" takes bfloat16 and float16, head_dim 32, 64, 96 or
            128, rows aligned to 16 bytes, odd windows of up to 17 columns.

    Returns:
        `[B, heads, H*W, D]` in query's dtype and layout; with `return_lse` the pair (out, lse), both differentiable.
    """
    query, key, value, prefix_key, prefix_value, coarse_key, coarse_value = _registration.autocast(
        query, key, value, prefix_key, prefix_value, coarse_key, coarse_value
    )
    numbers = _checked(
        *(False, query, key, value, None, None, prefix_key, prefix_value, prefix_mask, prefix_bias),
        *(coarse_key, coarse_value, coarse_grid, coarse_kernel_size, coarse_bias),
        *(grid, kernel_size, dilation, raster_causal, edge, bias, key_mask, scale),
    )
    tensors = _tensors(query, prefix_key, prefix_value, coarse_key, coarse_value, bias, prefix_mask, key_mask)

    def limits() -> str | None:
        rows = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
        rows |= {"coarse_key": coarse_key, "coarse_value": coarse_value}
        return _cuda_limits.local_2d((grid, kernel_size, dilation, edge), coarse_kernel_size, **rows)

    namespace = _dispatch.select("local_attention_2d_fwd", impl, query, limits)
    if namespace is None:
        out, lse = reference.local_attention_2d(query, key, value, unflatten(tensors, numbers))
    else:
        out, lse = _dispatch.run(namespace, "local_attention_2d_fwd", query, key, value, *tensors, *numbers)
    return (out, lse) if return_lse else out


def local_attention_2d_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    query_index: Tensor | None = None,
    grid: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    edge: str = "clip",
    raster_causal: bool = True,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    prefix_bias: float = 0.0,
    coarse_key: Tensor | None = None,
    coarse_value: Tensor | None = None,
    coarse_grid: tuple[int, int] | None = None,
    coarse_kernel_size: tuple[int, int] | None = None,
    coarse_bias: float = 0.0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Some image tokens of a `local_attention_2d` against a cache of its keys; inference only.

    Of a raster-causal one the last Sq, or with `query_index` any: those that MaskGIT draws next, those that changed.

    Args:
        query: `[B, heads, Sq, D]`; row t of sample b stands at raster index `cache_seqlens[b] - Sq + t`.
        key_cache, value_cache: `[B, Hkv, H*W, D]` of image tokens, the new ones written in already. Cells at or behind
            cache_seqlens are seen by nobody, and neither are those that key_mask hides: they may hold anything.
        cache_seqlens: int32 or int64 `[B]`, image tokens in the cache with the new ones, from Sq to H*W; with
            query_index from 0 to H*W.
        query_index: int32 or int64 `[B, Sq]`: row t of sample b stands at raster index `query_index[b, t]`, anywhere in
            the grid; in a sample each at most once.
        raster_causal: whether queries see keys at or before them alone.
        The others: as in `local_attention_2d`.

    Returns:
        `[B, heads, Sq, D]` in query's dtype and layout.
    """
    query, key_cache, value_cache, prefix_key, prefix_value, coarse_key, coarse_value = _registration.autocast(
        query, key_cache, value_cache, prefix_key, prefix_value, coarse_key, coarse_value
    )
    numbers = _checked(
        *(True, query, key_cache, value_cache, cache_seqlens, query_index),
        *(prefix_key, prefix_value, prefix_mask, prefix_bias),
        *(coarse_key, coarse_value, coarse_grid, coarse_kernel_size, coarse_bias),
        *(grid, kernel_size, dilation, raster_causal, edge, bias, key_mask, scale),
    )
    tensors = _tensors(query, prefix_key, prefix_value, coarse_key, coarse_value, bias, prefix_mask, key_mask)

    def values() -> None:
        if query_index is None:
            _checks.seqlen_values(cache_seqlens, query, key_cache.shape[2])
        else:
            _checks.query_index_values(query_index, cache_seqlens, key_cache.shape[2])

    name = "local_attention_2d_decode"
    namespace = _dispatch.select(name, impl, query)
    if namespace is None:
        values()
        new = torch.arange(query.shape[2], device=query.device)
        position = cache_seqlens[:, None] - query.shape[2] + new if query_index is None else query_index
        options = unflatten(tensors, numbers)
        return reference.local_attention_2d(query, key_cache, value_cache, options, position, cache_seqlens)[0]
    places = _sharding.beside(cache_seqlens, query), _sharding.beside(query_index, query)
    return _dispatch.run(namespace, name, query, key_cache, value_cache, *tensors, *places, *numbers, values=values)


def _tensors(query: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The optional ones as the operators take them: the bias as it is added."""
    *keys, bias, prefix_mask, key_mask = tensors
    if bias is not None:
        bias = bias.to(_registration.wide(query.dtype))
    return *keys, *(_sharding.beside(x, query) for x in (bias, prefix_mask, key_mask))


@remembered
def _checked(
    decode: bool,
    query: Any,
    key: Any,
    value: Any,
    cache_seqlens: Any,
    query_index: Any,
    prefix_key: Any,
    prefix_value: Any,
    prefix_mask: Any,
    prefix_bias: Any,
    coarse_key: Any,
    coarse_value: Any,
    coarse_grid: Any,
    coarse_kernel_size: Any,
    coarse_bias: Any,
    grid: Any,
    kernel_size: Any,
    dilation: Any,
    raster_causal: Any,
    edge: Any,
    bias: Any,
    key_mask: Any,
    scale: Any,
) -> tuple[Any, ...]:
    """The numbers among the operators' arguments; the values of lengths and cells are looked at elsewhere."""
    names = ("key_cache", "value_cache") if decode else ("key", "value")
    if kernel_size is None and not decode:
        given = {"key": key, "value": value, "bias": bias, "key_mask": key_mask}
        window = _checks.no_window(grid, **given, dilation=dilation, raster_causal=raster_causal, edge=edge)
        _checks.alone(query, prefix_key, coarse_key, window.grid)
    else:
        _checks.attention(query, key, value, *names)
        _checks.grid_tokens(key, names[0], grid, "grid")
        window = _checks.local_window(grid, kernel_size, dilation, raster_causal, edge)
        if not decode and query.shape[2] != key.shape[2]:
            _checks.tokens(query, "query", key.shape[2], f"grid {grid}")
    if decode:
        _checks.cache_seqlens(cache_seqlens, query)
        if query_index is not None:
            _checks.query_index(query_index, query)
    if bias is not None:
        _checks.bias_table(bias, query, window)
    if key_mask is not None:
        _checks.token_mask(key_mask, "key_mask", query, key.shape[2])
    prefix = _checks.prefix(query, key, prefix_key, prefix_value, prefix_mask, prefix_bias)
    keys = {names[0]: key, "prefix_key": prefix_key}
    coarse = _checks.coarse(query, keys, grid, coarse_key, coarse_value, coarse_grid, coarse_kernel_size, coarse_bias)
    return flatten(Options(window, prefix, coarse, _checks.scale(scale, query)))


def _bwd_fake(dout: Any, dlse: Any, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *keys, bias = rest[: 2 + WITH_GRADIENT]
    grads = [query.new_empty(0) if x is None else _registration.empty_rows(x) for x in (query, *keys)]
    return *grads, query.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.numbers = inputs[: 3 + TENSORS], inputs[3 + TENSORS :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of(namespace: str) -> Any:
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        if dout is None and dlse is None:
            return (None,) * (3 + TENSORS + len(ctx.numbers))
        tensors = ctx.saved_tensors
        dout = _sharding.first(dout, tensors[-2])
        grads = _dispatch.run(namespace, "local_attention_2d_bwd", dout, dlse, *tensors, *ctx.numbers)
        given = zip(tensors[: len(grads)], grads, strict=True)
        return *(None if x is None else g for x, g in given), *(None,) * (TENSORS - WITH_GRADIENT + len(ctx.numbers))

    return backward


def define_forward(namespace: str, backward: str) -> None:
    """In a namespace, with the backward of another."""
    tensors, numbers = SCHEMA
    _registration.define(
        "local_attention_2d_fwd",
        f"(Tensor query, Tensor? key, Tensor? value, {tensors}, {numbers}) -> (Tensor, Tensor)",
        _registration.empty_attention,
        namespace=namespace,
        backward=_backward_of(backward),
        setup_context=_setup_context,
    )


def register(namespace: str) -> None:
    """Define the three operators in a namespace."""
    tensors, numbers = SCHEMA
    _registration.define(
        "local_attention_2d_bwd",
        f"(Tensor? dout, Tensor? dlse, Tensor query, Tensor? key, Tensor? value, {tensors}, Tensor out, Tensor lse, "
        f"{numbers}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _bwd_fake,
        namespace=namespace,
    )
    define_forward(namespace, namespace)
    _registration.define(
        "local_attention_2d_decode",
        f"(Tensor query, Tensor key, Tensor value, {tensors}, Tensor cache_seqlens, Tensor? query_index, {numbers})"
        " -> Tensor",
        _registration.empty_decode,
        namespace=namespace,
    )


register(_namespaces.COMPILED)
