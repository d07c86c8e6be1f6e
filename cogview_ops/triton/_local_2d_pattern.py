"""Which keys a patch of queries sees, and which queries a patch of keys: shared by the kernels of 2D local attention.

A query at (y, x) sees the cells of a key grid that lie in a window: rows [y // ratio_h - kernel_h // 2, + kernel_h),
columns likewise; a key at (y, x) is seen from rows [(y - (kernel_h - 1) // 2) * ratio_h, + kernel_h * ratio_h). The
ratio is 1 for the image itself, image over grid for the coarse one. Windows that are shifted start no further out than
at the edge, and a key is still seen from a rectangle. The windows of a patch fill a box, which is clipped at the edges
of the grid and walked in raster order, as many cells at a time as a tile has columns: halos are exact, wherever the
patch lies, and neither is anything permuted nor padded.

Dilation splits the image into sub-images, of the cells that are dilation rows and columns apart, and each of them is
attended to as if it were the image. A patch lies in one of them; without dilation there is one, and its arithmetic
(times 1, modulo 1) is folded away.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._tiles import Keys, Number

SIGNS: tl.constexpr = tl.constexpr(0x80008000 - 2**32)  # of the two halves of a code
WIDE_SIGNS: tl.constexpr = tl.constexpr(0x8000000080000000 - 2**64)
FAR: tl.constexpr = tl.constexpr(-(2**30))  # added to a code: above all windows
WIDE_FAR: tl.constexpr = tl.constexpr(-(2**62))


class Biased(NamedTuple):
    """Keys whose scores have a bias: those of a prefix, or of a coarse image."""

    keys: Keys
    bias: Number


class Window(NamedTuple):
    height: Any
    width: Any
    kernel_h: Any
    kernel_w: Any
    dilation_h: Any = 1
    dilation_w: Any = 1


class Sets(NamedTuple):
    """What queries may see, what is there of it: an image, a prefix, a coarse image.

    Masks are not part of keys: Triton 3.6 cannot ask whether a tuple with None in it is None.
    """

    local: Any
    table: Any  # of the image: None, or a pointer to that of a head
    own: Any  # how far from there those of the queries' heads are
    key_mask: Any  # of the image: None, or of integers, FAR where hidden
    prefix: Any
    mask: Any  # of the prefix: None, or of integers
    coarse: Any
    window: Window
    prefix_len: Any
    coarse_window: Window


class Form(NamedTuple):
    """What kernels are compiled for."""

    CAUSAL: bool
    SHIFT: bool
    DILATED: bool
    SMALL: bool  # see `box_cells` and `code`
    PARTIAL: bool = False  # keys behind `Queries.last` are not there


class Image(NamedTuple):
    """Cells of an image at steps of `dilation` from (top, left); `width` of the image in which they are counted."""

    rows: Any
    columns: Any
    top: Any
    left: Any
    dilation_h: Any
    dilation_w: Any
    width: Any


class Reach(NamedTuple):
    ratio_h: Any
    ratio_w: Any
    kernel_h: Any
    kernel_w: Any


class Corners(NamedTuple):
    """First and last row, first and last column."""

    top: Any
    bottom: Any
    left: Any
    right: Any


class Box(NamedTuple):
    top: Any
    left: Any
    rows: Any
    columns: Any


class Queries(NamedTuple):
    """Cells (y, x) of a sub-image between corners, their raster indices, the last one of a key that they may see."""

    image: Image
    corners: Corners
    y: Any
    x: Any
    i: Any
    last: Any


class Tile(NamedTuple):
    """Raster indices of keys, which of them to read, and which a query sees, [queries, keys] or [1, keys]."""

    j: Any
    read: Any
    seen: Any


@triton.jit
def whole(window):
    """An image of its own."""
    return Image(window.height, window.width, 0, 0, 1, 1, window.width)


@triton.jit
def sub_image(top, left, window):
    """The cells of an image at steps of the dilation from (top, left), which lies before the first step."""
    rows = (window.height - top + window.dilation_h - 1) // window.dilation_h
    columns = (window.width - left + window.dilation_w - 1) // window.dilation_w
    return Image(rows, columns, top, left, window.dilation_h, window.dilation_w, window.width)


@triton.jit
def raster(image, y, x):
    """Raster indices of cells of a sub-image in the image that it is part of."""
    return (image.top + y * image.dilation_h) * image.width + image.left + x * image.dilation_w


@triton.jit
def reach_of(window, height, width):
    """From an image of `height` x `width` into one that it is a multiple of, in windows of its own."""
    return Reach(height // window.height, width // window.width, window.kernel_h, window.kernel_w)


@triton.jit
def patch(tile, window, bits, CELLS: tl.constexpr):
    """Patch number `tile` of an image, CELLS cells of a sub-image in rows of 2**bits: that one, in it the corners of
    the patch, rows and columns of its cells, and which of them there are."""
    rows, columns = CELLS >> bits, 1 << bits
    number = tile % (window.dilation_h * window.dilation_w)
    image = sub_image(number // window.dilation_w, number % window.dilation_w, window)
    tile = tile // (window.dilation_h * window.dilation_w)
    across = tl.cdiv(image.columns, columns)
    top, left = tile // across * rows, tile % across * columns
    y = top + (tl.arange(0, CELLS) >> bits)
    x = left + (tl.arange(0, CELLS) & (columns - 1))
    bottom, right = tl.minimum(top + rows, image.rows) - 1, tl.minimum(left + columns, image.columns) - 1
    return image, Corners(top, bottom, left, right), y, x, (y < image.rows) & (x < image.columns)


@triton.jit
def key_windows(y, x, reach, grid, SHIFT: tl.constexpr):
    """First row and column of the keys that queries at (y, x) see."""
    low_y, low_x = y // reach.ratio_h - reach.kernel_h // 2, x // reach.ratio_w - reach.kernel_w // 2
    if SHIFT:
        low_y = tl.maximum(tl.minimum(low_y, grid.rows - reach.kernel_h), 0)
        low_x = tl.maximum(tl.minimum(low_x, grid.columns - reach.kernel_w), 0)
    return low_y, low_x


@triton.jit
def query_windows(y, x, reach, grid, SHIFT: tl.constexpr):
    """First row and column, number of rows and columns of the queries that see keys at (y, x)."""
    low_y, low_x = (y - ((reach.kernel_h - 1) >> 1)) * reach.ratio_h, (x - ((reach.kernel_w - 1) >> 1)) * reach.ratio_w
    size_h, size_w = reach.ratio_h * reach.kernel_h, reach.ratio_w * reach.kernel_w
    if SHIFT:
        low_y, size_h = shifted_queries(y, reach.kernel_h, grid.rows)
        low_x, size_w = shifted_queries(x, reach.kernel_w, grid.columns)
    return low_y, low_x, size_h, size_w


@triton.jit
def shifted_queries(y, kernel, length):
    """Of one axis: the keys of the window at an edge are seen from the edge on."""
    low = tl.where(y < kernel, 0, y - ((kernel - 1) >> 1))
    return low, tl.where(y >= length - kernel, length, y + kernel // 2 + 1) - low


@triton.jit
def box_around(low_y, high_y, low_x, high_x, size_h, size_w, grid):
    """What windows from those at `low` to those at `high` cover."""
    top, left = tl.maximum(low_y, 0), tl.maximum(low_x, 0)
    bottom, right = tl.minimum(high_y + size_h, grid.rows), tl.minimum(high_x + size_w, grid.columns)
    return Box(top, left, tl.maximum(bottom - top, 0), tl.maximum(right - left, 0))


@triton.jit
def key_box(corners, reach, grid, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """The keys that queries between two corners see."""
    low_y, low_x = key_windows(corners.top, corners.left, reach, grid, SHIFT)
    high_y, high_x = key_windows(corners.bottom, corners.right, reach, grid, SHIFT)
    box = box_around(low_y, high_y, low_x, high_x, reach.kernel_h, reach.kernel_w, grid)
    if CAUSAL:
        box = Box(box.top, box.left, tl.minimum(box.rows, corners.bottom + 1 - box.top), box.columns)
    return box


@triton.jit
def query_box(corners, reach, grid, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """The queries that see keys between two corners."""
    low_y, low_x, _, _ = query_windows(corners.top, corners.left, reach, grid, SHIFT)
    high_y, high_x, size_h, size_w = query_windows(corners.bottom, corners.right, reach, grid, SHIFT)
    if CAUSAL:
        low_y = corners.top
    return box_around(low_y, high_y, low_x, high_x, size_h, size_w, grid)


@triton.jit
def coarse_windows(queries, coarse, reach):
    """`key_windows` and `key_box` in the coarse image."""
    image, corners = queries.image, queries.corners
    y, x = image.top + queries.y * image.dilation_h, image.left + queries.x * image.dilation_w
    top, bottom = image.top + corners.top * image.dilation_h, image.top + corners.bottom * image.dilation_h
    left, right = image.left + corners.left * image.dilation_w, image.left + corners.right * image.dilation_w
    low_y, low_x = key_windows(y, x, reach, coarse, False)
    return low_y, low_x, key_box(Corners(top, bottom, left, right), reach, coarse, False, False)


@triton.jit
def code(y, x, SMALL: tl.constexpr):
    """A cell of a box, or one near it, as one number of two halves, which have 16 bits if SMALL."""
    if SMALL:
        return (y << 16) + x
    else:
        return (tl.cast(y, tl.int64) << 32) + x


@triton.jit
def row_of(c, box, SMALL: tl.constexpr):
    """The row of a box that its cell number c is in."""
    if SMALL:  # c // columns, exact where cells * columns < 2**31
        inverse = (0x7FFFFFFF // box.columns).to(tl.uint32) + 1
        return tl.umulhi((2 * c).to(tl.uint32), inverse).to(tl.int32)
    else:
        return c // box.columns


@triton.jit
def box_cells(t, box, image, N: tl.constexpr, SMALL: tl.constexpr):
    """Cells [t * N, t * N + N) of a box: their codes, raster indices, and which there are."""
    c = t * N + tl.arange(0, N)
    y = row_of(c, box, SMALL)
    # not by way of x = c - y * columns: a multiplication less for each
    step_h, step_w = image.dilation_h * image.width, image.dilation_w
    j = raster(image, box.top, box.left) + c * step_w + y * (step_h - box.columns * step_w)
    return c + y * code(1, -box.columns, SMALL), j, c < box.rows * box.columns


@triton.jit
def ends(low_y, low_x, size_h, size_w, box, image, SMALL: tl.constexpr):
    """Codes of the first and the last cell of windows in an image."""
    high_y, high_x = tl.minimum(low_y + size_h, image.rows) - 1, tl.minimum(low_x + size_w, image.columns) - 1
    return code(low_y - box.top, low_x - box.left, SMALL), code(high_y - box.top, high_x - box.left, SMALL)


@triton.jit
def inside(low, high, cell, SMALL: tl.constexpr):
    """Whether cells (columns of the result) lie in windows (rows) from `low` to `high`. A difference has the signs of
    two; a negative lower half borrows from the upper one, which then no longer matters."""
    signs = (cell[None, :] - low[:, None]) | (high[:, None] - cell[None, :])
    return (signs & (SIGNS if SMALL else WIDE_SIGNS)) == 0


@triton.jit
def prefix_tile(t, mask, b, length, N: tl.constexpr):
    """Keys [t * N, t * N + N) of sample b's prefix; every query sees those that are read."""
    j = t * N + tl.arange(0, N)
    read = j < length
    if mask is not None:
        read = tl.load(mask + b * length + j, mask=read, other=0) != 0
    return Tile(j, read, read[None, :])


