"""`na1d` and `na2d` of NATTEN 0.21."""

from typing import Any

from torch import Tensor

from ... import _checks
from ._attend import attend, per_axis

# arguments of NATTEN that choose its kernels
_OF_KERNELS = {
    "attention_kwargs",
    "backend",
    "q_tile_shape",
    "kv_tile_shape",
    "backward_q_tile_shape",
    "backward_kv_tile_shape",
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
}


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] = 1,
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    return_lse: bool = False,
    **of_kernels: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na2d` of a sequence: query `[B, N, heads, D]`, `is_causal` of any kernel size."""
    window = kernel_size, stride, dilation, is_causal
    return _attention(
        1, (query, key, value), window, scale, (additional_keys, additional_values), return_lse, of_kernels
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    return_lse: bool = False,
    **of_kernels: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every query attends to kernel_size[0] * kernel_size[1] keys around it; at an edge the window moves inward.

    Args:
        query: `[B, H, W, heads, D]`, heads last; dtypes as in `cogview_ops.local_attention_2d`.
        key, value: `[B, H, W, heads_kv, D]`; heads_kv divides heads.
        kernel_size: at least 2, of each axis or one for all; with the dilation at most the axis' length.
        stride: 1; others raise.
        dilation: at least 1, of each axis or one for all.
        is_causal: of each axis or one for all. A causal axis has the keys of the last kernel_size positions, itself
            included. All axes or none: the causal window of one axis and the moving one of the other raise. In two
            dimensions the causal form takes the time of a window of (2 * kh - 1) * (2 * kw - 1).
        scale: `D ** -0.5` by default.
        additional_keys, additional_values: `[B, S, heads_kv, D]`, seen by all queries, in the same softmax.
        return_lse: also return the log-sum-exp, `[B, H, W, heads]`, float32 (float64 for float64).
        of_kernels: what chooses NATTEN's kernels (backend, q_tile_shape, attention_kwargs ...) has no effect.

    Returns:
        `[B, H, W, heads, D]`, or the pair with the log-sum-exp.
    """
    window = kernel_size, stride, dilation, is_causal
    return _attention(
        2, (query, key, value), window, scale, (additional_keys, additional_values), return_lse, of_kernels
    )


def _attention(
    axes: int,
    qkv: tuple[Tensor, Tensor, Tensor],
    window: tuple[Any, Any, Any, Any],
    scale: float | None,
    additional: tuple[Tensor | None, Tensor | None],
    return_lse: bool,
    of_kernels: dict[str, Any],
) -> Any:
    unknown = sorted(of_kernels.keys() - _OF_KERNELS)
    if unknown:
        raise TypeError(f"na{axes}d: got an unexpected argument {unknown[0]!r}")
    for name, x in zip(("query", "key", "value"), qkv, strict=True):
        if not isinstance(x, Tensor) or x.dim() != axes + 3:
            layout = ["[B, N, heads, D]", "[B, H, W, heads, D]"][axes - 1]
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected {layout}, got {got}")
        # a grid of as many tokens but other axes would give other neighbors without a word
        _checks.require(x.shape[:-2] == qkv[0].shape[:-2], name, "query's batch and axes", tuple(x.shape))
    more = dict(zip(("additional_keys", "additional_values"), additional, strict=True))
    _checks.together(**more)
    for name, tokens in more.items():
        if tokens is not None:
            _checks.tensor(tokens, name, ndim=4, layout=" [B, S, heads_kv, D]")
            _checks.shape(tokens, name, (len(qkv[1]), tokens.shape[1], *qkv[1].shape[-2:]))
    kernel_size, stride, dilation, is_causal = window
    kernel = per_axis(axes, kernel_size, "kernel_size", 2)
    every = per_axis(axes, stride, "stride", 1) == (1,) * axes
    _checks.require(every, "stride", "1, other strides are NATTEN's alone", stride)
    dilations = per_axis(axes, dilation, "dilation", 1)
    causal = tuple(is_causal) if isinstance(is_causal, (tuple, list)) else (bool(is_causal),) * axes
    _checks.require(
        causal in ((True,) * axes, (False,) * axes),
        "is_causal",
        "all axes or none: a causal window beside one that moves at the edges is NATTEN's alone",
        is_causal,
    )
    out, lse = attend(*qkv, kernel, dilations, causal=causal[0], scale=scale, additional=additional)
    return (out, lse) if return_lse else out
