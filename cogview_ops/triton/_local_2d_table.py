"""The gradient of 2D local attention's table of biases, deterministic and without atomics.

All pairs of a query m of a patch and a key n of a tile that lies in the same way beside the patch have the same entry,
whatever patch, sub-image and sample. So a program owns a tile of the box around a patch, of one head, and adds the
scores' gradients up over a share of all patches and samples, in registers, [M, N]. `sum_table_kernel` then adds up what
has the same entry, and the shares, in their order.

Memory. Of each patch and tile q, dout and the keys are read again, and two of the backward's seven products computed
again. Parts are [shares, heads, tiles, M, N] of float32: per head and share the box of a patch, its window's halo
included, for each of its M queries. 9 x 9 windows: 4 tiles of 64 keys for 64 queries, 64 KB; 16 heads in 4 shares 4 MB.
"""

import triton.language as tl

from ._local_2d_pattern import (
    Box,
    Queries,
    Reach,
    Window,
    added,
    entry_of,
    key_box,
    key_windows,
    local_tile,
    patch,
    raster,
    table_of,
)
from ._tiles import LOG2E, exactly, gather_rows, head_of, kernel, keys_of


@kernel
def grad_table_kernel(
    q, local, table, key_mask, lse, dout, delta, parts,
    batch, heads, group, count, height, width, kernel_h, kernel_w, dilation_h, dilation_w, bits,
    above, before, rows, columns, tiles, splits, scale,
    FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """A share of `count` patches. Their boxes begin `above` rows and `before` columns from them."""
    D: tl.constexpr = SHAPE.D
    BLOCK_D: tl.constexpr = SHAPE.BLOCK_D
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    if not FORM.DILATED:
        dilation_h, dilation_w = 1, 1
    window = Window(height, width, kernel_h, kernel_w, dilation_h, dilation_w)
    reach = Reach(1, 1, kernel_h, kernel_w)
    share = tl.program_id(1)
    t, h = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    scale = exactly(scale, ACC)
    table = table_of(table, h, window)
    run = tl.cdiv(count, splits)
    acc = tl.zeros([M, N], ACC)
    for number in tl.range(share * run, tl.minimum((share + 1) * run, count)):
        image, corners, y, x, there = patch(number, window, bits, M)
        i = raster(image, y, x)
        queries = Queries(image, corners, y, x, i, raster(image, corners.bottom, corners.right))
        box = Box(corners.top - above, corners.left - before, rows, columns)
        low_y, low_x = key_windows(y, x, reach, image, FORM.SHIFT)
        tile = local_tile(t, box, low_y, low_x, reach, queries, None, FORM, N)
        entry = added(table, entry_of(box.top - y, box.left - x, window), t, box, window, N, FORM.SMALL)
        entry = tl.where(tile.seen, entry, float("-inf"))
        # samples, unless no query sees any of the rows that the tile is in
        seen = key_box(corners, reach, image, FORM.CAUSAL, FORM.SHIFT)
        first, last = box.top + t * N // columns, box.top + (t * N + N - 1) // columns
        some = (last >= seen.top) & (first < seen.top + seen.rows)
        for b in tl.range(0, tl.where(some, batch, 0)):
            b = tl.cast(b, tl.int64)
            of_q, of_dout, keys = head_of(q, b, h), head_of(dout, b, h), keys_of(local, b, h // group)
            read = tile.read
            if key_mask is not None:
                read &= tl.load(key_mask + b * height * width + tile.j, mask=read, other=0) == 0
            q_rows = gather_rows(of_q.at, of_q.s, i, there, D, BLOCK_D)
            k_rows = gather_rows(keys.k.at, keys.k.s, tile.j, read, D, BLOCK_D)
            dout_rows = gather_rows(of_dout.at, of_dout.s, i, there, D, BLOCK_D)
            v_rows = gather_rows(keys.v.at, keys.v.s, tile.j, read, D, BLOCK_D)
            stat = (b * heads + h) * height * width + i
            row_lse = tl.load(lse + stat, mask=there, other=float("inf")) * LOG2E
            row_delta = tl.load(delta + stat, mask=there, other=0.0)
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee", out_dtype=ACC)
            dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision="ieee", out_dtype=ACC)
            ds = tl.exp2(s * scale - (row_lse[:, None] - entry)) * (dp - row_delta[:, None])
            acc += tl.where((entry > float("-inf")) & read[None, :], ds, 0.0)
    m = tl.arange(0, M)
    at = ((share * heads + h) * tiles + t) * M + m
    tl.store(parts + at[:, None] * N + tl.arange(0, N)[None, :], acc)


@kernel
def sum_table_kernel(
    parts, grad, heads, kernel_h, kernel_w, bits, above, before, rows, columns, tiles, splits,
    ENTRIES: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries of a head: of every query of a patch the key that lies so, over the shares."""
    M: tl.constexpr = SHAPE.M
    N: tl.constexpr = SHAPE.N
    pitch = 2 * kernel_w - 1
    size = (2 * kernel_h - 1) * pitch
    blocks = tl.cdiv(size, ENTRIES)
    h, entry = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ENTRIES + tl.arange(0, ENTRIES)
    m = tl.arange(0, M)[:, None]
    y = (m >> bits) + (entry // pitch - kernel_h + 1)[None, :] + above
    x = (m & ((1 << bits) - 1)) + (entry % pitch - kernel_w + 1)[None, :] + before
    there = (entry < size)[None, :] & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    cell = y * columns + x
    at = parts + (cell // N * M + m) * N + cell % N
    acc = tl.zeros([M, ENTRIES], ACC)
    for share in tl.range(0, splits):
        acc += tl.load(at + (share * heads + h).to(tl.int64) * tiles * M * N, mask=there, other=0.0)
    tl.store(grad + h.to(tl.int64) * size + entry, tl.sum(acc, 0), mask=entry < size)
