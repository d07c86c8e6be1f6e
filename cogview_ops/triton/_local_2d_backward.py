"""Backward kernels of 2D local attention: one owns queries, the other owns keys, so that nothing is added twice.

Memory. Tensors come with any strides but a last one of 1; lse, dlse and delta are contiguous. grad_query reads q, out,
dout, lse, dlse once and the keys of its box once a patch; writes delta and dq once. grad_key reads its keys once, and
q, dout, lse, delta of all queries that see them, head after head; writes dk and dv once, or its share of their sums to
`parts`, which `sum_kernel` adds up in their order.
"""

import triton
import triton.language as tl

from ._local_2d_pattern import (
    Queries,
    Reach,
    Window,
    added,
    box_cells,
    coarse_tile,
    coarse_windows,
    code,
    ends,
    entry_of,
    inside,
    key_box,
    key_windows,
    local_tile,
    patch,
    prefix_tile,
    query_box,
    query_windows,
    raster,
    reach_of,
    slot_size,
    steps,
    sub_image,
    table_of,
    whole,
)
from ._tiles import (
    LOG2E,
    exactly,
    first_tile,
    gather_rows,
    head_of,
    heavy_first,
    kernel,
    key_gradient_step,
    keys_of,
    load_rows,
    next_tile,
    query_gradient_step,
    scatter_rows,
    score_gradients,
    store_rows,
)


@triton.jit
def grad_query_tile(acc, x, dx, row_lse, row_delta, keys, tile, scale, bias, ACC: tl.constexpr, SHAPE: tl.constexpr):
    y = gather_rows(keys.k.at, keys.k.s, tile.j, tile.read, SHAPE.D, SHAPE.BLOCK_D)
    z = gather_rows(keys.v.at, keys.v.s, tile.j, tile.read, SHAPE.D, SHAPE.BLOCK_D)
    return query_gradient_step(acc, x, dx, y, z, row_lse, row_delta, tile.seen, scale, bias, ACC)


