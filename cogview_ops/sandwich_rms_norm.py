"""RMSNorm, and the fused step of a transformer with RMSNorm.

Zhang and Sennrich, arXiv 1910.07467. Both operators are those of LayerNorm (sandwich_layer_norm.py) without mean, bias
and relaxation. Gradients of weights repeat bit for bit there as here.
"""

from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from . import _norms


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""RMSNorm over the last dimension, `x / sqrt(mean(x**2) + eps) * (weight + weight_offset)`.

    Args:
        x: `[..., D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        weight: `[D]`, in x's dtype or float32, under autocast in any. Without it nothing is multiplied, whatever the
            offset.
        eps: added to the mean of squares, above 0.
        weight_offset: added to the weight in float32; 1 for weights that are kept as differences from 1 (Gemma).
        round_before_weight: `x / sqrt(...)` is rounded to x's dtype before it is multiplied (Llama, GLM), as in
            `weight * normalised.to(x.dtype)`. In the backward the rounding counts as the identity.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        Shape and dtype of `x`, computed in float32 (float64 for float64) and rounded once but for that; under autocast
        its dtype, as `layer_norm`.
    """
    return _norms.norm("rms_norm", x, weight, None, eps, None, weight_offset, round_before_weight, impl)


class _Options(TypedDict, total=False):
    """Of `sandwich_rms_norm`, but for norms: what type checkers read."""

    eps: float
    weight_offset: float
    round_before_weight: bool
    branch_scale: float | Tensor
    dropout_p: float
    dropout_after_norm: bool
    seed: int | Tensor | None
    impl: str


@overload
def sandwich_rms_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    pre_weight: Tensor | None = None,
    *,
    norms: Literal["both", "pre"] = "both",
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def sandwich_rms_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    pre_weight: Tensor | None = None,
    *,
    norms: Literal["post"],
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sandwich_rms_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    pre_weight: Tensor | None = None,
    *,
    norms: str,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


def sandwich_rms_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    pre_weight: Tensor | None = None,
    *,
    norms: str = "both",
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    branch_scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_after_norm: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""One step of a transformer: `h = residual + branch_scale * N_post(dropout(branch))`, `x = N_pre(h)`, N RMSNorm.

    In a model the pre-norm is that of the next sub-layer, so a whole layer is two calls. Both norms are the step of
    Gemma 2 to 4, GLM-4 and GLM-Image; a pre-norm alone is add + norm (Llama, Qwen), a post-norm alone the step of
    OLMo 2 and EXAONE 4.

    Args:
        branch: `[..., D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        residual: the same shape, in branch's dtype, or float32 beside bfloat16 or float16: a residual stream that keeps
            its precision, under autocast as well, which changes no dtype here.
        post_weight, pre_weight: `[D]`, all in branch's dtype or all in float32, under autocast in any; None is 1.
        norms: "both"; "pre": h is the sum with the branch itself; "post": there is no x. The weight of a norm that is
            not there is None.
        eps, weight_offset, round_before_weight: as in `rms_norm`, for both norms; rounded is to the dtype of the norm's
            input, which is h's for the pre-norm.
        branch_scale: a number, or a tensor of any float dtype that broadcasts to `[..., 1]`, which has a gradient:
            drop-path of samples, gates of tokens.
        dropout_p: probability in [0, 1] that an element of `branch` is zeroed; the others are divided by 1 - p.
        dropout_after_norm: dropout of `N_post(branch)` instead (T5Gemma).
        seed: as in `sandwich_layer_norm`.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `(h, x)`, or h alone with norms="post": h with shape and dtype of `residual`, x of `branch`, each computed in
        float32 (float64 for float64) from what was read. Gradients have their input's dtype.
    """
    given = post_weight, None, pre_weight, None
    numbers = eps, None, weight_offset, round_before_weight
    drops = dropout_p, dropout_after_norm, seed
    return _norms.step("rms_norm", branch, residual, given, norms, *numbers, branch_scale, *drops, impl)
