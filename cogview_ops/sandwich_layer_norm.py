"""LayerNorm with precision-bottleneck relaxation, and the fused step of a transformer with LayerNorm.

CogView, arXiv 2105.13290, section 2.4. PB-relax is LN(x / c), which equals LN(x) with `eps * c**2`: no pass over
memory of its own, and nothing can overflow. c is held constant in the backward. On CPU, gradients of weights are sums
over blocks of rows that depend on the shape alone: they repeat bit for bit with any number of threads.
"""

from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from . import _norms
from ._norm_operators import register as register


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relax: str | None = "row",
    weight_offset: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    r"""LayerNorm over the last dimension, `(y - mean(y)) / sqrt(var(y) + eps) * (weight + weight_offset) + bias` with
    `y = x / c`.

    Args:
        x: `[..., D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        weight, bias: `[D]`, in x's dtype or float32, under autocast in any. Without a weight y is multiplied by 1,
            whatever the offset; without a bias 0 is added.
        eps: added to the variance of `x / c`, above 0.
        relax: c. "row": the largest |x| of the row. "tensor": the largest |x| of the whole tensor over 8, what the
            published CogView weights were trained with (it couples the samples of a batch). None: 1, plain LayerNorm.
            c = 0 counts as 1, so all-zero rows give `bias`.
        weight_offset: added to a weight that is given, in float32; 1 for weights that are kept as differences from 1.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        Shape and dtype of `x`; under autocast its dtype, since a product is next that would cast: `x` is read in its
        own and rounded once. (`torch.nn.functional.layer_norm` gives float32 there.)
    """
    return _norms.norm("layer_norm", x, weight, bias, eps, relax, weight_offset, False, impl)


class _Options(TypedDict, total=False):
    """Of `sandwich_layer_norm`, but for norms: what type checkers read."""

    eps: float
    relax: str | None
    weight_offset: float
    branch_scale: float | Tensor
    dropout_p: float
    dropout_after_norm: bool
    seed: int | Tensor | None
    impl: str


@overload
def sandwich_layer_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    norms: Literal["both", "pre"] = "both",
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def sandwich_layer_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    norms: Literal["post"],
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def sandwich_layer_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    norms: str,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


def sandwich_layer_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    norms: str = "both",
    eps: float = 1e-5,
    relax: str | None = "row",
    weight_offset: float = 0.0,
    branch_scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_after_norm: bool = False,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""One step of a transformer: `h = residual + branch_scale * LN_post(dropout(branch))`, `x = LN_pre(h)`.

    In a model the pre-norm is that of the next sub-layer, so a whole layer is two calls. Sandwich-LN (CogView) has both
    norms; a pre-norm alone is add + norm (GPT-2, ViT), a post-norm alone Swin v2's step.

    Args:
        branch: `[..., D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        residual: the same shape, in branch's dtype, or float32 beside bfloat16 or float16: a residual stream that keeps
            its precision, under autocast as well, which changes no dtype here.
        post_weight, post_bias, pre_weight, pre_bias: `[D]`, all in branch's dtype or all in float32, under autocast in
            any; None is 1, or 0.
        norms: "both"; "pre": h is the sum with the branch itself; "post": there is no x. Weights and biases of a norm
            that is not there are None.
        eps, relax, weight_offset: as in `layer_norm`, for both norms. With relax "tensor" the branch is read once more;
            h's maximum comes with h.
        branch_scale: a number, or a tensor of any float dtype that broadcasts to `[..., 1]`, which has a gradient:
            drop-path of samples, gates of tokens.
        dropout_p: probability in [0, 1] that an element of `branch` is zeroed; the others are divided by 1 - p.
        dropout_after_norm: dropout of `LN_post(branch)` instead.
        seed: which elements (Philox4x32-10 of the seed and the element's place in raster order), 0 <= seed < 2**63;
            required with dropout, so that a run repeats. The backward computes the mask again. A tensor of one int64 on
            the input's device is read when the kernels run, forward and backward alike: a CUDA graph drops anew when
            it has changed in between. It must stay the same from a forward to its backward. A tensor `[B]` has a seed
            for each sample of a branch `[B, ..., D]`, and places count from 0 in each: what is dropped of a sample
            does not depend on its batch.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `(h, x)`, or h alone with norms="post": h with shape and dtype of `residual`, x of `branch`, each computed in
        float32 (float64 for float64) from what was read and rounded once. Gradients have their input's dtype.
    """
    given = post_weight, post_bias, pre_weight, pre_bias
    numbers = eps, relax, weight_offset, False
    drops = dropout_p, dropout_after_norm, seed
    return _norms.step("layer_norm", branch, residual, given, norms, *numbers, branch_scale, *drops, impl)
