"""2D local attention on an image grid, joint in one softmax with text (prefix) and a coarser image.

CogView2, arXiv 2204.14217. The patterns are `patterns.local_2d` and `coarse_2d`. Kernel sizes (1, 2W-1), (2H-1, 1)
and (k, k), raster-causal with the text as prefix, are strict row, column and convolutional attention.
"""

from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _registration, reference


def local_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    edge: str = "clip",
    raster_causal: bool = False,
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
      2209.15001). `raster_causal` keeps keys at or before the query in raster order, itself included.
    - prefix: P dense keys (text), optionally masked; `prefix_bias` (CogView2's textual constant c) is added.
    - coarse: keys of a grid (Hc, Wc) that divides (H, W), in the window around (y // (H/Hc), x // (W/Wc));
      `coarse_bias` is added (CogView2's cross-resolution attention).

    Args:
        query: `[B, heads, H*W, D]` in raster order; float64, float32, bfloat16 or float16; any strides, last dimension
            contiguous.
        key, value: `[B, Hkv, H*W, D]`, Hkv divides heads (grouped queries).
        grid: (H, W).
        kernel_size: (kh, kw), odd, at most (2H-1, 2W-1); with a dilation 2 * ceil(H / dilation[0]) - 1, with "shift"
            H // dilation[0], and likewise for columns.
        dilation: of rows and columns, or one for both, at least 1.
        edge: "clip" or "shift"; with raster_causal only "clip".
        prefix_key, prefix_value: `[B, Hkv, P, D]`, together.
        prefix_mask: bool `[B, P]`, True = attend.
        coarse_key, coarse_value: `[B, Hkv, Hc*Wc, D]`, together, with coarse_grid and coarse_kernel_size (odd, at most
            (2Hc-1, 2Wc-1)).
        scale: `D ** -0.5` by default.
        return_lse: also return the log-sum-exp of each row, `[B, heads, H*W]` float32 (float64 for float64).
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `[B, heads, H*W, D]` in query's dtype and layout; with `return_lse` the pair (out, lse), both differentiable.
    """
    _checks.attention(query, key, value)
    _checks.grid_tokens(key, "key", grid, "grid")
    dilation = _checks.dilation(dilation)
    _checks.window(kernel_size, "kernel_size", grid, dilation, edge)
    _checks.raster_causal(raster_causal, edge)
    _checks.require(
        query.shape[2] == key.shape[2],
        "query",
        f"{key.shape[2]} tokens (grid {grid})",
        f"shape {tuple(query.shape)}",
    )
    sets = _check_sets(query, key, grid, prefix_key, prefix_value, prefix_mask, prefix_bias, coarse_key, coarse_value,
                       coarse_grid, coarse_kernel_size, coarse_bias)  # fmt: skip
    scale = _checks.scale(scale, query)
    query, key, value, *others = _registration.autocast(query, key, value, *sets)
    sets = tuple(others)
    ops = _dispatch.select("local_attention_2d_fwd", impl, query)
    if ops is None:
        out, lse = _reference(query, key, value, sets, prefix_mask, grid, kernel_size, dilation, edge, raster_causal,
                              prefix_bias, coarse_grid, coarse_kernel_size, coarse_bias, scale, None)  # fmt: skip
    else:
        _checks.no_forward_mode("local_attention_2d", query, key, value, *sets)
        out, lse = ops.local_attention_2d_fwd(query, key, value, *sets, prefix_mask, list(grid), list(kernel_size),
                                              list(dilation), raster_causal, edge == "shift", prefix_bias,
                                              list(coarse_grid or (0, 0)), list(coarse_kernel_size or (0, 0)),
                                              coarse_bias, scale)  # fmt: skip
    return (out, lse) if return_lse else out


def local_attention_2d_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    grid: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: int | tuple[int, int] = 1,
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
    r"""The last Sq image tokens of a raster-causal `local_attention_2d` against a cache; inference only.

    Args:
        query: `[B, heads, Sq, D]`; row t of sample b stands at raster index `cache_seqlens[b] - Sq + t`.
        key_cache, value_cache: `[B, Hkv, H*W, D]` of image tokens, the new ones written in already.
        cache_seqlens: int32 or int64 `[B]`, image tokens in the cache with the new ones, from Sq to H*W.
        The others: as in `local_attention_2d`.

    Returns:
        `[B, heads, Sq, D]` in query's dtype and layout.
    """
    _checks.attention(query, key_cache, value_cache, "key_cache", "value_cache")
    _checks.grid_tokens(key_cache, "key_cache", grid, "grid")
    dilation = _checks.dilation(dilation)
    _checks.window(kernel_size, "kernel_size", grid, dilation)
    _checks.cache_seqlens(cache_seqlens, query, key_cache.shape[2])
    sets = _check_sets(query, key_cache, grid, prefix_key, prefix_value, prefix_mask, prefix_bias, coarse_key,
                       coarse_value, coarse_grid, coarse_kernel_size, coarse_bias)  # fmt: skip
    scale = _checks.scale(scale, query)
    query, key_cache, value_cache, *others = _registration.autocast(query, key_cache, value_cache, *sets)
    sets = tuple(others)
    ops = _dispatch.select("local_attention_2d_decode", impl, query)
    if ops is None:
        position = cache_seqlens[:, None] - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        return _reference(query, key_cache, value_cache, sets, prefix_mask, grid, kernel_size, dilation, "clip", True,
                          prefix_bias, coarse_grid, coarse_kernel_size, coarse_bias, scale, position)[0]  # fmt: skip
    _checks.no_forward_mode("local_attention_2d_decode", query, key_cache, value_cache, *sets)
    return ops.local_attention_2d_decode(query, key_cache, value_cache, *sets, prefix_mask, cache_seqlens, list(grid),
                                         list(kernel_size), list(dilation), prefix_bias, list(coarse_grid or (0, 0)),
                                         list(coarse_kernel_size or (0, 0)), coarse_bias, scale)  # fmt: skip


def _check_sets(
    query: Tensor, key: Tensor, grid: Any, prefix_key: Any, prefix_value: Any, prefix_mask: Any, prefix_bias: float,
    coarse_key: Any, coarse_value: Any, coarse_grid: Any, coarse_kernel_size: Any, coarse_bias: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Check prefix and coarse keys; return the four tensors."""
    _checks.finite(prefix_bias, "prefix_bias")
    _checks.finite(coarse_bias, "coarse_bias")
    _checks.together(prefix_key=prefix_key, prefix_value=prefix_value)
    _checks.together(coarse_key=coarse_key, coarse_value=coarse_value, coarse_grid=coarse_grid,
                     coarse_kernel_size=coarse_kernel_size)  # fmt: skip
    if prefix_key is not None:
        _checks.attention(query, prefix_key, prefix_value, "prefix_key", "prefix_value")
        _checks.same_heads(prefix_key, "prefix_key", key)
    if prefix_mask is not None:
        _checks.require(prefix_key is not None, "prefix_mask", "prefix_key and prefix_value with it", "none")
        _checks.tensor(prefix_mask, "prefix_mask", (torch.bool,))
        _checks.shape(prefix_mask, "prefix_mask", (query.shape[0], prefix_key.shape[2]))
        _checks.require(prefix_mask.device == query.device, "prefix_mask", f"device {query.device}", prefix_mask.device)
    if coarse_key is not None:
        _checks.attention(query, coarse_key, coarse_value, "coarse_key", "coarse_value")
        _checks.same_heads(coarse_key, "coarse_key", key)
        _checks.grid_tokens(coarse_key, "coarse_key", coarse_grid, "coarse_grid")
        _checks.window(coarse_kernel_size, "coarse_kernel_size", coarse_grid)
        divides = grid[0] % coarse_grid[0] == 0 and grid[1] % coarse_grid[1] == 0
        _checks.require(divides, "coarse_grid", f"a grid that divides {tuple(grid)}", tuple(coarse_grid))
    return prefix_key, prefix_value, coarse_key, coarse_value


def _reference(
    query: Tensor, key: Tensor, value: Tensor, sets: Any, prefix_mask: Any, grid: Any, kernel_size: Any, dilation: Any,
    edge: str, raster_causal: bool, prefix_bias: float, coarse_grid: Any, coarse_kernel_size: Any, coarse_bias: float,
    scale: float, query_pos: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    prefix_key, prefix_value, coarse_key, coarse_value = sets
    return reference.local_attention_2d(
        query,
        key,
        value,
        grid=grid,
        kernel_size=kernel_size,
        dilation=dilation,
        edge=edge,
        raster_causal=raster_causal,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        prefix_mask=prefix_mask,
        prefix_bias=prefix_bias,
        coarse_key=coarse_key,
        coarse_value=coarse_value,
        coarse_grid=coarse_grid,
        coarse_kernel_size=coarse_kernel_size,
        coarse_bias=coarse_bias,
        scale=scale,
        query_pos=query_pos,
    )


_KEYS = (
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? coarse_key, "
    "Tensor? coarse_value"
)
_WINDOW = "int[] grid, int[] kernel_size, int[] dilation, bool raster_causal, bool shift"
_COARSE = "float prefix_bias, int[] coarse_grid, int[] coarse_kernel_size, float coarse_bias, float scale"


def _bwd_fake(dout: Any, dlse: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sets = rest[:4]
    grads = [_registration.empty_rows(x) for x in (query, key, value)]
    return *grads, *(query.new_empty(0) if x is None else _registration.empty_rows(x) for x in sets)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, prefix_mask = inputs[:8]
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, prefix_mask, *output)


def _backward_of(namespace: str) -> Any:
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        if dout is None and dlse is None:
            return (None,) * (8 + len(ctx.options))
        tensors = ctx.saved_tensors
        grads = getattr(torch.ops, namespace).local_attention_2d_bwd(dout, dlse, *tensors, *ctx.options)
        kept = [None if x is None else g for x, g in zip(tensors[:7], grads, strict=True)]
        return *kept, None, *(None,) * len(ctx.options)

    return backward


def register(namespace: str) -> None:
    """Define the three operators in a namespace."""
    _registration.define(
        "local_attention_2d_bwd",
        f"(Tensor? dout, Tensor? dlse, {_KEYS}, Tensor? prefix_mask, Tensor out, Tensor lse, {_WINDOW}, "
        f"{_COARSE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _bwd_fake,
        namespace=namespace,
    )
    _registration.define(
        "local_attention_2d_fwd",
        f"({_KEYS}, Tensor? prefix_mask, {_WINDOW}, {_COARSE}) -> (Tensor, Tensor)",
        _registration.attention_fake,
        namespace=namespace,
        backward=_backward_of(namespace),
        setup_context=_setup_context,
    )
    _registration.define(
        "local_attention_2d_decode",
        f"({_KEYS}, Tensor? prefix_mask, Tensor cache_seqlens, int[] grid, int[] kernel_size, int[] dilation, "
        f"{_COARSE}) -> Tensor",
        _registration.decode_fake,
        namespace=namespace,
    )


register("cogview_ops")