@triton.jit
def coarse_tile(t, box, image, low_y, low_x, reach, N: tl.constexpr, SMALL: tl.constexpr):
    """Keys [t * N, t * N + N) of a box."""
    cell, j, read = box_cells(t, box, image, N, SMALL)
    low, high = ends(low_y, low_x, reach.kernel_h, reach.kernel_w, box, image, SMALL)
    return Tile(j, read, inside(low, high, cell, SMALL))


@triton.jit
def local_tile(t, box, low_y, low_x, reach, queries, key_mask, FORM: tl.constexpr, N: tl.constexpr):
    """Likewise, of the image. Causal: a cache may hold anything behind the last query."""
    image = queries.image
    cell, j, read = box_cells(t, box, image, N, FORM.SMALL)
    if FORM.CAUSAL or FORM.PARTIAL:
        read &= j <= queries.last
    # what is not there is far from all windows
    if FORM.PARTIAL:
        cell += tl.where(read, 0, FAR if FORM.SMALL else WIDE_FAR)
    if key_mask is not None:
        far = tl.load(key_mask + j, mask=read, other=0)
        read &= far == 0
        cell += far if FORM.SMALL else far.to(tl.int64) << 32
    low, high = ends(low_y, low_x, reach.kernel_h, reach.kernel_w, box, image, FORM.SMALL)
    seen = inside(low, high, cell, FORM.SMALL)
    if FORM.CAUSAL:
        seen &= j[None, :] <= queries.i[:, None]
    return Tile(j, read, seen)


