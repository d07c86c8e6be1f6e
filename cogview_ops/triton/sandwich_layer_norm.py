"""LayerNorm and the step of a Sandwich-LN transformer in Triton: whole rows in registers, one read and one write.

Memory. Rows lie at any offsets, their elements beside each other; parameters and statistics are contiguous. h is read
back as it was rounded.

Rows of more than 4096 elements spill to local memory in the backward, of more than 8192 in the forward.

Gradients of weights: every program sums its rows, the programs' sums are added up in order. Their number depends on the
shape and the GPU, so results repeat bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _registration
from ..sandwich_layer_norm import register
from . import _rows
from ._rows import Matrix, load, matrix, store, tile_of
from ._tiles import DEVICES, Number, exactly, kernel, launch, number
from .configs import Config

ROW, TENSOR = 1, 2  # relax, as in cogview_ops.sandwich_layer_norm
PACK = 8  # elements of a tensor in a thread, about


class Norm(NamedTuple):
    """Not to be compared with None: of a tuple with None in it Triton 3.6 cannot tell."""

    weight: Any
    bias: Any  # None in the backward, like the peak
    mean: Any  # of each row, like 1 / standard deviation
    rstd: Any
    peak: Any = None  # largest |element| of the tensor


class Dropout(NamedTuple):
    seed: Any  # in memory, so that new ones compile nothing and a CUDA graph can have them
    scale: Number  # of what is kept


@triton.jit
def magnitude_bits(x):
    """Bits of |x|: ordered as the numbers are, NaN last."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_peak(x, ACC: tl.constexpr):
    return tl.max(magnitude_bits(x), 1).to(ACC, bitcast=True)


