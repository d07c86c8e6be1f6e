"""Forward and decode kernels of 2D local attention."""

import math

import triton
import triton.language as tl

from ._local_2d_pattern import (
    coarse_windows,
    grid_tile,
    key_box,
    key_windows,
    keys_of,
    patch,
    prefix_tile,
    raster,
    sub_image,
    whole,
)
from ._tiles import LOWEST, exactly, gather_rows, heavy_first, kernel, log_sum, scatter_rows, softmax_step, store_rows

LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def forward_tile(
    acc, top, total, x, keys, j, read, seen, scale, bias, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    k, v, k_s, v_s = keys
    y = gather_rows(k, k_s, j, read, D, BLOCK_D)
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    s = tl.where(seen, s, float("-inf"))
    z = gather_rows(v, v_s, j, read, D, BLOCK_D)
    return softmax_step(acc, top, total, s, z, scale, bias, ACC)


@triton.jit
def attend(
    x, y, col, i, last, corners, begin, end, local, coarse, prefix, image, reach, coarse_image, coarse_reach,
    prefix_mask, prefix_len, scale, prefix_bias, coarse_bias,
    CAUSAL: tl.constexpr, SHIFT: tl.constexpr, PREFIX: tl.constexpr, MASKED: tl.constexpr, COARSE: tl.constexpr,
    SMALL: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs and log2-sum-exps of queries x at (y, col) of a sub-image, raster indices i up to `last`, between two
    corners, over tiles [begin, end) of what they see: prefix, coarse grid, image."""
    acc = tl.zeros([M, BLOCK_D], ACC)
    top = tl.full([M], LOWEST, ACC)
    total = tl.zeros([M], ACC)
    if PREFIX:
        tiles = tl.cdiv(prefix_len, N)
        for t in tl.range(begin, tl.minimum(end, tiles)):
            j, read = prefix_tile(t, prefix_mask, prefix_len, N, MASKED)
            acc, top, total = forward_tile(
                acc, top, total, x, prefix, j, read, read[None, :], scale, prefix_bias, ACC, D, BLOCK_D
            )
        begin, end = tl.maximum(begin - tiles, 0), end - tiles
    if COARSE:
        low_y, low_x, box = coarse_windows(y, col, corners, image, coarse_image, coarse_reach)
        size = (coarse_reach[2], coarse_reach[3])
        tiles = tl.cdiv(box[2] * box[3], N)
        for t in tl.range(begin, tl.minimum(end, tiles)):
            j, read, seen = grid_tile(t, box, coarse_image, low_y, low_x, size, i, last, N, SMALL, False)
            acc, top, total = forward_tile(
                acc, top, total, x, coarse, j, read, seen, scale, coarse_bias, ACC, D, BLOCK_D
            )
        begin, end = tl.maximum(begin - tiles, 0), end - tiles
    box = key_box(corners, reach, image, CAUSAL, SHIFT)
    low_y, low_x = key_windows(y, col, reach, image, SHIFT)
    size = (reach[2], reach[3])
    for t in tl.range(begin, tl.minimum(end, tl.cdiv(box[2] * box[3], N))):
        j, read, seen = grid_tile(t, box, image, low_y, low_x, size, i, last, N, SMALL, CAUSAL)
        acc, top, total = forward_tile(acc, top, total, x, local, j, read, seen, scale, 0.0, ACC, D, BLOCK_D)
    return acc / tl.where(total > 0, total, 1.0)[:, None], log_sum(top, total)


@kernel
def forward_kernel(
    q, k, v, prefix_k, prefix_v, coarse_k, coarse_v, prefix_mask, out, lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, prefix_k_b, prefix_k_h, prefix_k_s, prefix_v_b, prefix_v_h, prefix_v_s,
    coarse_k_b, coarse_k_h, coarse_k_s, coarse_v_b, coarse_v_h, coarse_v_s, out_b, out_h, out_s,
    heads, group, tiles, total_heads, section, height, width, kernel_h, kernel_w, dilation_h, dilation_w, bits,
    prefix_len, coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w,
    scale, scale_low, prefix_bias, prefix_bias_low, coarse_bias, coarse_bias_low,
    NEGATE: tl.constexpr, DILATED: tl.constexpr, CAUSAL: tl.constexpr, SHIFT: tl.constexpr, PREFIX: tl.constexpr,
    MASKED: tl.constexpr, COARSE: tl.constexpr, SMALL: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    if not DILATED:  # a constant is folded away
        dilation_h, dilation_w = 1, 1
    tile, head = heavy_first(tiles, total_heads, section)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv = h // group
    image, corners, y, col, there = patch(tile, height, width, dilation_h, dilation_w, bits, M)
    i = raster(image, y, col)
    x = gather_rows(q + b * q_b + h * q_h, q_s, i, there, D, BLOCK_D)
    if NEGATE:  # the sign of `scale`, so that a larger score is a larger logit
        x = -x
    acc, value = attend(
        x, y, col, i, raster(image, corners[1], corners[3]), corners, 0, 0x7FFFFFFF,
        keys_of(k, v, k_b, k_h, k_s, v_b, v_h, v_s, b, kv),
        keys_of(coarse_k, coarse_v, coarse_k_b, coarse_k_h, coarse_k_s, coarse_v_b, coarse_v_h, coarse_v_s, b, kv),
        keys_of(prefix_k, prefix_v, prefix_k_b, prefix_k_h, prefix_k_s, prefix_v_b, prefix_v_h, prefix_v_s, b, kv),
        image, (1, 1, kernel_h, kernel_w), whole(coarse_height, coarse_width),
        (height // coarse_height, width // coarse_width, coarse_kernel_h, coarse_kernel_w),
        prefix_mask + b * prefix_len, prefix_len, exactly(scale, scale_low, ACC),
        exactly(prefix_bias, prefix_bias_low, ACC), exactly(coarse_bias, coarse_bias_low, ACC),
        CAUSAL, SHIFT, PREFIX, MASKED, COARSE, SMALL, ACC, D, BLOCK_D, M, N,
    )  # fmt: skip
    scatter_rows(out + b * out_b + h * out_h, out_s, i, there, acc, D, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * height * width + i, value * LN2, mask=there)


@kernel
def decode_kernel(
    q, k, v, prefix_k, prefix_v, coarse_k, coarse_v, prefix_mask, lengths, part, part_lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, prefix_k_b, prefix_k_h, prefix_k_s, prefix_v_b, prefix_v_h, prefix_v_s,
    coarse_k_b, coarse_k_h, coarse_k_s, coarse_v_b, coarse_v_h, coarse_v_s,
    kv_heads, group, pitch, steps, row_tiles, share_size, height, width, kernel_h, kernel_w, dilation_h, dilation_w,
    prefix_len, coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w,
    scale, scale_low, prefix_bias, prefix_bias_low, coarse_bias, coarse_bias_low,
    NEGATE: tl.constexpr, DILATED: tl.constexpr, PREFIX: tl.constexpr, MASKED: tl.constexpr, COARSE: tl.constexpr,
    SMALL: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Row r of a kv head is query head r % pitch at step r // pitch; a program takes `share_size` tiles of its keys.

    Dilated, the rows of a program are of one step, so that their keys are of one sub-image. How many shares there are
    depends on shapes alone; the last ones may find nothing to do.
    """
    if not DILATED:
        dilation_h, dilation_w = 1, 1
    share = tl.program_id(1)
    row_tile = tl.program_id(0) % row_tiles
    head = tl.program_id(0) // row_tiles
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    r = row_tile * M + tl.arange(0, M)
    step = tl.minimum(r // pitch, steps - 1)
    # clamped: contents are not trusted
    offset = tl.maximum(tl.minimum(tl.load(lengths + b), height * width) - steps, 0).to(tl.int32)
    i = offset + step
    first, last = tl.min(i, 0), tl.max(i, 0)
    one_row = first // width == last // width
    left, right = tl.where(one_row, first % width, 0), tl.where(one_row, last % width, width - 1)
    image = sub_image(first // width % dilation_h, first % width % dilation_w, height, width, dilation_h, dilation_w)
    corners = (first // width // dilation_h, last // width // dilation_h, left // dilation_w, right // dilation_w)
    at = (kv * group + r % pitch) * q_h + step.to(tl.int64) * q_s
    cols = tl.arange(0, BLOCK_D)
    mask = ((r < steps * pitch) & (r % pitch < group))[:, None] & (cols[None, :] < D)
    x = tl.load(q + b * q_b + at[:, None] + cols[None, :], mask=mask, other=0.0)
    if NEGATE:
        x = -x
    acc, value = attend(
        x, i // width // dilation_h, i % width // dilation_w, i, last, corners,
        share * share_size, (share + 1) * share_size,
        keys_of(k, v, k_b, k_h, k_s, v_b, v_h, v_s, b, kv),
        keys_of(coarse_k, coarse_v, coarse_k_b, coarse_k_h, coarse_k_s, coarse_v_b, coarse_v_h, coarse_v_s, b, kv),
        keys_of(prefix_k, prefix_v, prefix_k_b, prefix_k_h, prefix_k_s, prefix_v_b, prefix_v_h, prefix_v_s, b, kv),
        image, (1, 1, kernel_h, kernel_w), whole(coarse_height, coarse_width),
        (height // coarse_height, width // coarse_width, coarse_kernel_h, coarse_kernel_w),
        prefix_mask + b * prefix_len, prefix_len, exactly(scale, scale_low, ACC),
        exactly(prefix_bias, prefix_bias_low, ACC), exactly(coarse_bias, coarse_bias_low, ACC),
        True, False, PREFIX, MASKED, COARSE, SMALL, ACC, D, BLOCK_D, M, N,
    )  # fmt: skip
    row = (share * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * M
    store_rows(part + row * BLOCK_D, BLOCK_D, acc, M, M, BLOCK_D, BLOCK_D)
    tl.store(part_lse + row + tl.arange(0, M), value)
