"""Kernels of the norms and of the steps made of them: whole rows in registers, one read and one write.

Memory. Rows lie at any offsets, their elements beside each other; parameters and statistics are contiguous. h is read
back as it was rounded. What a step lacks is None, and neither read nor written.

Rows of more than 4096 elements spill to local memory in the backward, of more than 8192 in the forward.

Gradients of weights: every program sums its rows, the programs' sums are added up in order. Their number depends on the
shape and the GPU, so results repeat bit for bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._rows import load, store, tile_of
from ._tiles import Number, exactly, kernel


class Norm(NamedTuple):
    """Not to be compared with None: of a tuple with None in it Triton 3.6 cannot tell."""

    weight: Any
    bias: Any  # None of RMSNorm, like the mean
    mean: Any  # of each row, like 1 / standard deviation
    rstd: Any
    peak: Any = None  # largest |element| of the tensor


class Dropout(NamedTuple):
    seed: Any  # one or several, in memory, so that new ones compile nothing and a CUDA graph can have them
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
def weight_of(norm, j, cols, offset, ACC: tl.constexpr):
    """Zeros behind `cols`."""
    weight = parameter(norm.weight, j, cols, ACC)
    return weight if offset is None else tl.where(j < cols, weight + exactly(offset, ACC), 0.0)


@triton.jit
def normalise(
    x,
    tile,
    norm,
    cols,
    eps,
    offset,
    like,
    ROUND: tl.constexpr,
    RELAX: tl.constexpr,
    RMS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The norm of rows x, zeros behind `cols`; keeps their statistics. ROUND: before the weight, to dtype of `like`."""
    weight = weight_of(norm, tile.j, cols, offset, ACC)
    if RMS:
        rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / cols + exactly(eps, ACC))
        tl.store(norm.rstd + tile.i, rstd, mask=tile.row)
        y = x * rstd[:, None]
        if ROUND:
            y = y.to(like.dtype.element_ty).to(ACC)
        return y * weight
    else:
        bias = parameter(norm.bias, tile.j, cols, ACC)
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
        tl.store(norm.mean + tile.i, mean / power, mask=tile.row)
        tl.store(norm.rstd + tile.i, rstd * power, mask=tile.row)
        return x * rstd[:, None] * weight + bias


@triton.jit
def scaled(x, scale, ACC: tl.constexpr):
    return x if scale is None else x * exactly(scale, ACC)


@triton.jit
def scaled_rows(x, tile, row_scale):
    return x if row_scale is None else x * tl.load(row_scale + tile.i, mask=tile.row, other=0.0)[:, None]


