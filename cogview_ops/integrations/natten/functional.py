"""The functions of `natten.functional` up to NATTEN 0.17: scores of a neighborhood, and the product with its values.

In plain torch: the scores exist, and so does every neighborhood's copy of its keys, kernel_size times kernel_size
times their memory. Where scores are softmaxed and multiplied as they are, `fuse` and `na2d` do without both.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _checks
from ._attend import Sizes, check_fits, per_axis
from ._na import na1d, na2d

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
]


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """`query @ key.T + rpb` of each query's window, the rows of the window one after the other.

    Args:
        query, key: `[B, heads, H, W, D]`; query is scaled already.
        kernel_size: odd, with the dilation at most (H, W).
        additional_keys: `[B, heads, S, D]`, their scores come last.
        is_causal: False; `na2d` has it.
        rpb: `[heads, 2 * kh - 1, 2 * kw - 1]`, added by relative position: key minus query in units of the dilation,
            plus kernel_size - 1.

    Returns:
        `[B, heads, H, W, kh * kw + S]`
    """
    return _scores(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    additional_values: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`attn @ value` of each query's window: `[B, heads, H, W, D]` from weights as `na2d_qk` orders them."""
    return _product(2, attn, value, kernel_size, dilation, additional_values, is_causal)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | tuple[int],
    dilation: int | tuple[int] = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """`na2d_qk` of a sequence `[B, heads, N, D]`, with rpb `[heads, 2 * k - 1]`."""
    return _scores(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int],
    dilation: int | tuple[int] = 1,
    additional_values: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`na2d_av` of a sequence `[B, heads, N, D]`."""
    return _product(1, attn, value, kernel_size, dilation, additional_values, is_causal)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """`na2d_qk`, as it was called up to NATTEN 0.14."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """`na1d_qk`, as it was called up to NATTEN 0.14."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


natten1dqk, natten1dav, natten2dqk, natten2dav = na1d_qk, na1d_av, na2d_qk, na2d_av


def _scores(
    axes: int, query: Tensor, key: Tensor, kernel_size: Any, dilation: Any, more: Tensor | None, causal: Any, rpb: Any
) -> Tensor:
    kernel, dilations = _window(axes, kernel_size, dilation, causal)
    _grid(axes, query, "query", kernel, dilations)
    _checks.tensor(key, "key")
    _checks.shape(key, "key", query.shape)
    scores = torch.einsum("...d,...dk->...k", query, _neighborhoods(key, 2, kernel, dilations))
    if rpb is not None:
        _checks.tensor(rpb, "rpb")
        _checks.shape(rpb, "rpb", (query.shape[1], *(2 * k - 1 for k in kernel)))
        index = _relative(query.shape[2:-1], kernel, dilations).to(rpb.device)
        scores = scores + F.embedding(index, rpb.flatten(1).mT).movedim(-1, 0).to(scores.dtype)
    if more is not None:
        _additional(more, "additional_keys", query)
        of_more = query.flatten(2, -2) @ more.mT
        scores = torch.cat((scores, of_more.unflatten(2, query.shape[2:-1])), -1)
    return scores


def _product(
    axes: int, attn: Tensor, value: Tensor, kernel_size: Any, dilation: Any, more: Tensor | None, causal: Any
) -> Tensor:
    kernel, dilations = _window(axes, kernel_size, dilation, causal)
    _grid(axes, value, "value", kernel, dilations)
    _checks.tensor(attn, "attn")
    if more is not None:
        _additional(more, "additional_values", value)
    keys = math.prod(kernel)
    _checks.shape(attn, "attn", (*value.shape[:-1], keys + (0 if more is None else more.shape[-2])))
    attn = attn.to(value.dtype)
    out = torch.einsum("...k,...dk->...d", attn[..., :keys], _neighborhoods(value, 2, kernel, dilations))
    if more is not None:
        out = out + (attn[..., keys:].flatten(2, -2) @ more).unflatten(2, value.shape[2:-1])
    return out


def _window(axes: int, kernel_size: Any, dilation: Any, causal: Any) -> tuple[Sizes, Sizes]:
    kernel = per_axis(axes, kernel_size, "kernel_size", 1)
    _checks.require(all(k % 2 for k in kernel), "kernel_size", "odd", kernel_size)
    some = any(causal) if isinstance(causal, (tuple, list)) else bool(causal)
    _checks.require(not some, "is_causal", "False, scores of causal windows are not here: na1d or na2d", causal)
    return kernel, per_axis(axes, dilation, "dilation", 1)


def _grid(axes: int, x: Any, name: str, kernel: Sizes, dilation: Sizes) -> None:
    _checks.tensor(x, name)
    layout = ["[B, heads, N, D]", "[B, heads, H, W, D]"][axes - 1]
    _checks.require(x.dim() == axes + 3, name, layout, tuple(x.shape))
    check_fits(x.shape[2:-1], kernel, dilation)


def _additional(x: Any, name: str, of: Tensor) -> None:
    _checks.tensor(x, name, ndim=4)
    _checks.shape(x, name, (*of.shape[:2], x.shape[2], of.shape[-1]))


def _neighborhoods(x: Tensor, first_axis: int, kernel: Sizes, dilation: Sizes) -> Tensor:
    """The entries of each position's window, in a new last dimension."""
    for axis, (k, d) in enumerate(zip(kernel, dilation, strict=True), first_axis):
        x = _windows(x, axis, k, d)
    return x.flatten(-len(kernel))


def _windows(x: Tensor, axis: int, kernel: int, dilation: int) -> Tensor:
    """Along one axis. Windows that would leave it are those of the nearest position whose window is inside; copied,
    not gathered, so that their gradients are summed in one order everywhere."""
    x = x.movedim(axis, 0)
    groups = []
    for i in range(dilation):
        inside = x[i::dilation].unfold(0, kernel, 1)
        sides = inside[:1], inside[-1:]
        left, right = (side.expand(kernel // 2, *side.shape[1:]) for side in sides)
        groups.append(torch.cat((left, inside, right)))
    out = groups[0]
    if dilation > 1:  # position dilation * j + i is the j-th of group i
        order = torch.cat([torch.arange(i, len(x), dilation) for i in range(dilation)]).argsort()
        out = torch.cat(groups)[order.to(x.device)]
    return out.movedim(0, axis)


def _relative(grid: Sizes, kernel: Sizes, dilation: Sizes) -> Tensor:
    """Of each query and key of its window, the index into a flat rpb: `[*grid, product of kernel]`."""
    index = torch.zeros((), dtype=torch.int64)
    for axis, (n, k, d) in enumerate(zip(grid, kernel, dilation, strict=True)):
        own = torch.arange(n)
        offset = (_windows(own, 0, k, d) - own[:, None]) // d + k - 1
        lengths = [1] * (2 * len(grid))
        lengths[axis], lengths[axis + len(grid)] = n, k
        index = index * (2 * k - 1) + offset.view(lengths)
    return index.flatten(len(grid))
