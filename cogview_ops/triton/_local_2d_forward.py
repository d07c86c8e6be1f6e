"""Forward and decode kernels of 2D local attention.

Memory. Tensors come with any strides but a last one of 1, 16 bytes at a time where addresses and strides allow. Forward
reads q once, the rows of k and v that a patch's box holds once a patch (halos come from cache), and writes out and lse
once. Of a table each score that is computed reads an entry, from the L1 cache. Decode reads the same for a few
queries; a program leaves its share of the keys in `part` and `part_lse`, which `combine_kernel` merges in their order.
"""

import triton
import triton.language as tl

from ._local_2d_pattern import (
    Corners,
    Queries,
    Reach,
    Sets,
    Window,
    added,
    coarse_tile,
    coarse_windows,
    entry_of,
    key_box,
    key_windows,
    local_tile,
    patch,
    prefix_tile,
    raster,
    reach_of,
    sub_image,
    table_of,
    whole,
)
from ._tiles import (
    LN2,
    LOWEST,
    exactly,
    gather_rows,
    head_of,
    heavy_first,
    kernel,
    keys_of,
    log_sum,
    scatter_rows,
    softmax_step,
    store_rows,
)


@triton.jit
def forward_tile(acc, top, total, x, keys, tile, scale, bias, table, ACC: tl.constexpr, SHAPE: tl.constexpr):
    """`table`: what is added to each score in base 2, or None."""
    y = gather_rows(keys.k.at, keys.k.s, tile.j, tile.read, SHAPE.D, SHAPE.BLOCK_D)
    s = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=ACC)
    if table is not None:
        s, scale = s * scale + table, 1.0
    s = tl.where(tile.seen, s, float("-inf"))
    z = gather_rows(keys.v.at, keys.v.s, tile.j, tile.read, SHAPE.D, SHAPE.BLOCK_D)
    return softmax_step(acc, top, total, s, z, scale, bias, ACC)


@triton.jit
def attend(x, queries, b, kv, begin, end, sets, scale, FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr):
    """Outputs and log2-sum-exps of queries x over tiles [begin, end) of what they see: prefix, coarse grid, image."""
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    window = sets.window
    scale = exactly(scale, ACC)
    acc = tl.zeros([M, BLOCK_D], ACC)
    top = tl.full([M], LOWEST, ACC)
    total = tl.zeros([M], ACC)
    if sets.prefix is not None:
        keys = keys_of(sets.prefix.keys, b, kv)
        bias = exactly(sets.prefix.bias, ACC)
        tiles = tl.cdiv(sets.prefix_len, N)
        for t in tl.range(begin, tl.minimum(end, tiles)):
            tile = prefix_tile(t, sets.mask, b, sets.prefix_len, N)
            acc, top, total = forward_tile(acc, top, total, x, keys, tile, scale, bias, None, ACC, SHAPE)
        begin, end = tl.maximum(begin - tiles, 0), end - tiles
    if sets.coarse is not None:
        keys = keys_of(sets.coarse.keys, b, kv)
        bias = exactly(sets.coarse.bias, ACC)
        image, reach = whole(sets.coarse_window), reach_of(sets.coarse_window, window.height, window.width)
        low_y, low_x, box = coarse_windows(queries, image, reach)
        tiles = tl.cdiv(box.rows * box.columns, N)
        for t in tl.range(begin, tl.minimum(end, tiles)):
            tile = coarse_tile(t, box, image, low_y, low_x, reach, N, FORM.SMALL)
            acc, top, total = forward_tile(acc, top, total, x, keys, tile, scale, bias, None, ACC, SHAPE)
        begin, end = tl.maximum(begin - tiles, 0), end - tiles
    if sets.local is not None:
        keys = keys_of(sets.local, b, kv)
        reach = Reach(1, 1, window.kernel_h, window.kernel_w)
        box = key_box(queries.corners, reach, queries.image, FORM.CAUSAL, FORM.SHIFT)
        low_y, low_x = key_windows(queries.y, queries.x, reach, queries.image, FORM.SHIFT)
        own = entry_of(box.top - queries.y, box.left - queries.x, window) + sets.own
        key_mask = sets.key_mask
        if key_mask is not None:
            key_mask += b * window.height * window.width
        for t in tl.range(begin, tl.minimum(end, tl.cdiv(box.rows * box.columns, N))):
            tile = local_tile(t, box, low_y, low_x, reach, queries, key_mask, FORM, N)
            table = sets.table
            if table is not None:
                table = added(table, own, t, box, window, N, FORM.SMALL)
            acc, top, total = forward_tile(acc, top, total, x, keys, tile, scale, 0.0, table, ACC, SHAPE)
    return acc / tl.where(total > 0, total, 1.0)[:, None], log_sum(top, total)


