"""LayerNorm and the step of a Sandwich-LN transformer in Triton: whole rows in registers, one read and one write.

Memory. Rows lie at any offsets, their elements beside each other; parameters and statistics are contiguous. h is read
back as it was rounded.

Rows of more than 4096 elements spill to local memory in the backward, of more than 8192 in the forward.

Gradients of weights: every program sums its rows, the programs' sums are added up in order. Their number depends on the
shape and the GPU, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _registration
from ..sandwich_layer_norm import register
from . import _rows
from ._rows import row_offsets
from ._tiles import DEVICES, accumulator, check_interpreter, exactly, kernel, launch, two_parts

ROW, TENSOR = 1, 2  # relax, as in cogview_ops.sandwich_layer_norm
PACK = 8  # elements of a tensor in a thread, about


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
def normalise(x, valid, weight, bias, peak, cols, eps, RELAX: tl.constexpr, ACC: tl.constexpr):
    """LN of rows x, zeros behind `cols`; also their mean and 1 / standard deviation."""
    if RELAX == 1:
        c = row_peak(x, ACC)
    elif RELAX == 2:
        c = tl.zeros([x.shape[0]], ACC) + tl.load(peak) / 8
    else:
        c = tl.zeros([x.shape[0]], ACC) + 1
    c = tl.where(c == 0, 1.0, c)
    power = power_for(c) if RELAX != 0 else c
    x = x * power[:, None]
    mean = tl.sum(x, 1) / cols
    x = tl.where(valid, x - mean[:, None], 0.0)
    unit = c * power
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / cols + eps * unit * unit)
    return x * rstd[:, None] * weight + bias, mean / power, rstd * power


@triton.jit
def dropout(i, cols, seed, threshold, scale, M: tl.constexpr, N: tl.constexpr, QUADS: tl.constexpr):
    """Factors of rows i: element e of the raster order uses word e % 4 of Philox's counter e // 4. `seed` points to it,
    so that new ones compile nothing and a CUDA graph can have them."""
    seed = tl.load(seed)
    if QUADS:  # cols is a multiple of 4
        counter = (i * (cols // 4))[:, None] + tl.arange(0, N // 4)[None, :]
        w0, w1, w2, w3 = words_of(seed, counter)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        at = (i * cols)[:, None] + tl.arange(0, N)[None, :]
        w0, w1, w2, w3 = words_of(seed, at // 4)
        lane = at % 4
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return tl.where(word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold, scale, 0.0)


@triton.jit
def words_of(seed, counter):
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))


@kernel
def peak_kernel(
    x, peaks, x_n1, x_n2, x_s0, x_s1, x_s2, rows, cols, seed, threshold, drop_scale, drop_scale_low,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    j = tl.arange(0, N)[None, :]
    valid = (i < rows)[:, None] & (j < cols)
    at = row_offsets(i, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None] + j
    v = tl.load(x + at, mask=valid, other=0.0).to(ACC)
    if DROPOUT:
        v *= dropout(i, cols, seed, threshold, exactly(drop_scale, drop_scale_low, ACC), M, N, QUADS)
    tl.store(peaks + i, row_peak(v, ACC), mask=i < rows)


@kernel
def forward_kernel(
    branch, residual, h, x, post_weight, post_bias, pre_weight, pre_bias,
    post_mean, post_rstd, pre_mean, pre_rstd, post_peak, pre_peak, peaks,
    branch_n1, branch_n2, branch_s0, branch_s1, branch_s2, residual_n1, residual_n2, residual_s0, residual_s1,
    residual_s2, h_n1, h_n2, h_s0, h_s1, h_s2, x_n1, x_n2, x_s0, x_s1, x_s2,
    rows, cols, eps, eps_low, seed, threshold, drop_scale, drop_scale_low,
    POST: tl.constexpr, PRE: tl.constexpr, RELAX: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """POST: h = residual + LN(dropout(branch)), and the rows' largest |h| if not PRE; PRE: x = LN(h)."""
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    j = tl.arange(0, N)[None, :]
    valid = (i < rows)[:, None] & (j < cols)
    small = exactly(eps, eps_low, ACC)
    h_at = h + row_offsets(i, h_n1, h_n2, h_s0, h_s1, h_s2)[:, None] + j
    if POST:
        at = branch + row_offsets(i, branch_n1, branch_n2, branch_s0, branch_s1, branch_s2)[:, None] + j
        b = tl.load(at, mask=valid, other=0.0).to(ACC)
        at = residual + row_offsets(i, residual_n1, residual_n2, residual_s0, residual_s1, residual_s2)[:, None] + j
        r = tl.load(at, mask=valid, other=0.0).to(ACC)
        if DROPOUT:
            b *= dropout(i, cols, seed, threshold, exactly(drop_scale, drop_scale_low, ACC), M, N, QUADS)
        w = tl.load(post_weight + j, mask=j < cols, other=0.0).to(ACC)
        c = tl.load(post_bias + j, mask=j < cols, other=0.0).to(ACC)
        y, mean, rstd = normalise(b, valid, w, c, post_peak, cols, small, RELAX, ACC)
        tl.store(post_mean + i, mean, mask=i < rows)
        tl.store(post_rstd + i, rstd, mask=i < rows)
        total = (r + y).to(h.dtype.element_ty)
        tl.store(h_at, total, mask=valid)
        v = tl.where(valid, total.to(ACC), 0.0)
        if not PRE:
            tl.store(peaks + i, row_peak(v, ACC), mask=i < rows)
    else:
        v = tl.load(h_at, mask=valid, other=0.0).to(ACC)
    if PRE:
        w = tl.load(pre_weight + j, mask=j < cols, other=0.0).to(ACC)
        c = tl.load(pre_bias + j, mask=j < cols, other=0.0).to(ACC)
        y, mean, rstd = normalise(v, valid, w, c, pre_peak, cols, small, RELAX, ACC)
        tl.store(pre_mean + i, mean, mask=i < rows)
        tl.store(pre_rstd + i, rstd, mask=i < rows)
        at = x + row_offsets(i, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None] + j
        tl.store(at, y.to(x.dtype.element_ty), mask=valid)


