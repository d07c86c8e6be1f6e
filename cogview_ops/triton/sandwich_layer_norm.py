"""LayerNorm, RMSNorm and the steps of a transformer made of them in Triton: what is launched; _norm_kernels.py has the
kernels."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _namespaces, _registration
from .._norm_operators import KINDS, register
from . import _rows
from ._norm_kernels import Dropout, Norm, backward_kernel, forward_kernel, peak_kernel
from ._rows import Matrix, matrix
from ._tiles import DEVICES, Number, contiguous, launch, number
from .configs import Config

ROW, TENSOR = 1, 2  # relax, as in cogview_ops._norms
PACK = 8  # elements of a tensor in a thread, about


def _dropout(x: Tensor, p: float, seed: Tensor | None) -> dict[str, Any]:
    threshold = round(p * 2**32)
    scale = 1 / (1 - p) if p < 1 and threshold < 2**32 else 0.0
    drop = rows_per_seed = None
    if p > 0:
        assert seed is not None
        drop = Dropout(contiguous(seed), number(scale))
        rows_per_seed = None if seed.numel() == 1 else x[0].numel() // x.shape[-1]
    numbers = {"drop": drop, "threshold": threshold, "rows_per_seed": rows_per_seed}
    return {**numbers, "QUADS": p > 0 and x.shape[-1] % 4 == 0}


def _unless(neutral: float, x: float) -> Number | None:
    return None if x == neutral else number(x)


def _matrix(x: Tensor | None) -> Matrix | None:
    return None if x is None else matrix(x)


def _peak(x: Tensor, made: Matrix, config: Config, **arguments: Any) -> Tensor:
    """The largest |element|, on the device."""
    peaks = _registration.statistic(x).flatten()
    launch(peak_kernel, _rows.grid(x, config), config, x=made, peaks=peaks, **arguments)
    return peaks.amax()


def _forward(grid: tuple[int], config: Config, **given: Any) -> None:
    absent = dict.fromkeys(("h", "branch", "residual", "x", "post", "pre", "peaks", "row_scale", "scale"))
    launch(forward_kernel, grid, config, **absent | {"POST": False, "AFTER": False} | given)


def _numbers(kind: str, eps: float, relax: int, weight_offset: float, round_before_weight: bool) -> dict[str, Any]:
    rms = kind == "rms_norm"
    numbers = {"eps": number(eps), "offset": _unless(0, weight_offset)}
    return {**numbers, "ROUND": round_before_weight and rms, "RELAX": relax, "RMS": rms}


def _statistics(kind: str, x: Tensor, there: bool = True) -> list[Tensor]:
    """Mean and rstd of each row; what there is not is empty."""
    which = there and kind == "layer_norm", there
    return [_registration.statistic(x) if yes else x.new_empty(0) for yes in which]


def norm_forward(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, relax: int, *numbers: Any
) -> tuple[Tensor, ...]:
    out, stats = _registration.empty_rows(x), _statistics(kind, x)
    if x.numel():
        config = _rows.tiling(x.shape[-1], 2 * PACK)
        shared = _rows.shared(x, config) | _dropout(x, 0.0, None)
        rows, made = matrix(x), matrix(out)
        norm = Norm(weight, bias, *stats)
        if relax == TENSOR:
            norm = norm._replace(peak=_peak(x, rows, config, **shared))
        _forward(
            _rows.grid(x, config), config, h=rows, x=made, pre=norm, **shared, **_numbers(kind, eps, relax, *numbers)
        )
        _rows.kept(out, made)
    return out, *stats


def step_forward(
    kind: str,
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    row_scale: Tensor | None,
    branch_scale: float,
    eps: float,
    relax: int,
    weight_offset: float,
    round_before_weight: bool,
    dropout_p: float,
    dropout_after_norm: bool,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    has_post, has_pre = post_weight is not None, pre_weight is not None
    h, x = _registration.empty_rows(residual), _registration.empty_rows(branch) if has_pre else branch.new_empty(0)
    post_stats, pre_stats = _statistics(kind, branch, has_post), _statistics(kind, branch, has_pre)
    if not branch.numel():
        return h, x, *post_stats, *pre_stats
    config = _rows.tiling(branch.shape[-1], PACK)
    grid, shared, drop = _rows.grid(branch, config), _rows.shared(branch, config), _dropout(branch, dropout_p, seed)
    none = _dropout(branch, 0.0, None)
    post, pre = Norm(post_weight, post_bias, *post_stats), Norm(pre_weight, pre_bias, *pre_stats)
    rows, sums, made = matrix(branch), matrix(h), matrix(x) if has_pre else None
    if relax == TENSOR and has_post:
        post = post._replace(peak=_peak(branch, rows, config, **shared, **(none if dropout_after_norm else drop)))
    numbers = shared | _numbers(kind, eps, relax, weight_offset, round_before_weight)
    first: dict[str, Any] = {
        "branch": rows,
        "residual": matrix(residual),
        "row_scale": contiguous(row_scale),
        "scale": _unless(1, branch_scale),
    }
    first |= {**drop, **numbers, "POST": has_post, "AFTER": dropout_after_norm and dropout_p > 0}
    if has_post:
        first["post"] = post
    if relax == TENSOR and has_pre:  # the whole of h must be known before x is
        peaks = torch.empty_like(pre_stats[1]).flatten()
        _forward(grid, config, h=sums, peaks=peaks, **first)
        pre = pre._replace(peak=peaks.amax())
        _forward(grid, config, h=sums, x=made, pre=pre, **none, **numbers)
    else:
        _forward(grid, config, h=sums, x=made, **first, **({"pre": pre} if has_pre else {}))
    _rows.kept(h, sums)
    if made is not None:
        _rows.kept(x, made)
    return h, x, *post_stats, *pre_stats


def _backward(
    kind: str, like: Tensor, norms: dict[str, Norm], config: Config, given: dict[str, Tensor | None], **arguments: Any
) -> list[Tensor]:
    """Gradients of weights and biases of the pre-norm, then the post-norm, as they are there; the others are written
    where `arguments` say."""
    parts = [norm.weight for norm in norms.values() for _ in range(2 if kind == "layer_norm" else 1)]
    count = _rows.programs(*_rows.grid(like, config), like.device)
    part = torch.empty(count, len(parts), config.n, dtype=_registration.statistic(like).dtype, device=like.device)
    arguments |= {name: _matrix(x) for name, x in given.items()} | {"pre": None, "post": None} | norms
    flags = {"RMS": kind == "rms_norm", "PRE": "pre" in norms, "POST": "post" in norms}
    launch(backward_kernel, (count,), config, part=part, **arguments, **flags, **_rows.shared(like, config))
    sums = part.sum(0)[:, : like.shape[-1]]
    return [x.to(weight.dtype, copy=True) for x, weight in zip(sums, parts, strict=True)]


def _no_rows(kind: str, weight: Tensor) -> list[Tensor]:
    return [torch.zeros_like(weight) for _ in range(2 if kind == "layer_norm" else 1)]


def norm_backward(
    kind: str, dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, ...]:
    grad, absent = _registration.empty_rows(x), [x.new_empty(0)] * (kind == "rms_norm")
    if not x.numel():
        return grad, *_no_rows(kind, weight), *absent
    config = _rows.tiling(x.shape[-1], PACK)
    made, pre = matrix(grad), Norm(weight, None, contiguous(mean), contiguous(rstd))
    given = {"h": x, "dx": dout, "dh": None, "branch": None}
    others = dict.fromkeys(("dbranch", "row_scale", "drow_scale", "scale"))
    numbers = {"offset": _unless(0, weight_offset), "AFTER": False, **_dropout(x, 0.0, None)}
    sums = _backward(kind, x, {"pre": pre}, config, given, dresidual=made, **others, **numbers)
    return _rows.kept(grad, made), *sums, *absent


def step_backward(
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
    branch_scale: float,
    weight_offset: float,
    dropout_p: float,
    dropout_after_norm: bool,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    like = dx if branch is None else branch
    assert like is not None

    def absent() -> Tensor:
        return like.new_empty(0)

    dbranch = absent() if same_gradient else _registration.empty_rows(like)
    dresidual = absent() if dx is None or h is None else _registration.empty_rows(h)
    row_scale, post_mean, post_rstd, pre_mean, pre_rstd = map(
        contiguous, (row_scale, post_mean, post_rstd, pre_mean, pre_rstd)
    )
    drow_scale = absent() if row_scale is None or branch is None else torch.empty_like(row_scale)
    norms = {}
    if pre_weight is not None:
        norms["pre"] = Norm(pre_weight, None, pre_mean, pre_rstd)
    if post_weight is not None:
        norms["post"] = Norm(post_weight, post_bias, post_mean, post_rstd)
    if like.numel():
        config = _rows.tiling(like.shape[-1], PACK)
        made = {"dbranch": dbranch, "dresidual": dresidual}
        matrices = {name: matrix(x) if x.numel() else None for name, x in made.items()}
        numbers: dict[str, Any] = {"scale": _unless(1, branch_scale), "offset": _unless(0, weight_offset)}
        numbers |= {"row_scale": row_scale, "drow_scale": drow_scale if drow_scale.numel() else None}
        numbers |= {"AFTER": dropout_after_norm and dropout_p > 0, **_dropout(like, dropout_p, seed)}
        given = {"h": h, "branch": branch, "dh": dh, "dx": dx}
        sums = _backward(kind, like, norms, config, given, **matrices, **numbers)
        for name, rows in matrices.items():
            if rows is not None:
                _rows.kept(made[name], rows)
    else:
        sums = [x for norm in norms.values() for x in _no_rows(kind, norm.weight)]
    each = 2 if kind == "layer_norm" else 1
    grads = {name: sums[i * each : (i + 1) * each] for i, name in enumerate(norms)}
    filled = [[*grads.get(name, []), absent(), absent()][:2] for name in ("post", "pre")]
    return dbranch, dresidual, drow_scale, *filled[0], *filled[1]


register(_namespaces.TRITON)
for _kind in KINDS:
    _registration.implement(f"{_kind}_fwd", partial(norm_forward, _kind), DEVICES)
    _registration.implement(f"{_kind}_bwd", partial(norm_backward, _kind), DEVICES)
    _registration.implement(f"sandwich_{_kind}_fwd", partial(step_forward, _kind), DEVICES)
    _registration.implement(f"sandwich_{_kind}_bwd", partial(step_backward, _kind), DEVICES)
