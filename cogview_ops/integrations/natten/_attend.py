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
    # a sequence is a picture of one row
    row = (1,) * (2 - len(grid))
    (rows, columns), (kh, kw), (dh, dw) = (*row, *grid), (*row, *kernel), (*row, *dilation)
    if bias is not None and row:
        bias = bias[:, None]
    if causal:
        # the keys up to the query are half of a window that ends at the edges
        kh, kw = 2 * kh - 1, 2 * kw - 1
        bias = _no_later_column(query, kh, kw) if kh > 1 and kw > 1 else None
    heads_first = (x.flatten(1, len(grid)).transpose(1, 2) for x in (query, key, value))
    more_key, more_value = (None if x is None else x.transpose(1, 2) for x in additional)
    out, lse = local_attention_2d(
        *heads_first,
        grid=(rows, columns),
        kernel_size=(kh, kw),
        dilation=(dh, dw),
        edge="clip" if causal else "shift",
        raster_causal=causal,
        bias=bias,
        prefix_key=more_key,
        prefix_value=more_value,
        scale=scale,
        return_lse=True,
    )
    return out.transpose(1, 2).unflatten(1, grid), lse.transpose(1, 2).unflatten(1, grid)


def _no_later_column(query: Tensor, kh: int, kw: int) -> Tensor:
    """A bias by relative position that leaves nothing of the columns behind the query's."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = torch.zeros(2 * kh - 1, 2 * kw - 1, dtype=wide, device=query.device)
    bias[:, kw:] = -1e30  # not infinite: a difference of two would be no number
    return bias.expand(query.shape[-2], -1, -1)
