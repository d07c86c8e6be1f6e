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
    given = _checks.local_window(
        _checks.ANY_GRID, pair(kernel_size, "kernel_size"), pair(dilation, "dilation"), edge=edge
    )
    return {"kernel_size": given.kernel_size, "dilation": given.dilation, "edge": edge}


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
    first, query = _split(query, before)
    # not recorded where there is nothing to derive: that takes time of its own
    read: Any = _ReadTwice.apply if torch.is_grad_enabled() else _ReadTwice.forward
    key, prefix_key, patch_key, value, prefix_value, patch_value = read(key, value, before)
    window |= {"prefix_key": prefix_key, "prefix_value": prefix_value}
    out = local((query, patch_key, patch_value), grid, scale=scale, **window)
    own = F.scaled_dot_product_attention(first, key, value, scale=scale)
    return torch.cat((own.transpose(1, 2), out.transpose(1, 2)), 1)


def _split(x: Tensor, before: int) -> tuple[Tensor, Tensor]:
    """Along tokens, `[B, heads, N, D]`, as they lie in memory: so the gradient, a cat, lies as x does."""
    sizes = before, x.shape[2] - before
    if x.stride(1) < x.stride(2):
        first, others = x.transpose(1, 2).split(sizes, 1)
        return first.transpose(1, 2), others.transpose(1, 2)
    first, others = x.split(sizes, 2)
    return first, others


class _ReadTwice(torch.autograd.Function):
    """Keys and values: all of them, those before the patches, and the patches'. The gradients of the parts are added
    into that of the whole, where autograd would join them in a tensor of their own first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key: Tensor, value: Tensor, before: int) -> tuple[Tensor, ...]:
        return tuple(part for x in (key, value) for part in (x.view_as(x), x[:, :, :before], x[:, :, before:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.before = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        for whole, prefix, patches in (grads[:3], grads[3:]):
            whole[:, :, : ctx.before] += prefix
            whole[:, :, ctx.before :] += patches
        return grads[0], grads[3], None


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
