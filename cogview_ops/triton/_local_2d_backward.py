"""Backward kernels of 2D local attention: one owns queries, the other owns keys, so that nothing is added twice."""

import triton
import triton.language as tl

from ._local_2d_pattern import (
    box_cells,
    coarse_windows,
    grid_tile,
    inside,
    key_box,
    key_windows,
    keys_of,
    patch,
    prefix_tile,
    query_box,
    query_windows,
    raster,
    sub_image,
    whole,
)
from ._tiles import LOG2E, exactly, gather_rows, heavy_first, kernel, load_rows, scatter_rows, store_rows


@triton.jit
def grad_query_tile(
    acc, x, dx, row_lse, row_delta, keys, j, read, seen, scale, bias,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k, v, k_s, v_s = keys
    y = gather_rows(k, k_s, j, read, D, BLOCK_D)
    z = gather_rows(v, v_s, j, read, D, BLOCK_D)
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    p = tl.where(seen, tl.exp2(s * scale - (row_lse - bias)[:, None]), 0.0)
    dp = tl.dot(dx, tl.trans(z), input_precision="ieee", out_dtype=ACC)
    ds = p * (dp - row_delta[:, None])
    return tl.dot(ds.to(y.dtype), y, acc, input_precision="ieee", out_dtype=ACC)


@kernel
def grad_query_kernel(
    q, k, v, prefix_k, prefix_v, coarse_k, coarse_v, prefix_mask, out, lse, dout, dlse, delta, dq,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, prefix_k_b, prefix_k_h, prefix_k_s, prefix_v_b, prefix_v_h, prefix_v_s,
    coarse_k_b, coarse_k_h, coarse_k_s, coarse_v_b, coarse_v_h, coarse_v_s,
    out_b, out_h, out_s, dout_b, dout_h, dout_s, dq_b, dq_h, dq_s,
    heads, group, tiles, total_heads, section, height, width, kernel_h, kernel_w, dilation_h, dilation_w, bits,
    prefix_len, coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w,
    scale, scale_low, prefix_bias, prefix_bias_low, coarse_bias, coarse_bias_low, step, step_low,
    HAS_DLSE: tl.constexpr, DILATED: tl.constexpr, CAUSAL: tl.constexpr, SHIFT: tl.constexpr, PREFIX: tl.constexpr,
    MASKED: tl.constexpr, COARSE: tl.constexpr, SMALL: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dout * out) - dlse for the kernels that own keys."""
    if not DILATED:
        dilation_h, dilation_w = 1, 1
    tile, head = heavy_first(tiles, total_heads, section)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv = h // group
    scale = exactly(scale, scale_low, ACC)
    reach = (1, 1, kernel_h, kernel_w)
    image, corners, y, col, there = patch(tile, height, width, dilation_h, dilation_w, bits, M)
    i = raster(image, y, col)
    last = raster(image, corners[1], corners[3])
    x = gather_rows(q + b * q_b + h * q_h, q_s, i, there, D, BLOCK_D)
    dx = gather_rows(dout + b * dout_b + h * dout_h, dout_s, i, there, D, BLOCK_D)
    o = gather_rows(out + b * out_b + h * out_h, out_s, i, there, D, BLOCK_D)
    stat = head.to(tl.int64) * height * width + i
    row_delta = tl.sum(o.to(ACC) * dx.to(ACC), 1)
    if HAS_DLSE:
        row_delta -= tl.load(dlse + stat, mask=there, other=0.0)
    tl.store(delta + stat, row_delta, mask=there)
    row_lse = tl.load(lse + stat, mask=there, other=float("inf")) * LOG2E

    acc = tl.zeros([M, BLOCK_D], ACC)
    if PREFIX:
        keys = keys_of(
            prefix_k, prefix_v, prefix_k_b, prefix_k_h, prefix_k_s, prefix_v_b, prefix_v_h, prefix_v_s, b, kv
        )
        bias = exactly(prefix_bias, prefix_bias_low, ACC)
        for t in tl.range(0, tl.cdiv(prefix_len, N)):
            j, read = prefix_tile(t, prefix_mask + b * prefix_len, prefix_len, N, MASKED)
            acc = grad_query_tile(
                acc, x, dx, row_lse, row_delta, keys, j, read, read[None, :], scale, bias, ACC, D, BLOCK_D
            )
    if COARSE:
        keys = keys_of(
            coarse_k, coarse_v, coarse_k_b, coarse_k_h, coarse_k_s, coarse_v_b, coarse_v_h, coarse_v_s, b, kv
        )
        bias = exactly(coarse_bias, coarse_bias_low, ACC)
        coarse_reach = (height // coarse_height, width // coarse_width, coarse_kernel_h, coarse_kernel_w)
        coarse_image = whole(coarse_height, coarse_width)
        low_y, low_x, box = coarse_windows(y, col, corners, image, coarse_image, coarse_reach)
        size = (coarse_kernel_h, coarse_kernel_w)
        for t in tl.range(0, tl.cdiv(box[2] * box[3], N)):
            j, read, seen = grid_tile(t, box, coarse_image, low_y, low_x, size, i, last, N, SMALL, False)
            acc = grad_query_tile(acc, x, dx, row_lse, row_delta, keys, j, read, seen, scale, bias, ACC, D, BLOCK_D)
    keys = keys_of(k, v, k_b, k_h, k_s, v_b, v_h, v_s, b, kv)
    box = key_box(corners, reach, image, CAUSAL, SHIFT)
    low_y, low_x = key_windows(y, col, reach, image, SHIFT)
    size = (kernel_h, kernel_w)
    for t in tl.range(0, tl.cdiv(box[2] * box[3], N)):
        j, read, seen = grid_tile(t, box, image, low_y, low_x, size, i, last, N, SMALL, CAUSAL)
        acc = grad_query_tile(acc, x, dx, row_lse, row_delta, keys, j, read, seen, scale, 0.0, ACC, D, BLOCK_D)
    acc *= exactly(step, step_low, ACC)
    scatter_rows(dq + b * dq_b + h * dq_h, dq_s, i, there, acc, D, BLOCK_D)


@kernel
def grad_key_kernel(
    q, k, v, mask, dout, lse, delta, part_k, part_v, dk, dv,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, dout_b, dout_h, dout_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    kv_heads, group, tiles, total_kv_heads, section, height, width, key_height, key_width, kernel_h, kernel_w,
    dilation_h, dilation_w, bits, splits, scale, scale_low, step, step_low, bias, bias_low,
    DENSE: tl.constexpr, MASKED: tl.constexpr, DILATED: tl.constexpr, CAUSAL: tl.constexpr, SHIFT: tl.constexpr,
    SPLIT: tl.constexpr, SMALL: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a patch of N keys, from all queries of the group's heads that see them.

    DENSE: the keys are a prefix, a grid of one row that all queries see. SPLIT: each program takes one of `splits`
    equal runs of these queries and leaves its sums in part_k and part_v, [splits, B, Hkv, keys, BLOCK_D].
    """
    if not DILATED:
        dilation_h, dilation_w = 1, 1
    tile, head = heavy_first(tiles, total_kv_heads, section)
    share = tl.program_id(1)
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    scale = exactly(scale, scale_low, ACC)
    bias = exactly(bias, bias_low, ACC)
    keys, corners, key_y, key_x, there = patch(tile, key_height, key_width, dilation_h, dilation_w, bits, N)
    image = sub_image(keys[2], keys[3], height, width, dilation_h, dilation_w)
    n = raster(keys, key_y, key_x)
    read = there
    if MASKED:
        read &= tl.load(mask + b * key_width + n, mask=there, other=0) != 0
    y = gather_rows(k + b * k_b + kv * k_h, k_s, n, read, D, BLOCK_D)
    z = gather_rows(v + b * v_b + kv * v_h, v_s, n, read, D, BLOCK_D)
    reach = (height // key_height, width // key_width, kernel_h, kernel_w)
    low_y, low_x, size_h, size_w = query_windows(key_y, key_x, reach, image, SHIFT)
    if SHIFT:
        size_h, size_w = size_h[:, None], size_w[:, None]
    if DENSE:
        cells = height * width
    else:
        box = query_box(corners, reach, image, CAUSAL, SHIFT)
        cells = box[2] * box[3]
    turns = tl.cdiv(cells, M)
    run = tl.cdiv(turns * group, splits)
    q += b * q_b + kv * group * q_h
    dout += b * dout_b + kv * group * dout_h
    stat = (b * kv_heads + kv) * group * height * width

    sum_k = tl.zeros([N, BLOCK_D], ACC)
    sum_v = tl.zeros([N, BLOCK_D], ACC)
    for t in tl.range(share * run, tl.minimum((share + 1) * run, turns * group)):
        g = (t // turns).to(tl.int64)
        if DENSE:
            i = t % turns * M + tl.arange(0, M)
            valid = i < cells
        else:
            query_y, query_x, i, valid = box_cells(t % turns, box, image, M, SMALL)
        x = gather_rows(q + g * q_h, q_s, i, valid, D, BLOCK_D)
        dx = gather_rows(dout + g * dout_h, dout_s, i, valid, D, BLOCK_D)
        at = stat + g * height * width + i
        row_lse = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + at, mask=valid, other=0.0)
        s = tl.dot(y, tl.trans(x), input_precision="ieee", out_dtype=ACC)
        p = tl.exp2(s * scale - (row_lse - bias)[None, :])
        if not DENSE:
            seen = inside(low_y, low_x, query_y, query_x, size_h, size_w)
            if CAUSAL:
                seen &= i[None, :] >= n[:, None]
            p = tl.where(seen, p, 0.0)
        sum_v = tl.dot(p.to(dx.dtype), dx, sum_v, input_precision="ieee", out_dtype=ACC)
        dp = tl.dot(z, tl.trans(dx), input_precision="ieee", out_dtype=ACC)
        ds = p * (dp - row_delta[None, :])
        sum_k = tl.dot(ds.to(x.dtype), x, sum_k, input_precision="ieee", out_dtype=ACC)

    if MASKED:  # a row that no query sees has sums of anything
        sum_k = tl.where(read[:, None], sum_k, 0.0)
        sum_v = tl.where(read[:, None], sum_v, 0.0)
    if SPLIT:
        part = (share * total_kv_heads + head).to(tl.int64) * key_height * key_width * BLOCK_D
        scatter_rows(part_k + part, BLOCK_D, n, there, sum_k, BLOCK_D, BLOCK_D)
        scatter_rows(part_v + part, BLOCK_D, n, there, sum_v, BLOCK_D, BLOCK_D)
    else:
        scatter_rows(dk + b * dk_b + kv * dk_h, dk_s, n, there, sum_k * exactly(step, step_low, ACC), D, BLOCK_D)
        scatter_rows(dv + b * dv_b + kv * dv_h, dv_s, n, there, sum_v, D, BLOCK_D)


@kernel
def sum_kernel(
    part_k, part_v, dk, dv, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, kv_heads, keys, splits, step, step_low,
    ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys from the parts, in their order."""
    tiles = tl.cdiv(keys, ROWS)
    n, head = tl.program_id(0) % tiles * ROWS, tl.program_id(0) // tiles
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    sum_k = tl.zeros([ROWS, BLOCK_D], ACC)
    sum_v = tl.zeros([ROWS, BLOCK_D], ACC)
    for s in tl.range(0, splits):
        part = ((s * (tl.num_programs(0) // tiles) + head).to(tl.int64) * keys + n) * BLOCK_D
        sum_k += load_rows(part_k + part, BLOCK_D, keys - n, ROWS, BLOCK_D, BLOCK_D, False, True)
        sum_v += load_rows(part_v + part, BLOCK_D, keys - n, ROWS, BLOCK_D, BLOCK_D, False, True)
    sum_k *= exactly(step, step_low, ACC)
    at = n.to(tl.int64)
    store_rows(dk + b * dk_b + kv * dk_h + at * dk_s, dk_s, sum_k, keys - n, ROWS, D, BLOCK_D)
    store_rows(dv + b * dv_b + kv * dv_h + at * dv_s, dv_s, sum_v, keys - n, ROWS, D, BLOCK_D)