@triton.jit
def norm_gradient(x, dy, weight, mean, rstd, cols):
    """Of the norm's input; also the normalised input, whose product with dy is the weight's gradient."""
    # halves: the difference of two huge numbers does not overflow
    y = (x * 0.5 - (mean / 2)[:, None]) * (rstd * 2)[:, None]
    g = dy * weight
    mean_g = tl.sum(g, 1) / cols
    mean_gy = tl.sum(g * y, 1) / cols
    return (g - mean_g[:, None] - y * mean_gy[:, None]) * rstd[:, None], y


@kernel
def backward_kernel(
    dh, dx, branch, h, post_weight, pre_weight, post_mean, post_rstd, pre_mean, pre_rstd, dbranch, dresidual, part,
    dh_n1, dh_n2, dh_s0, dh_s1, dh_s2, dx_n1, dx_n2, dx_s0, dx_s1, dx_s2,
    branch_n1, branch_n2, branch_s0, branch_s1, branch_s2, h_n1, h_n2, h_s0, h_s1, h_s2,
    dbranch_n1, dbranch_n2, dbranch_s0, dbranch_s1, dbranch_s2,
    dresidual_n1, dresidual_n2, dresidual_s0, dresidual_s1, dresidual_s2,
    rows, cols, seed, threshold, drop_scale, drop_scale_low,
    DH: tl.constexpr, DX: tl.constexpr, POST: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """part[p, k]: sums of program p over its rows, of the gradients of weight and bias of pre-norm, then post-norm."""
    j = tl.arange(0, N)[None, :]
    pre_w = tl.zeros([1, N], ACC)
    pre_b = tl.zeros([1, N], ACC)
    post_w = tl.zeros([1, N], ACC)
    post_b = tl.zeros([1, N], ACC)
    if DX:
        w_pre = tl.load(pre_weight + j, mask=j < cols, other=0.0).to(ACC)
    if POST:
        w_post = tl.load(post_weight + j, mask=j < cols, other=0.0).to(ACC)
    for t in range(tl.program_id(0), tl.cdiv(rows, M), tl.num_programs(0)):
        i = tl.cast(t, tl.int64) * M + tl.arange(0, M)
        valid = (i < rows)[:, None] & (j < cols)
        d = tl.zeros([M, N], ACC)
        if DX:
            at = dx + row_offsets(i, dx_n1, dx_n2, dx_s0, dx_s1, dx_s2)[:, None] + j
            dy = tl.load(at, mask=valid, other=0.0).to(ACC)
            at = h + row_offsets(i, h_n1, h_n2, h_s0, h_s1, h_s2)[:, None] + j
            v = tl.load(at, mask=valid, other=0.0).to(ACC)
            mean = tl.load(pre_mean + i, mask=i < rows, other=0.0)
            rstd = tl.load(pre_rstd + i, mask=i < rows, other=0.0)
            d, y = norm_gradient(v, dy, w_pre, mean, rstd, cols)
            pre_w += tl.sum(dy * y, 0)[None, :]
            pre_b += tl.sum(dy, 0)[None, :]
        if DH:
            at = dh + row_offsets(i, dh_n1, dh_n2, dh_s0, dh_s1, dh_s2)[:, None] + j
            d += tl.load(at, mask=valid, other=0.0).to(ACC)
        at = dresidual + row_offsets(i, dresidual_n1, dresidual_n2, dresidual_s0, dresidual_s1, dresidual_s2)[:, None]
        tl.store(at + j, d.to(dresidual.dtype.element_ty), mask=valid)
        if POST:
            d = tl.where(valid, d, 0.0)
            at = branch + row_offsets(i, branch_n1, branch_n2, branch_s0, branch_s1, branch_s2)[:, None] + j
            v = tl.load(at, mask=valid, other=0.0).to(ACC)
            if DROPOUT:
                factor = dropout(i, cols, seed, threshold, exactly(drop_scale, drop_scale_low, ACC), M, N, QUADS)
                v *= factor
            mean = tl.load(post_mean + i, mask=i < rows, other=0.0)
            rstd = tl.load(post_rstd + i, mask=i < rows, other=0.0)
            db, y = norm_gradient(v, d, w_post, mean, rstd, cols)
            post_w += tl.sum(d * y, 0)[None, :]
            post_b += tl.sum(d, 0)[None, :]
            if DROPOUT:
                db *= factor
            at = dbranch + row_offsets(i, dbranch_n1, dbranch_n2, dbranch_s0, dbranch_s1, dbranch_s2)[:, None] + j
            tl.store(at, db.to(dbranch.dtype.element_ty), mask=valid)
    at = part + tl.program_id(0).to(tl.int64) * (4 if POST else 2) * N + j
    tl.store(at, pre_w)
    tl.store(at + N, pre_b)
    if POST:
        tl.store(at + 2 * N, post_w)
        tl.store(at + 3 * N, post_b)


# --- host ------------------------------------------------------------------------------------------------------------


def _shared(x: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> _rows.Arguments:
    check_interpreter(x)
    cols = x.shape[-1]
    _rows.fits_one_program(cols)
    threshold = round(dropout_p * 2**32)
    return {
        "rows": x.numel() // cols, "cols": cols, "seed": x if seed is None else seed, "threshold": threshold,
        **two_parts(drop_scale=1 / (1 - dropout_p) if dropout_p < 1 and threshold < 2**32 else 0.0),
        "DROPOUT": dropout_p > 0, "QUADS": cols % 4 == 0, "ACC": accumulator(x.dtype),
    }  # fmt: skip


def _peak(x: Tensor, shared: _rows.Arguments, config: _rows.Config) -> Tensor:
    """The largest |element|, on the device."""
    peaks = torch.empty(shared["rows"], dtype=_registration.statistic(x).dtype, device=x.device)
    launch(
        peak_kernel, (triton.cdiv(shared["rows"], config.m),), config,
        x=x, peaks=peaks, **_rows.row_strides(x=x), **shared, M=config.m, N=config.n,
    )  # fmt: skip
    return peaks.amax()


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relax: int) -> tuple[Tensor, ...]:
    out, mean, rstd = _registration.empty_rows(x), _registration.statistic(x), _registration.statistic(x)
    if x.numel():
        rows, y = _rows.addressable(x), _rows.addressable(out)
        shared, config = _shared(x), _rows.tile(x.shape[-1], 2 * PACK)
        peak = _peak(rows, shared, config) if relax == TENSOR else mean
        launch(
            forward_kernel, (triton.cdiv(shared["rows"], config.m),), config,
            **dict.fromkeys(("branch", "residual", "h"), rows), x=y,
            **dict.fromkeys(("post_weight", "pre_weight"), weight), **dict.fromkeys(("post_bias", "pre_bias"), bias),
            **dict.fromkeys(("post_mean", "pre_mean"), mean), **dict.fromkeys(("post_rstd", "pre_rstd"), rstd),
            **dict.fromkeys(("post_peak", "pre_peak", "peaks"), peak),
            **_rows.row_strides(branch=rows, residual=rows, h=rows, x=y), **two_parts(eps=eps), **shared,
            POST=False, PRE=True, RELAX=relax, M=config.m, N=config.n,
        )  # fmt: skip
        if y is not out:
            out.copy_(y)
    return out, mean, rstd


def sandwich_forward(
    branch: Tensor, residual: Tensor, post_weight: Tensor, post_bias: Tensor, pre_weight: Tensor, pre_bias: Tensor,
    eps: float, relax: int, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    h, x = _registration.empty_rows(branch), _registration.empty_rows(branch)
    stats = [_registration.statistic(branch) for _ in range(4)]
    if not branch.numel():
        return h, x, *stats
    b, r, sums, y = (_rows.addressable(t) for t in (branch, residual, h, x))
    shared, config = _shared(branch, dropout_p, seed), _rows.tile(branch.shape[-1], PACK)
    names = ("post_mean", "post_rstd", "pre_mean", "pre_rstd")
    arguments = {
        "branch": b, "residual": r, "h": sums, "x": y, "post_weight": post_weight, "post_bias": post_bias,
        "pre_weight": pre_weight, "pre_bias": pre_bias, **dict(zip(names, stats, strict=True)),
        **dict.fromkeys(("post_peak", "pre_peak", "peaks"), stats[0]),
        **_rows.row_strides(branch=b, residual=r, h=sums, x=y), **two_parts(eps=eps), **shared,
        "RELAX": relax, "M": config.m, "N": config.n,
    }  # fmt: skip
    grid = (triton.cdiv(shared["rows"], config.m),)
    if relax == TENSOR:  # the whole of h must be known before x is
        arguments |= {"post_peak": _peak(b, shared, config), "peaks": torch.empty_like(stats[0]).flatten()}
        launch(forward_kernel, grid, config, **arguments, POST=True, PRE=False)
        arguments |= {"pre_peak": arguments["peaks"].amax(), "DROPOUT": False}
        launch(forward_kernel, grid, config, **arguments, POST=False, PRE=True)
    else:
        launch(forward_kernel, grid, config, **arguments, POST=True, PRE=True)
    return h if sums is h else h.copy_(sums), x if y is x else x.copy_(y), *stats


def _backward(
    dh: Tensor | None, dx: Tensor | None, branch: Tensor | None, h: Tensor, weights: tuple[Tensor, Tensor],
    stats: tuple[Tensor, ...], dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of branch and residual, and of weight and bias of the pre-norm, then the post-norm."""
    dbranch, dresidual = _registration.empty_rows(h if branch is None else branch), _registration.empty_rows(h)
    kinds = 2 if branch is None else 4
    post_weight, pre_weight = weights
    dtypes = [pre_weight.dtype, pre_weight.dtype, post_weight.dtype, post_weight.dtype][:kinds]
    if not h.numel():
        return dbranch, dresidual, [h.new_zeros(h.shape[-1], dtype=dtype) for dtype in dtypes]
    shared, config = _shared(h, dropout_p, seed), _rows.tile(h.shape[-1], PACK)
    count = _rows.programs(triton.cdiv(shared["rows"], config.m), h.device)
    part = torch.empty(count, kinds, config.n, dtype=_registration.statistic(h).dtype, device=h.device)
    given = {"dh": dh, "dx": dx, "branch": branch, "h": h, "dbranch": dbranch, "dresidual": dresidual}
    tensors = {name: _rows.addressable(h if x is None else x) for name, x in given.items()}
    names = ("post_mean", "post_rstd", "pre_mean", "pre_rstd")
    launch(
        backward_kernel, (count,), config,
        **tensors, **_rows.row_strides(**tensors), post_weight=post_weight, pre_weight=pre_weight,
        **dict(zip(names, stats, strict=True)), part=part, **shared, DH=dh is not None, DX=dx is not None,
        POST=branch is not None, M=config.m, N=config.n,
    )  # fmt: skip
    for name, x in (("dbranch", dbranch), ("dresidual", dresidual)):
        if tensors[name] is not x:
            x.copy_(tensors[name])
    sums = part.sum(0)[:, : h.shape[-1]]
    return dbranch, dresidual, [x.to(dtype, copy=True) for x, dtype in zip(sums, dtypes, strict=True)]


def layer_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    _, grad, sums = _backward(None, dout, None, x, (weight, weight), (mean, rstd, mean, rstd), 0.0, None)
    return grad, *sums


def sandwich_backward(
    dh: Tensor | None, dx: Tensor | None, branch: Tensor, h: Tensor, post_weight: Tensor, pre_weight: Tensor,
    post_mean: Tensor, post_rstd: Tensor, pre_mean: Tensor, pre_rstd: Tensor, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    stats = (post_mean, post_rstd, pre_mean, pre_rstd)
    dbranch, dresidual, sums = _backward(dh, dx, branch, h, (post_weight, pre_weight), stats, dropout_p, seed)
    return dbranch, dresidual, *sums[2:], *sums[:2]


register("cogview_ops_triton")
_registration.implement("layer_norm_fwd", layer_norm_forward, DEVICES)
_registration.implement("layer_norm_bwd", layer_norm_backward, DEVICES)
_registration.implement("sandwich_layer_norm_fwd", sandwich_forward, DEVICES)
_registration.implement("sandwich_layer_norm_bwd", sandwich_backward, DEVICES)
