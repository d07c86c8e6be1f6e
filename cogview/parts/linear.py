"""The projections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview.parts.quantized import int8_parts
from cogview_ops import linear_decode

FEW = 16  # rows


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; without gradients and of few rows, on a CPU, by the operator that takes no longer than memory."""
    if x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1] and not torch.is_grad_enabled():
        if type(weight) in (Tensor, nn.Parameter):  # not a sharded one
            return linear_decode(x, weight, bias)
        if parts := int8_parts(weight):
            return linear_decode(x, parts[0], bias, scale=parts[1])
    return F.linear(x, weight, bias)
