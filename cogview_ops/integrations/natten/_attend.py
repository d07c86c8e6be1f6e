"""Neighborhood attention with heads last, of one or two axes, by `local_attention_2d`."""

from typing import Any

import torch
from torch import Tensor

from ... import _checks
from ...local_attention_2d import local_attention_2d

Sizes = tuple[int, ...]


def per_axis(axes: int, x: Any, name: str, minimum: int) -> Sizes:
    """One number for each axis, where one for all was given."""
    each = tuple(x) if isinstance(x, (tuple, list)) else (x,) * axes
    _checks.require(len(each) == axes, name, f"an int or {axes} of them", x)
    return tuple(_checks.integer(n, name, minimum) for n in each)


def fits(grid: Sizes, kernel: Sizes, dilation: Sizes) -> bool:
    return all(k * d <= n for n, k, d in zip(grid, kernel, dilation, strict=True))


def check_fits(grid: Sizes, kernel: Sizes, dilation: Sizes) -> None:
    _checks.require(
        fits(grid, kernel, dilation),
        "kernel_size",
        lambda: f"kernel_size * dilation at most {tuple(grid)}, the lengths of the axes",
        lambda: f"{kernel} with dilation {dilation}",
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Sizes,
    dilation: Sizes,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    additional: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """`[B, *grid, heads, D]` and lse `[B, *grid, heads]` of a grid of one or two axes."""
    grid = query.shape[1:-2]
    check_fits(grid, kernel, dilation)
    row = (1,) * (2 - len(grid))  # a sequence is a picture of one row
    size, bias = (*row, *kernel), bias[:, None] if bias is not None and row else bias
    if causal:
        # the keys up to the query are half of a window that ends at the edges
        size = 2 * size[0] - 1, 2 * size[1] - 1
        bias = _no_later_column(query, size) if size[0] > 1 and size[1] > 1 else None
    heads = [x.flatten(1, len(grid)).transpose(1, 2) for x in (query, key, value)]
    more = [None if x is None else x.transpose(1, 2) for x in additional]
    out, lse = local_attention_2d(
        *heads,
        grid=(*row, *grid),
        kernel_size=size,
        dilation=(*row, *dilation),
        edge="clip" if causal else "shift",
        raster_causal=causal,
        bias=bias,
        prefix_key=more[0],
        prefix_value=more[1],
        scale=scale,
        return_lse=True,
    )
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


def _no_later_column(query: Tensor, size: tuple[int, int]) -> Tensor:
    """A bias by relative position that leaves nothing of the columns after the query's."""
    bias = torch.zeros(2 * size[0] - 1, 2 * size[1] - 1, device=query.device)
    bias[:, size[1] :] = -1e30  # not infinite: the kernels take differences of scores
    return bias.expand(query.shape[-2], -1, -1).to(torch.float64 if query.dtype == torch.float64 else torch.float32)
