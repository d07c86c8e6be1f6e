"""Local attention among the patches of a picture, and with tokens that are no patches: what the integrations share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..local_attention_2d import local_attention_2d

Pair = tuple[int, int]
Tensors = tuple[Tensor, Tensor, Tensor]


def pair(x: Any, name: str) -> Pair:
    """Of rows and columns, where one number for both was given."""
    return _checks.pair(tuple(x) if isinstance(x, (tuple, list)) else (x, x), name)


def window(kernel_size: int | Pair, dilation: int | Pair, edge: str) -> dict[str, Any]:
    """Of `local`, checked as far as can be without a picture."""
    _checks.choice(edge, "edge", ("clip", "shift"))
    return {"kernel_size": pair(kernel_size, "kernel_size"), "dilation": pair(dilation, "dilation"), "edge": edge}


def attend_patches(qkv: Tensors, before: int, grid: Pair, *, scale: float | None = None, **window: Any) -> Tensor:
    """`[B, N, heads, D]` of three `[B, heads, N, D]`: `before` tokens, and then the patches of a grid.

    A patch sees its window and the tokens before, in one softmax; these see everything.
    """
    query, key, value = qkv
    _checks.require(
        before >= 0 and query.shape[2] == before + grid[0] * grid[1],
        "grid",
        lambda: f"rows and columns of {query.shape[2] - max(before, 0)} patches, behind {max(before, 0)} other tokens",
        grid,
    )
    if not before:
        return local(qkv, grid, scale=scale, **window).transpose(1, 2)
    # split, not sliced: one copy in the backward, not two full of zeros
    sizes = before, query.shape[2] - before
    (first, query), (prefix_key, patch_key), (prefix_value, patch_value) = (x.split(sizes, 2) for x in qkv)
    window |= {"prefix_key": prefix_key, "prefix_value": prefix_value}
    out = local((query, patch_key, patch_value), grid, scale=scale, **window)
    own = F.scaled_dot_product_attention(first, key, value, scale=scale)
    return torch.cat((own.transpose(1, 2), out.transpose(1, 2)), 1)


def local(
    qkv: Tensors,
    grid: Pair,
    *,
    kernel_size: Pair,
    dilation: Pair,
    edge: str,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`local_attention_2d`; a window may be larger than the picture, which it then has all of."""
    most = [n // d if edge == "shift" else 2 * -(-n // d) - 1 for n, d in zip(grid, dilation, strict=True)]
    fitting = min(kernel_size[0], most[0]), min(kernel_size[1], most[1])
    if bias is not None:  # of no offset that is cut off is there a key
        less = [f - k for f, k in zip(fitting, kernel_size, strict=True)]
        bias = F.pad(bias, (less[1], less[1], less[0], less[0]))
    return local_attention_2d(*qkv, grid=grid, kernel_size=fitting, dilation=dilation, edge=edge, bias=bias, **options)
