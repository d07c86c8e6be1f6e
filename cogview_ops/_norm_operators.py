"""The torch operators of both kinds of norm and of the steps made of them: schemas, fake kernels, derivatives.

Both kinds have the same operators. Of a step, a norm is there where its weight is. What is absent goes in as None and
comes out as an empty tensor: RMSNorm's bias and mean, and what would be a second name of another tensor, in the
backward of a step

- dresidual without dx: it is dh;
- dbranch with `same_gradient`, where the branch is added as it is (no post-norm, scale or dropout, one dtype): it is
  dresidual.

A step without a post-norm is differentiated without its branch, unless row_scale needs a gradient: dx has its dtype.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _namespaces, _registration, _sharding

KINDS = ("layer_norm", "rms_norm")


def _statistics(kind: str, x: Tensor, there: bool = True) -> list[Tensor]:
    """Mean and 1 / standard deviation, or 1 / root mean square, of each row."""
    which = there and kind == "layer_norm", there
    return [_registration.statistic(x) if yes else x.new_empty(0) for yes in which]


def _fwd_fake(kind: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _registration.empty_rows(x), *_statistics(kind, x)


def _bwd_fake(kind: str, dout: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _registration.empty_rows(x), *_weight_gradients(kind, x, weight)


def _weight_gradients(kind: str, x: Tensor, weight: Tensor | None) -> list[Tensor]:
    if weight is None:
        return [x.new_empty(0), x.new_empty(0)]
    return [torch.empty_like(weight), torch.empty_like(weight) if kind == "layer_norm" else x.new_empty(0)]


def _step_fwd_fake(
    kind: str,
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    stats = [x for w in (post_weight, pre_weight) for x in _statistics(kind, branch, w is not None)]
    x = branch.new_empty(0) if pre_weight is None else _registration.empty_rows(branch)
    return _registration.empty_rows(residual), x, *stats


def _step_bwd_fake(
    kind: str,
    dh: Tensor | None,
    dx: Tensor | None,
    branch: Tensor | None,
    h: Tensor | None,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    row_scale: Tensor | None,
    post_mean: Tensor | None,
    post_rstd: Tensor | None,
    pre_mean: Tensor | None,
    pre_rstd: Tensor | None,
    same_gradient: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    like = dx if branch is None else branch
    assert like is not None
    dbranch = like.new_empty(0) if same_gradient else _registration.empty_rows(like)
    dresidual = like.new_empty(0) if dx is None or h is None else _registration.empty_rows(h)
    drow_scale = like.new_empty(0) if row_scale is None or branch is None else torch.empty_like(row_scale)
    weights = [x for w in (post_weight, pre_weight) for x in _weight_gradients(kind, like, w)]
    return dbranch, dresidual, drow_scale, *weights


def _setup_context(kind: str, ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, *_, ctx.weight_offset, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean if kind == "layer_norm" else None, rstd)


def _backward(kind: str, namespace: str, ctx: Any, dout: Tensor, *_: Any) -> Any:
    dx, dweight, dbias = _dispatch.run(namespace, f"{kind}_bwd", dout, *ctx.saved_tensors, ctx.weight_offset)
    return dx, dweight, dbias if kind == "layer_norm" else None, None, None, None, None


def _step_setup_context(kind: str, ctx: Any, inputs: Any, output: Any) -> None:
    branch, residual, post_weight, post_bias, pre_weight, _, row_scale, branch_scale = inputs[:8]
    *_, weight_offset, _, dropout_p, dropout_after_norm, seed = inputs
    h, x, *stats = output
    post, pre = post_weight is not None, pre_weight is not None
    ctx.mark_non_differentiable(*stats, *([] if pre else [x]))
    ctx.set_materialize_grads(False)
    as_it_is = not post and row_scale is None and branch_scale == 1 and dropout_p == 0
    ctx.same_gradient = as_it_is and branch.dtype == residual.dtype
    ctx.numbers = branch_scale, weight_offset, dropout_p, dropout_after_norm
    ctx.branch_dtype = branch.dtype
    means = kind == "layer_norm"
    there = post and means, post, pre and means, pre
    ctx.save_for_backward(
        branch if post or (row_scale is not None and ctx.needs_input_grad[6]) else None,
        h if pre else None,
        post_weight,
        None if row_scale is None else post_bias,
        pre_weight,
        row_scale,
        *(x if yes else None for x, yes in zip(stats, there, strict=True)),
        seed,
    )


def _step_backward(kind: str, namespace: str, ctx: Any, dh: Tensor | None, dx: Tensor | None, *_: Any) -> Any:
    if dh is None and dx is None:
        return (None,) * 15
    if dx is None and ctx.same_gradient:
        return dh, dh, *(None,) * 13
    *saved, seed = ctx.saved_tensors
    branch, h, *_ = saved
    given = dx
    if dx is None and branch is None:  # scaled, dropped or of another dtype
        given = h.new_zeros(h.shape, dtype=ctx.branch_dtype)
    arguments = _sharding.first(dh, h), given, *saved, ctx.same_gradient, *ctx.numbers, seed
    dbranch, dresidual, drow_scale, *dweights = _dispatch.run(namespace, f"sandwich_{kind}_bwd", *arguments)
    if dx is None:
        dresidual = dh
    if ctx.same_gradient:
        dbranch = dresidual
    there = ctx.needs_input_grad[2:7]
    dweights = [x if yes else None for x, yes in zip([*dweights, drow_scale], there, strict=True)]
    return dbranch, dresidual, *dweights, *(None,) * 8


def register(namespace: str) -> None:
    """Define the four operators of each kind in a namespace."""
    for kind in KINDS:
        _registration.define(
            f"{kind}_bwd",
            "(Tensor dout, Tensor x, Tensor weight, Tensor? mean, Tensor rstd, float weight_offset) "
            "-> (Tensor, Tensor, Tensor)",
            partial(_bwd_fake, kind),
            namespace=namespace,
        )
        _registration.define(
            f"{kind}_fwd",
            "(Tensor x, Tensor weight, Tensor? bias, float eps, int relax, float weight_offset, "
            "bool round_before_weight) -> (Tensor, Tensor, Tensor)",
            partial(_fwd_fake, kind),
            namespace=namespace,
            backward=partial(_backward, kind, namespace),
            setup_context=partial(_setup_context, kind),
        )
        _registration.define(
            f"sandwich_{kind}_bwd",
            "(Tensor? dh, Tensor? dx, Tensor? branch, Tensor? h, Tensor? post_weight, Tensor? post_bias, "
            "Tensor? pre_weight, Tensor? row_scale, Tensor? post_mean, Tensor? post_rstd, Tensor? pre_mean, "
            "Tensor? pre_rstd, bool same_gradient, float branch_scale, float weight_offset, float dropout_p, "
            "bool dropout_after_norm, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            partial(_step_bwd_fake, kind),
            namespace=namespace,
        )
        _registration.define(
            f"sandwich_{kind}_fwd",
            "(Tensor branch, Tensor residual, Tensor? post_weight, Tensor? post_bias, Tensor? pre_weight, "
            "Tensor? pre_bias, Tensor? row_scale, float branch_scale, float eps, int relax, float weight_offset, "
            "bool round_before_weight, float dropout_p, bool dropout_after_norm, Tensor? seed) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            partial(_step_fwd_fake, kind),
            namespace=namespace,
            backward=partial(_step_backward, kind, namespace),
            setup_context=partial(_step_setup_context, kind),
        )


register(_namespaces.COMPILED)