@triton.jit
def table_of(table, h, window):
    """Of a head: what is added to scores in base 2, by how far a key is from a query."""
    return table + h * ((2 * window.kernel_h - 1) * (2 * window.kernel_w - 1))


@triton.jit
def slot_size(window):
    """Rows and columns of a sub-image that a query sees, at most."""
    rows, columns = tl.cdiv(window.height, window.dilation_h), tl.cdiv(window.width, window.dilation_w)
    return tl.minimum(window.kernel_h, rows), tl.minimum(window.kernel_w, columns)


@triton.jit
def entry_of(y, x, window):
    """In a table: of a key that is so many rows and columns behind the query."""
    return (y + window.kernel_h - 1) * (2 * window.kernel_w - 1) + x + window.kernel_w - 1


@triton.jit
def steps(t, box, pitch, N: tl.constexpr, SMALL: tl.constexpr):
    """How far cells [t * N, t * N + N) of a box are behind its first one in rows of `pitch`; 0 of what is no cell."""
    c = t * N + tl.arange(0, N)
    step = c + row_of(c, box, SMALL) * (pitch - box.columns)
    return tl.where(c < box.rows * box.columns, step, 0)


@triton.jit
def added(table, own, t, box, window, N: tl.constexpr, SMALL: tl.constexpr, KEYS: tl.constexpr = False):
    """What is added to the scores of a tile; `own`: entries of queries and the first key of the box, or of KEYS and its
    first query.

    Of pairs that do not see each other any number: there is room around tables for the entries that they would have.
    """
    # pointers by row: one instruction for each address
    step = steps(t, box, 2 * window.kernel_w - 1, N, SMALL)[None, :]
    return tl.load((table + own)[:, None] - step if KEYS else (table + own)[:, None] + step)