@triton.jit
def dropout(tile, drop, threshold, rows_per_seed, cols, QUADS: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr):
    """Factors of a tile's rows: element e of what a seed drops, in raster order, uses word e % 4 of Philox's counter
    e // 4. rows_per_seed None: one drops all rows."""
    i = tile.i
    if rows_per_seed is None:
        seed = tl.load(drop.seed)
    else:
        seed = tl.load(drop.seed + i // rows_per_seed, mask=tile.row, other=0)[:, None]
        i = i % rows_per_seed
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
    rows_per_seed,
    QUADS: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    tile = tile_of(tl.program_id(0), rows, cols, M, N)
    v = load(x, tile, tile.there, ACC)
    if drop is not None:
        v *= dropout(tile, drop, threshold, rows_per_seed, cols, QUADS, ACC, N)
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
    row_scale,
    rows,
    cols,
    eps,
    scale,
    offset,
    drop,
    threshold,
    rows_per_seed,
    ROUND: tl.constexpr,
    RELAX: tl.constexpr,
    RMS: tl.constexpr,
    POST: tl.constexpr,
    AFTER: tl.constexpr,
    QUADS: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """With a branch h = residual + scale * branch, POST: its norm; with an x that is the norm of h, with peaks those
    are the rows' largest |h|. AFTER: what is dropped is the norm's output."""
    tile = tile_of(tl.program_id(0), rows, cols, M, N)
    if branch is not None:
        y = load(branch, tile, tile.there, ACC)
        r = load(residual, tile, tile.there, ACC)
        if drop is not None:
            factor = dropout(tile, drop, threshold, rows_per_seed, cols, QUADS, ACC, N)
            if not AFTER:
                y *= factor
        if POST:
            y = normalise(y, tile, post, cols, eps, offset, branch.at, ROUND, RELAX, RMS, ACC)
        if AFTER:
            y *= factor
        total = (r + scaled_rows(scaled(y, scale, ACC), tile, row_scale)).to(h.at.dtype.element_ty)
        store(h, tile, total)
        v = tl.where(tile.there, total.to(ACC), 0.0)
    else:
        v = load(h, tile, tile.there, ACC)
    if x is not None:
        store(x, tile, normalise(v, tile, pre, cols, eps, offset, h.at, ROUND, RELAX, RMS, ACC))
    if peaks is not None:
        tl.store(peaks + tile.i, row_peak(v, ACC), mask=tile.row)


@triton.jit
def normalised(x, tile, norm, RMS: tl.constexpr):
    rstd = tl.load(norm.rstd + tile.i, mask=tile.row, other=0.0)[:, None]
    if RMS:
        return x * rstd
    else:  # halves: the difference of two huge numbers does not overflow
        mean = tl.load(norm.mean + tile.i, mask=tile.row, other=0.0)
        return (x * 0.5 - (mean / 2)[:, None]) * (rstd * 2)


@triton.jit
def norm_gradient(y, g, tile, norm, cols, RMS: tl.constexpr):
    """Of the norm's input, from the normalised input y and the gradient g of y."""
    rstd = tl.load(norm.rstd + tile.i, mask=tile.row, other=0.0)
    mean_gy = tl.sum(g * y, 1) / cols
    if RMS:
        return (g - y * mean_gy[:, None]) * rstd[:, None]
    else:
        mean_g = tl.sum(g, 1) / cols
        return (g - mean_g[:, None] - y * mean_gy[:, None]) * rstd[:, None]


@kernel
def backward_kernel(
    part,
    h,
    branch,
    dh,
    dx,
    dbranch,
    dresidual,
    post,
    pre,
    row_scale,
    drow_scale,
    rows,
    cols,
    scale,
    offset,
    drop,
    threshold,
    rows_per_seed,
    RMS: tl.constexpr,
    POST: tl.constexpr,
    PRE: tl.constexpr,
    AFTER: tl.constexpr,
    QUADS: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """part[p]: sums of program p over its rows, a row of N each, of the gradients of weight and bias (without RMS) of
    pre-norm, then post-norm, as they are there."""
    j = tl.arange(0, N)[None, :]
    pre_w = tl.zeros([1, N], ACC)
    pre_b = tl.zeros([1, N], ACC)
    post_w = tl.zeros([1, N], ACC)
    post_b = tl.zeros([1, N], ACC)
    if PRE and dx is not None:
        w_pre = weight_of(pre, j, cols, offset, ACC)
    for t in range(tl.program_id(0), tl.cdiv(rows, M), tl.num_programs(0)):
        tile = tile_of(t, rows, cols, M, N)
        d = tl.zeros([M, N], ACC)
        if PRE and dx is not None:
            dy = load(dx, tile, tile.there, ACC)
            y = normalised(load(h, tile, tile.there, ACC), tile, pre, RMS)
            d = norm_gradient(y, dy * w_pre, tile, pre, cols, RMS)
            pre_w += tl.sum(dy * y, 0)[None, :]
            if not RMS:
                pre_b += tl.sum(dy, 0)[None, :]
        if dh is not None:
            d += load(dh, tile, tile.there, ACC)
        if dresidual is not None:
            store(dresidual, tile, d)
        if dbranch is not None:
            d = scaled(tl.where(tile.there, d, 0.0), scale, ACC)
            if drop is not None:
                factor = dropout(tile, drop, threshold, rows_per_seed, cols, QUADS, ACC, N)
            if AFTER:
                d *= factor
            e = scaled_rows(d, tile, row_scale)
            if branch is not None:
                v = load(branch, tile, tile.there, ACC)
                if drop is not None and not AFTER:
                    v *= factor
            if POST:
                w_post = weight_of(post, j, cols, offset, ACC)  # for each tile: kept, registers spill beside a wide h
                y = normalised(v, tile, post, RMS)
                post_w += tl.sum(e * y, 0)[None, :]
                if not RMS:
                    post_b += tl.sum(e, 0)[None, :]
                e = norm_gradient(y, e * w_post, tile, post, cols, RMS)
                if drow_scale is not None:
                    v = y * w_post
                    if not RMS:
                        v += parameter(post.bias, j, cols, ACC)
            if drow_scale is not None:
                tl.store(drow_scale + tile.i, tl.sum(d * v, 1), mask=tile.row)
            if drop is not None and not AFTER:
                e *= factor
            store(dbranch, tile, e)
    at = part + tl.program_id(0).to(tl.int64) * ((PRE + POST) * (1 if RMS else 2)) * N + j
    if PRE:
        tl.store(at, pre_w)
        at += N
        if not RMS:
            tl.store(at, pre_b)
            at += N
    if POST:
        tl.store(at, post_w)
        if not RMS:
            tl.store(at + N, post_b)
