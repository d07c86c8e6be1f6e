"""The projections."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview import half
from cogview_ops import linear_decode

FEW = 16  # rows


class Linear(nn.Linear):
    int8 = False
    """Whether `int8_weights` made the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if self.int8 and _draws(x):
            weight: Any = self.weight
            return linear_decode(x, weight.qdata, self.bias, scale=weight.scale.flatten())
        if self.bias.dtype != x.dtype == torch.float16 and not half.is_slow(x):
            return _Plus.apply(linear(x, self.weight), self.bias)  # gradients are scaled, see train/block_scales.py
        return linear(x, self.weight, self.bias)


class _Plus(torch.autograd.Function):
    """x + bias in x's dtype; the bias's gradient is added up in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return x + bias.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, _columns(grad, ctx.dtype)


class _Rounded(torch.autograd.Function):
    """F.linear of float16 in float32, rounded at its end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = None if bias is None else bias.dtype
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).half()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wide = grad.float()
        of_weight = wide.flatten(0, -2).t() @ x.float().flatten(0, -2)
        of_bias = None if ctx.dtype is None else _columns(grad, ctx.dtype)
        return (wide @ weight.float()).half(), of_weight.to(weight.dtype), of_bias


def _columns(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [n] of a gradient [..., n]."""
    return grad.sum(tuple(range(grad.ndim - 1)), dtype=dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; in a step of drawing on a CPU by the operator that reads the weight as fast as memory gives it."""
    if _draws(x) and type(weight) in (Tensor, nn.Parameter):  # others are sharded, or of fewer bits
        return linear_decode(x, weight, bias)
    if half.is_slow(x) and weight.is_floating_point():
        return _Rounded.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _draws(x: Tensor) -> bool:
    """Few rows, no gradients; an export may be of any number of rows, autocast casts whole weights in every call."""
    other = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting()
    return x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1] and not other
