"""The gradient of 2D local attention's table of biases, deterministic and without atomics.

`grad_query_kernel` leaves the gradient of each score that a query's window has in a slot of its own, heads after
heads; for some of them at a time, which stay in the L2 cache. Here each entry's slots are added up, in registers, over
a share of a head's patches of queries; what heads, samples and shares have of a table is added up by torch, in order.

Memory. Slots [heads at a time, patches, M, window] of float32, 32 MB or what one head has: written once, read once, 8
bytes for a pair of query and key. Sums [samples, heads, shares, table].
"""

import triton.language as tl

from ._local_2d_pattern import (
    FAR,
    WIDE_FAR,
    Reach,
    Window,
    code,
    entry_of,
    inside,
    key_windows,
    patch,
    raster,
    slot_size,
    table_of,
)
from ._tiles import kernel


@kernel
def sum_table_kernel(
    slots, key_mask, sums,
    heads, first_head, tiles, height, width, kernel_h, kernel_w, dilation_h, dilation_w, bits,
    above, before, rows, columns, splits,
    ENTRIES: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries of a head, of rows x columns that begin `above` rows and `before` columns before a query."""
    M: tl.constexpr = SHAPE.M
    if not FORM.DILATED:
        dilation_h, dilation_w = 1, 1
    window = Window(height, width, kernel_h, kernel_w, dilation_h, dilation_w)
    blocks = tl.cdiv(rows * columns, ENTRIES)
    number, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    share = tl.program_id(1)
    entry = number * ENTRIES + tl.arange(0, ENTRIES)
    dy, dx = entry // columns - above, entry % columns - before
    offset = code(dy, dx, FORM.SMALL)
    if FORM.CAUSAL:
        offset += tl.where((dy < 0) | (dx <= 0), 0, FAR if FORM.SMALL else WIDE_FAR)
    slot_h, slot_w = slot_size(window)
    size, step = slot_h * slot_w, (dy * slot_w + dx)[None, :]
    slots += head.to(tl.int64) * tiles * (M * size)
    if key_mask is not None:
        key_mask += ((first_head + head) // heads).to(tl.int64) * height * width
    m = tl.arange(0, M)
    run = tl.cdiv(tiles, splits)
    acc = tl.zeros([M, ENTRIES], ACC)
    for tile in tl.range(share * run, tl.minimum((share + 1) * run, tiles)):
        image, _, y, x, there = patch(tile, window, bits, M)
        low_y, low_x = key_windows(y, x, Reach(1, 1, kernel_h, kernel_w), image, FORM.SHIFT)
        high_y, high_x = tl.minimum(low_y + kernel_h, image.rows), tl.minimum(low_x + kernel_w, image.columns)
        low_y, low_x = tl.maximum(low_y, 0), tl.maximum(low_x, 0)
        first = code(low_y - y, low_x - x, FORM.SMALL)
        last = code(tl.where(there, high_y, low_y) - 1 - y, high_x - 1 - x, FORM.SMALL)
        seen = inside(first, last, offset, FORM.SMALL)
        if key_mask is not None:
            j = raster(image, y, x)[:, None] + (dy * dilation_h * width + dx * dilation_w)[None, :]
            seen &= tl.load(key_mask + j, mask=seen, other=1) == 0
        own = ((y - low_y) * slot_w + x - low_x + m * size)[:, None]
        acc += tl.load(slots + tl.cast(tile, tl.int64) * (M * size) + (own + step), mask=seen, other=0.0)
    sums = table_of(sums, ((first_head + head) * splits + share).to(tl.int64), window)
    tl.store(sums + entry_of(dy, dx, window), tl.sum(acc, 0), mask=entry < rows * columns)
