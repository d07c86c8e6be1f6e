"""Functions of other packages, called as their users call them; imported where they are called."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor


def installed(name: str) -> bool:
    """Whether there is such a package: a folder of that name at hand is none, nor are our functions in place of it."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def natten(grid: tuple[int, int], kernel_size: tuple[int, int]) -> Callable[..., Tensor]:
    """NATTEN's na2d, whose tensors are [B, H, W, heads, D]."""

    def attention(*tensors: Tensor) -> Tensor:
        from natten import na2d

        out = na2d(*(x.transpose(1, 2).unflatten(1, grid) for x in tensors), kernel_size)
        return out.flatten(1, 2).transpose(1, 2)

    return attention


def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def liger_softmax(scores: Tensor) -> Tensor:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return LigerSoftmaxFunction.apply(scores)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6, 1.0, "gemma", False)


def liger_add_rms_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, casting: str = "llama"
) -> tuple[Tensor, Tensor]:
    """Rounded before the weight ("llama"), or once, after it ("gemma")."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(branch, residual, weight, 1e-6, 0.0, casting, False)[::-1]


def liger_plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """All in float32, rounded once."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "gemma", False)


def quack_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from quack.rmsnorm import rmsnorm

    return rmsnorm(x, weight, eps=1e-6)


def quack_add_rms_norm(branch: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from quack.rmsnorm import rmsnorm

    out, h = rmsnorm(branch, weight, residual=residual, eps=1e-6, prenorm=True)
    return h, out


def quack_layer_norm(weight: Tensor, bias: Tensor) -> Callable[..., Tensor]:
    """It wants weights in float32, and has no derivative."""
    wide = weight.float(), bias.float()

    def norm(x: Tensor, *_: Tensor) -> Tensor:
        from quack.rmsnorm import layernorm_fwd

        return layernorm_fwd(x, *wide, eps=1e-5)

    return norm


def quack_softmax(scores: Tensor) -> Tensor:
    from quack.softmax import softmax

    return softmax(scores.flatten(0, -2)).view_as(scores)


def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return fused_layer_norm_affine(x, weight, bias, x.shape[-1:], 1e-5)


def apex_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, x.shape[-1:], 1e-6)


def apex_causal_softmax(scale: float) -> Callable[[Tensor], Tensor]:
    """Of scores `[B, H, S, S]` times the scale; in float16 and bfloat16."""

    def softmax(scores: Tensor) -> Tensor:
        from apex.transformer.functional.fused_softmax import ScaledUpperTriangMaskedSoftmax

        if scores.dtype == torch.float32:
            raise TypeError("takes float16 and bfloat16 alone")
        return ScaledUpperTriangMaskedSoftmax.apply(scores.flatten(0, 1), scale).view_as(scores)

    return softmax