@triton.jit
def power_for(c):
    """The power of two that brings c near 1: exact, so LN(x / c) is LN(x * power) with eps * (c * power)**2."""
    if c.dtype == tl.float64:
        return (tl.maximum(2046 - (magnitude_bits(c) >> 52), 1) << 52).to(tl.float64, bitcast=True)
    else:
        return (tl.maximum(254 - (magnitude_bits(c) >> 23), 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def parameter(at, j, cols, ACC: tl.constexpr):
    return tl.load(at + j, mask=j < cols, other=0.0).to(ACC)


@triton.jit
def normalise(x, tile, norm, cols, eps, RELAX: tl.constexpr, ACC: tl.constexpr):
    """LN of rows x, zeros behind `cols`; keeps their mean and 1 / standard deviation."""
    weight, bias = parameter(norm.weight, tile.j, cols, ACC), parameter(norm.bias, tile.j, cols, ACC)
    if RELAX == 1:
        c = row_peak(x, ACC)
    elif RELAX == 2:
        c = tl.zeros([x.shape[0]], ACC) + tl.load(norm.peak) / 8
    else:
        c = tl.zeros([x.shape[0]], ACC) + 1
    c = tl.where(c == 0, 1.0, c)
    power = power_for(c) if RELAX != 0 else c
    x = x * power[:, None]
    mean = tl.sum(x, 1) / cols
    x = tl.where(tile.there, x - mean[:, None], 0.0)
    unit = c * power
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / cols + exactly(eps, ACC) * unit * unit)
    y = x * rstd[:, None] * weight + bias
    tl.store(norm.mean + tile.i, mean / power, mask=tile.row)
    tl.store(norm.rstd + tile.i, rstd * power, mask=tile.row)
    return y


@triton.jit
def dropout(i, drop, threshold, cols, QUADS: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr):
    """Factors of rows i: element e of the raster order uses word e % 4 of Philox's counter e // 4."""
    seed = tl.load(drop.seed)
    if QUADS:  # cols is a multiple of 4
        counter = (i * (cols // 4))[:, None] + tl.arange(0, N // 4)[None, :]
        w0, w1, w2, w3 = words_of(seed, counter)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        at = (i * cols)[:, None] + tl.arange(0, N)[None, :]
        w0, w1, w2, w3 = words_of(seed, at // 4)
        lane = at % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    scale = exactly(drop.scale, ACC)
    return tl.where(word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def words_of(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))


@kernel
def peak_kernel(
    x,
    peaks,
    rows,
    cols,
    drop,
    threshold,
    QUADS: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    tile = tile_of(tl.program_id(0), rows, cols, M, N)
    v = load(x, tile, tile.there, ACC)
    if drop is not None:
        v *= dropout(tile.i, drop, threshold, cols, QUADS, ACC, N)
    tl.store(peaks + tile.i, row_peak(v, ACC), mask=tile.row)


@kernel
def forward_kernel(
    h,
    branch,
    residual,
    x,
    post,
    pre,
    peaks,
    rows,
    cols,
    eps,
    drop,
    threshold,
    RELAX: tl.constexpr,
    QUADS: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """With a branch h = residual + LN(dropout(branch)); with an x that is LN(h), else the rows' largest |h|."""
    tile = tile_of(tl.program_id(0), rows, cols, M, N)
    if branch is not None:
        b = load(branch, tile, tile.there, ACC)
        r = load(residual, tile, tile.there, ACC)
        if drop is not None:
            b *= dropout(tile.i, drop, threshold, cols, QUADS, ACC, N)
        y = normalise(b, tile, post, cols, eps, RELAX, ACC)
        total = (r + y).to(h.at.dtype.element_ty)
        store(h, tile, total)
        v = tl.where(tile.there, total.to(ACC), 0.0)
    else:
        v = load(h, tile, tile.there, ACC)
    if x is not None:
        store(x, tile, normalise(v, tile, pre, cols, eps, RELAX, ACC))
    else:
        tl.store(peaks + tile.i, row_peak(v, ACC), mask=tile.row)


@triton.jit
def norm_gradient(x, dy, tile, norm, weight, cols):
    """Of the norm's input; also the normalised input, whose product with dy is the weight's gradient."""
    mean = tl.load(norm.mean + tile.i, mask=tile.row, other=0.0)
    rstd = tl.load(norm.rstd + tile.i, mask=tile.row, other=0.0)
    # halves: the difference of two huge numbers does not overflow
    y = (x * 0.5 - (mean / 2)[:, None]) * (rstd * 2)[:, None]
    g = dy * weight
    mean_g = tl.sum(g, 1) / cols
    mean_gy = tl.sum(g * y, 1) / cols
    return (g - mean_g[:, None] - y * mean_gy[:, None]) * rstd[:, None], y


@kernel
def backward_kernel(
    h,
    branch,
    dh,
    dx,
    dbranch,
    dresidual,
    post,
    pre,
    part,
    rows,
    cols,
    drop,
    threshold,
    QUADS: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """part[p, k]: sums of program p over its rows, of the gradients of weight and bias of pre-norm, then post-norm."""
    j = tl.arange(0, N)[None, :]
    pre_w = tl.zeros([1, N], ACC)
    pre_b = tl.zeros([1, N], ACC)
    post_w = tl.zeros([1, N], ACC)
    post_b = tl.zeros([1, N], ACC)
    if dx is not None:
        w_pre = parameter(pre.weight, j, cols, ACC)
    for t in range(tl.program_id(0), tl.cdiv(rows, M), tl.num_programs(0)):
        tile = tile_of(t, rows, cols, M, N)
        d = tl.zeros([M, N], ACC)
        if dx is not None:
            dy = load(dx, tile, tile.there, ACC)
            d, y = norm_gradient(load(h, tile, tile.there, ACC), dy, tile, pre, w_pre, cols)
            pre_w += tl.sum(dy * y, 0)[None, :]
            pre_b += tl.sum(dy, 0)[None, :]
        if dh is not None:
            d += load(dh, tile, tile.there, ACC)
        store(dresidual, tile, d)
        if branch is not None:
            d = tl.where(tile.there, d, 0.0)
            v = load(branch, tile, tile.there, ACC)
            if drop is not None:
                factor = dropout(tile.i, drop, threshold, cols, QUADS, ACC, N)
                v *= factor
            w_post = parameter(post.weight, j, cols, ACC)  # for each tile: kept, registers spill beside a wide h
            db, y = norm_gradient(v, d, tile, post, w_post, cols)
            post_w += tl.sum(d * y, 0)[None, :]
            post_b += tl.sum(d, 0)[None, :]
            if drop is not None:
                db *= factor
            store(dbranch, tile, db)
    at = part + tl.program_id(0).to(tl.int64) * (2 if branch is None else 4) * N + j
    tl.store(at, pre_w)
    tl.store(at + N, pre_b)
    if branch is not None:
        tl.store(at + 2 * N, post_w)
        tl.store(at + 3 * N, post_b)


# --- host ------------------------------------------------------------------------------------------------------------


def _dropout(x: Tensor, p: float, seed: Tensor | None) -> dict[str, Any]:
    threshold = round(p * 2**32)
    scale = 1 / (1 - p) if p < 1 and threshold < 2**32 else 0.0
    drop = Dropout(seed, number(scale)) if p > 0 else None
    return {"drop": drop, "threshold": threshold, "QUADS": p > 0 and x.shape[-1] % 4 == 0}


def _peak(x: Tensor, made: Matrix, config: Config, **arguments: Any) -> Tensor:
    """The largest |element|, on the device."""
    peaks = _registration.statistic(x).flatten()
    launch(peak_kernel, _rows.grid(x, config), config, x=made, peaks=peaks, **arguments)
    return peaks.amax()


def _forward(grid: tuple[int], config: Config, **given: Any) -> None:
    arguments = dict.fromkeys(("h", "branch", "residual", "x", "post", "pre", "peaks")) | given
    launch(forward_kernel, grid, config, **arguments)


def _not_yet(known: bool) -> None:
    if not known:
        raise NotImplementedError("not implemented in Triton yet")


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relax: int,
    weight_offset: float,
    round_before_weight: bool,
) -> tuple[Tensor, ...]:
    _not_yet(weight_offset == 0)
    out, mean, rstd = _registration.empty_rows(x), _registration.statistic(x), _registration.statistic(x)
    if x.numel():
        config = _rows.tiling(x.shape[-1], 2 * PACK)
        shared = _rows.shared(x, config) | _dropout(x, 0.0, None)
        rows, made = matrix(x), matrix(out)
        norm = Norm(weight, bias, mean, rstd, _peak(x, rows, config, **shared) if relax == TENSOR else None)
        shared |= {"eps": number(eps), "RELAX": relax}
        _forward(_rows.grid(x, config), config, h=rows, x=made, pre=norm, **shared)
        _rows.kept(out, made)
    return out, mean, rstd


def sandwich_forward(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
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
    _not_yet(post_weight is not None and pre_weight is not None and row_scale is None)
    _not_yet(branch_scale == 1 and weight_offset == 0 and not dropout_after_norm)
    h, x = _registration.empty_rows(residual), _registration.empty_rows(branch)
    stats = [_registration.statistic(branch) for _ in range(4)]
    if not branch.numel():
        return h, x, *stats
    config = _rows.tiling(branch.shape[-1], PACK)
    grid, shared, drop = _rows.grid(branch, config), _rows.shared(branch, config), _dropout(branch, dropout_p, seed)
    post, pre = Norm(post_weight, post_bias, *stats[:2]), Norm(pre_weight, pre_bias, *stats[2:])
    rows, sums, made = matrix(branch), matrix(h), matrix(x)
    if relax == TENSOR:
        post = post._replace(peak=_peak(branch, rows, config, **shared, **drop))
    shared |= {"eps": number(eps), "RELAX": relax}
    first = {"branch": rows, "residual": matrix(residual), **drop, **shared}
    if relax == TENSOR:  # the whole of h must be known before x is
        peaks = torch.empty_like(stats[0]).flatten()
        _forward(grid, config, h=sums, post=post, peaks=peaks, **first)
        pre = pre._replace(peak=peaks.amax())
        _forward(grid, config, h=sums, x=made, pre=pre, **_dropout(branch, 0.0, None), **shared)
    else:
        _forward(grid, config, h=sums, x=made, post=post, pre=pre, **first)
    return _rows.kept(h, sums), _rows.kept(x, made), *stats


def _backward(
    dh: Tensor | None,
    dx: Tensor | None,
    branch: Tensor | None,
    h: Tensor,
    post: Norm | None,
    pre: Norm,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of branch, if there is one, and residual; of weight and bias of the pre-norm, then the post-norm."""
    grads = [_registration.empty_rows(x) for x in (branch, h) if x is not None]
    weights = [norm.weight for norm in (pre, post) if norm is not None for _ in ("weight", "bias")]
    if not h.numel():
        return grads, [h.new_zeros(h.shape[-1], dtype=x.dtype) for x in weights]
    config = _rows.tiling(h.shape[-1], PACK)
    count = _rows.programs(*_rows.grid(h, config), h.device)
    part = torch.empty(count, len(weights), config.n, dtype=_registration.statistic(h).dtype, device=h.device)
    made = [matrix(x) for x in grads]
    dbranch, dresidual = [None, *made][-2:]
    given = {"h": h, "branch": branch, "dh": dh, "dx": dx}
    arguments: dict[str, Any] = {name: None if x is None else matrix(x) for name, x in given.items()}
    arguments |= {"dbranch": dbranch, "dresidual": dresidual, "post": post, "pre": pre, "part": part}
    arguments |= {**_rows.shared(h, config), **_dropout(h, dropout_p, seed)}
    launch(backward_kernel, (count,), config, **arguments)
    for x, y in zip(grads, made, strict=True):
        _rows.kept(x, y)
    sums = part.sum(0)[:, : h.shape[-1]]
    return grads, [x.to(weight.dtype, copy=True) for x, weight in zip(sums, weights, strict=True)]


def layer_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, weight_offset: float
) -> tuple[Tensor, ...]:
    grads, sums = _backward(None, dout, None, x, None, Norm(weight, None, mean, rstd))
    return *grads, *sums


def sandwich_backward(
    dh: Tensor | None,
    dx: Tensor | None,
    branch: Tensor,
    h: Tensor,
    post_weight: Tensor,
    post_bias: Tensor | None,
    pre_weight: Tensor,
    row_scale: Tensor | None,
    post_mean: Tensor,
    post_rstd: Tensor,
    pre_mean: Tensor,
    pre_rstd: Tensor,
    same_gradient: bool,
    branch_scale: float,
    weight_offset: float,
    dropout_p: float,
    dropout_after_norm: bool,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    post, pre = Norm(post_weight, None, post_mean, post_rstd), Norm(pre_weight, None, pre_mean, pre_rstd)
    grads, sums = _backward(dh, dx, branch, h, post, pre, dropout_p, seed)
    absent = h.new_empty(0)
    return grads[0], absent if dx is None else grads[1], absent.clone(), *sums[2:], *sums[:2]


register("cogview_ops_triton")
_registration.implement("layer_norm_fwd", layer_norm_forward, DEVICES)
_registration.implement("layer_norm_bwd", layer_norm_backward, DEVICES)
_registration.implement("sandwich_layer_norm_fwd", sandwich_forward, DEVICES)
_registration.implement("sandwich_layer_norm_bwd", sandwich_backward, DEVICES)