@kernel
def grad_query_kernel(
    q, local, table, key_mask, prefix, mask, coarse, out, lse, dout, dlse, delta, dq, slots, first_head,
    heads, group, tiles, total_heads, section, height, width, kernel_h, kernel_w, dilation_h, dilation_w, bits,
    prefix_len, coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w, scale, step,
    FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """dq, and delta = rowsum(dout * out) - dlse for the kernels that own keys; with a table the scores' gradients, from
    `first_head` on, see `sum_table_kernel`."""
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    if not FORM.DILATED:
        dilation_h, dilation_w = 1, 1
    window = Window(height, width, kernel_h, kernel_w, dilation_h, dilation_w)
    tile, head = heavy_first(tiles, total_heads, section)
    if table is not None:
        place = (head * tiles + tile).to(tl.int64)
        head += first_head
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv = h // group
    scale = exactly(scale, ACC)
    image, corners, y, col, there = patch(tile, window, bits, M)
    i = raster(image, y, col)
    queries = Queries(image, corners, y, col, i, raster(image, corners.bottom, corners.right))
    q, out, dout, dq = head_of(q, b, h), head_of(out, b, h), head_of(dout, b, h), head_of(dq, b, h)
    x = gather_rows(q.at, q.s, i, there, D, BLOCK_D)
    dx = gather_rows(dout.at, dout.s, i, there, D, BLOCK_D)
    o = gather_rows(out.at, out.s, i, there, D, BLOCK_D)
    stat = head.to(tl.int64) * height * width + i
    row_delta = tl.sum(o.to(ACC) * dx.to(ACC), 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + stat, mask=there, other=0.0)
    if key_mask is not None or local is None:  # the log-sum-exp of no keys has no gradient, whatever came for it
        row_delta = tl.where(tl.load(lse + stat, mask=there, other=0.0) > float("-inf"), row_delta, 0.0)
    tl.store(delta + stat, row_delta, mask=there)
    row_lse = tl.load(lse + stat, mask=there, other=float("inf")) * LOG2E

    acc = tl.zeros([M, BLOCK_D], ACC)
    if prefix is not None:
        keys = keys_of(prefix.keys, b, kv)
        bias = exactly(prefix.bias, ACC)
        for t in tl.range(0, tl.cdiv(prefix_len, N)):
            seen = prefix_tile(t, mask, b, prefix_len, N)
            acc = grad_query_tile(acc, x, dx, row_lse, row_delta, keys, seen, scale, bias, ACC, SHAPE)
    if coarse is not None:
        keys = keys_of(coarse.keys, b, kv)
        bias = exactly(coarse.bias, ACC)
        coarse_window = Window(coarse_height, coarse_width, coarse_kernel_h, coarse_kernel_w)
        coarse_image, reach = whole(coarse_window), reach_of(coarse_window, height, width)
        low_y, low_x, box = coarse_windows(queries, coarse_image, reach)
        for t in tl.range(0, tl.cdiv(box.rows * box.columns, N)):
            seen = coarse_tile(t, box, coarse_image, low_y, low_x, reach, N, FORM.SMALL)
            acc = grad_query_tile(acc, x, dx, row_lse, row_delta, keys, seen, scale, bias, ACC, SHAPE)
    if local is not None:
        keys = keys_of(local, b, kv)
        reach = Reach(1, 1, kernel_h, kernel_w)
        box = key_box(corners, reach, image, FORM.CAUSAL, FORM.SHIFT)
        low_y, low_x = key_windows(y, col, reach, image, FORM.SHIFT)
        if table is not None:
            own, table = entry_of(box.top - y, box.left - col, window), table_of(table, h, window)
            slot_h, slot_w = slot_size(window)
            row = (place * M + tl.arange(0, M)) * (slot_h * slot_w)
            first_y, first_x = tl.maximum(low_y, 0), tl.maximum(low_x, 0)
            slots += row + (box.top - first_y) * slot_w + box.left - first_x
        if key_mask is not None:
            key_mask += b * height * width
        for t in tl.range(0, tl.cdiv(box.rows * box.columns, N)):
            seen = local_tile(t, box, low_y, low_x, reach, queries, key_mask, FORM, N)
            if table is None:
                acc = grad_query_tile(acc, x, dx, row_lse, row_delta, keys, seen, scale, 0.0, ACC, SHAPE)
            else:
                k = gather_rows(keys.k.at, keys.k.s, seen.j, seen.read, D, BLOCK_D)
                v = gather_rows(keys.v.at, keys.v.s, seen.j, seen.read, D, BLOCK_D)
                entry = added(table, own, t, box, window, N, FORM.SMALL)
                ds = score_gradients(x, dx, k, v, row_lse, row_delta, seen.seen, scale, entry, ACC)
                tl.store(slots[:, None] + steps(t, box, slot_w, N, FORM.SMALL)[None, :], ds, mask=seen.seen)
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee", out_dtype=ACC)
    acc *= exactly(step, ACC)
    scatter_rows(dq.at, dq.s, i, there, acc, D, BLOCK_D)


@kernel
def grad_key_kernel(
    q, keys, table, mask, bias, dout, lse, delta, parts, grads,
    kv_heads, group, tiles, total_kv_heads, section, height, width, key_height, key_width, kernel_h, kernel_w,
    dilation_h, dilation_w, bits, splits, scale, step,
    DENSE: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a patch of N keys, from all queries of the group's heads that see them.

    DENSE: the keys are a prefix, a grid of one row that all queries see. With `parts` each program takes one of
    `splits` equal runs of these queries and leaves its sums there, [splits, B, Hkv, keys, BLOCK_D].
    """
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    if not FORM.DILATED:
        dilation_h, dilation_w = 1, 1
    tile, head = heavy_first(tiles, total_kv_heads, section)
    share = tl.program_id(1)
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    scale = exactly(scale, ACC)
    bias = exactly(bias, ACC)
    window = Window(key_height, key_width, kernel_h, kernel_w, dilation_h, dilation_w)
    home, corners, key_y, key_x, there = patch(tile, window, bits, N)
    image = sub_image(home.top, home.left, Window(height, width, kernel_h, kernel_w, dilation_h, dilation_w))
    n = raster(home, key_y, key_x)
    read = there
    if mask is not None:
        mask += b * (key_width if DENSE else key_height * key_width)
        read &= (tl.load(mask + n, mask=there, other=0) != 0) == DENSE
    keys = keys_of(keys, b, kv)
    y = gather_rows(keys.k.at, keys.k.s, n, read, D, BLOCK_D)
    z = gather_rows(keys.v.at, keys.v.s, n, read, D, BLOCK_D)
    reach = reach_of(window, height, width)
    low_y, low_x, size_h, size_w = query_windows(key_y, key_x, reach, image, FORM.SHIFT)
    if DENSE:
        cells = height * width
    else:
        box = query_box(corners, reach, image, FORM.CAUSAL, FORM.SHIFT)
        cells = box.rows * box.columns
        low, high = ends(low_y, low_x, size_h, size_w, box, image, FORM.SMALL)
        if FORM.CAUSAL:  # from the key itself on
            own = code(key_y - box.top, key_x - box.left, FORM.SMALL)
        own_entry = entry_of(key_y - box.top, key_x - box.left, window)
    turns = tl.cdiv(cells, M)
    run = tl.cdiv(turns * group, splits)
    q_at = q.at + (b * q.b + kv * group * q.h)
    dout_at = dout.at + (b * dout.b + kv * group * dout.h)
    stat = (b * kv_heads + kv) * group * height * width

    sum_k = tl.zeros([N, BLOCK_D], ACC)
    sum_v = tl.zeros([N, BLOCK_D], ACC)
    turn, g = first_tile(share * run, turns)
    for _ in tl.range(share * run, tl.minimum((share + 1) * run, turns * group)):
        if DENSE:
            i = turn * M + tl.arange(0, M)
            valid = i < cells
        else:
            cell, i, valid = box_cells(turn, box, image, M, FORM.SMALL)
        x = gather_rows(q_at + g * q.h, q.s, i, valid, D, BLOCK_D)
        dx = gather_rows(dout_at + g * dout.h, dout.s, i, valid, D, BLOCK_D)
        at = stat + g * height * width + i
        row_lse = tl.load(lse + at, mask=valid, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + at, mask=valid, other=0.0)
        seen = None
        if not DENSE:
            seen = inside(low, high, cell, FORM.SMALL)
            if FORM.CAUSAL:
                seen &= cell[None, :] >= own[:, None]
        entry = bias
        if table is not None:
            entry = added(table_of(table, kv * group + g, window), own_entry, turn, box, window, M, FORM.SMALL, True)
        sum_k, sum_v = key_gradient_step(sum_k, sum_v, x, dx, y, z, row_lse, row_delta, seen, scale, entry, ACC)
        turn, g = next_tile(turn, g, turns)

    if mask is not None:  # a row that no query sees has sums of anything
        sum_k = tl.where(read[:, None], sum_k, 0.0)
        sum_v = tl.where(read[:, None], sum_v, 0.0)
    if parts is not None:
        part = (share * total_kv_heads + head).to(tl.int64) * key_height * key_width * BLOCK_D
        scatter_rows(parts.k + part, BLOCK_D, n, there, sum_k, BLOCK_D, BLOCK_D)
        scatter_rows(parts.v + part, BLOCK_D, n, there, sum_v, BLOCK_D, BLOCK_D)
    else:
        grads = keys_of(grads, b, kv)
        scatter_rows(grads.k.at, grads.k.s, n, there, sum_k * exactly(step, ACC), D, BLOCK_D)
        scatter_rows(grads.v.at, grads.v.s, n, there, sum_v, D, BLOCK_D)


@kernel
def sum_kernel(parts, grads, kv_heads, count, splits, step, ROWS: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr):
    """dk and dv of ROWS keys from the parts, in their order."""
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    tiles = tl.cdiv(count, ROWS)
    n, head = tl.program_id(0) % tiles * ROWS, tl.program_id(0) // tiles
    b, kv = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    sum_k = tl.zeros([ROWS, BLOCK_D], ACC)
    sum_v = tl.zeros([ROWS, BLOCK_D], ACC)
    for s in tl.range(0, splits):
        part = ((s * (tl.num_programs(0) // tiles) + head).to(tl.int64) * count + n) * BLOCK_D
        sum_k += load_rows(parts.k + part, BLOCK_D, count - n, ROWS, BLOCK_D, BLOCK_D, False, True)
        sum_v += load_rows(parts.v + part, BLOCK_D, count - n, ROWS, BLOCK_D, BLOCK_D, False, True)
    sum_k *= exactly(step, ACC)
    at, grads = n.to(tl.int64), keys_of(grads, b, kv)
    store_rows(grads.k.at + at * grads.k.s, grads.k.s, sum_k, count - n, ROWS, D, BLOCK_D)
    store_rows(grads.v.at + at * grads.v.s, grads.v.s, sum_v, count - n, ROWS, D, BLOCK_D)