@kernel
def forward_kernel(
    q, local, table, key_mask, prefix, mask, coarse, out, lse,
    heads, group, tiles, total_heads, section, height, width, kernel_h, kernel_w, dilation_h, dilation_w, bits,
    prefix_len, coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w, scale,
    NEGATE: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    if not FORM.DILATED:  # a constant is folded away
        dilation_h, dilation_w = 1, 1
    window = Window(height, width, kernel_h, kernel_w, dilation_h, dilation_w)
    tile, head = heavy_first(tiles, total_heads, section)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    image, corners, y, col, there = patch(tile, window, bits, SHAPE.M)
    i = raster(image, y, col)
    q, out = head_of(q, b, h), head_of(out, b, h)
    x = gather_rows(q.at, q.s, i, there, SHAPE.D, SHAPE.BLOCK_D)
    if NEGATE:  # the sign of `scale`, so that a larger score is a larger logit
        x = -x
    queries = Queries(image, corners, y, col, i, raster(image, corners.bottom, corners.right))
    coarse_window = Window(coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w)
    if table is not None:
        table = table_of(table, h, window)
    sets = Sets(local, table, 0, key_mask, prefix, mask, coarse, window, prefix_len, coarse_window)
    acc, value = attend(x, queries, b, h // group, 0, 0x7FFFFFFF, sets, scale, FORM, ACC, SHAPE)
    scatter_rows(out.at, out.s, i, there, acc, SHAPE.D, SHAPE.BLOCK_D)
    tl.store(lse + head.to(tl.int64) * height * width + i, value * LN2, mask=there)


@kernel
def decode_kernel(
    q, local, table, key_mask, prefix, mask, coarse, lengths, query_index, part, part_lse,
    kv_heads, group, pitch, steps, row_tiles, share_size, height, width, kernel_h, kernel_w, dilation_h, dilation_w,
    prefix_len, coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w, scale,
    NEGATE: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Row r of a kv head is query head r % pitch at step r // pitch; a program takes `share_size` tiles of its keys.

    Dilated, or where queries may stand anywhere (`query_index`), the rows of a program are of one step, so that their
    keys are of one sub-image and near it. How many shares there are depends on shapes alone; the last ones may find
    nothing to do.
    """
    M: tl.constexpr = SHAPE.M
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    if not FORM.DILATED:
        dilation_h, dilation_w = 1, 1
    window = Window(height, width, kernel_h, kernel_w, dilation_h, dilation_w)
    share = tl.program_id(1)
    row_tile = tl.program_id(0) % row_tiles
    head = tl.program_id(0) // row_tiles
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    r = row_tile * M + tl.arange(0, M)
    step = tl.minimum(r // pitch, steps - 1)
    # clamped: contents are not trusted
    length = tl.minimum(tl.load(lengths + b), height * width)
    if query_index is None:
        i = tl.maximum(length - steps, 0).to(tl.int32) + step
    else:
        i = tl.load(query_index + b * steps + step)
        i = tl.maximum(tl.minimum(i, height * width - 1), 0).to(tl.int32)
    first, last = tl.min(i, 0), tl.max(i, 0)
    one_row = first // width == last // width
    left, right = tl.where(one_row, first % width, 0), tl.where(one_row, last % width, width - 1)
    image = sub_image(first // width % dilation_h, first % width % dilation_w, window)
    corners = Corners(
        first // width // dilation_h, last // width // dilation_h, left // dilation_w, right // dilation_w
    )
    at = (kv * group + r % pitch) * q.h + step.to(tl.int64) * q.s
    cols = tl.arange(0, BLOCK_D)
    there = ((r < steps * pitch) & (r % pitch < group))[:, None] & (cols[None, :] < SHAPE.D)
    x = tl.load(q.at + b * q.b + at[:, None] + cols[None, :], mask=there, other=0.0)
    if NEGATE:
        x = -x
    if FORM.PARTIAL:
        there = length.to(tl.int32) - 1
        last = tl.minimum(last, there) if FORM.CAUSAL else there
    queries = Queries(image, corners, i // width // dilation_h, i % width // dilation_w, i, last)
    coarse_window = Window(coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w)
    tables = (kv * group + tl.minimum(r % pitch, group - 1)) * ((2 * kernel_h - 1) * (2 * kernel_w - 1))
    sets = Sets(local, table, tables, key_mask, prefix, mask, coarse, window, prefix_len, coarse_window)
    begin, end = share * share_size, (share + 1) * share_size
    acc, value = attend(x, queries, b, kv, begin, end, sets, scale, FORM, ACC, SHAPE)
    row = (share * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * M
    store_rows(part + row * BLOCK_D, BLOCK_D, acc, M, M, BLOCK_D, BLOCK_D)
    tl.store(part_lse + row + tl.arange(0, M), value)
