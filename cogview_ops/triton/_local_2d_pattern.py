"""Which keys a patch of queries sees, and which queries a patch of keys: shared by the kernels of 2D local attention.

A query at (y, x) sees the cells of a key grid that lie in a window: rows [y // ratio_h - kernel_h // 2, + kernel_h),
columns likewise; a key at (y, x) is seen from rows [(y - kernel_h // 2) * ratio_h, + kernel_h * ratio_h). The ratio is
1 for the image itself, image over grid for the coarse one. Windows that are shifted start no further out than at the
edge, and a key is still seen from a rectangle. The windows of a patch fill a box, which is clipped at the edges of the
grid and walked in raster order, as many cells at a time as a tile has columns: halos are exact, wherever the patch
lies, and neither is anything permuted nor padded.

Dilation splits the image into sub-images, of the cells that are dilation rows and columns apart, and each of them is
attended to as if it were the image. A patch lies in one of them; without dilation there is one, and its arithmetic
(times 1, modulo 1) is folded away.
"""

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(2**30)  # the row of a cell that there is not: in no window


@triton.jit
def keys_of(k, v, k_b, k_h, k_s, v_b, v_h, v_s, b, h):
    """Keys and values of one head, with the strides of their rows."""
    return k + b * k_b + h * k_h, v + b * v_b + h * v_h, k_s, v_s


@triton.jit
def whole(height, width):
    """An image of its own: rows and columns, first cell, how far its cells are apart, and columns of the image in which
    they are counted."""
    return height, width, 0, 0, 1, 1, width


@triton.jit
def sub_image(top, left, height, width, dilation_h, dilation_w):
    """The cells of an image at steps of `dilation` from (top, left), which lies before the first step."""
    rows = (height - top + dilation_h - 1) // dilation_h
    columns = (width - left + dilation_w - 1) // dilation_w
    return rows, columns, top, left, dilation_h, dilation_w, width


@triton.jit
def raster(image, y, x):
    """Raster indices of cells of a sub-image in the image that it is part of."""
    return (image[2] + y * image[4]) * image[6] + image[3] + x * image[5]


@triton.jit
def patch(tile, height, width, dilation_h, dilation_w, bits, CELLS: tl.constexpr):
    """Patch number `tile` of an image, CELLS cells of a sub-image in rows of 2**bits: that one, in it the corners of
    the patch (first and last row, first and last column), rows and columns of its cells, and which of them there are.
    """
    rows, columns = CELLS >> bits, 1 << bits
    number = tile % (dilation_h * dilation_w)
    image = sub_image(number // dilation_w, number % dilation_w, height, width, dilation_h, dilation_w)
    tile = tile // (dilation_h * dilation_w)
    across = tl.cdiv(image[1], columns)
    top, left = tile // across * rows, tile % across * columns
    y = top + (tl.arange(0, CELLS) >> bits)
    x = left + (tl.arange(0, CELLS) & (columns - 1))
    corners = (top, tl.minimum(top + rows, image[0]) - 1, left, tl.minimum(left + columns, image[1]) - 1)
    return image, corners, y, x, (y < image[0]) & (x < image[1])


@triton.jit
def key_windows(y, x, reach, grid, SHIFT: tl.constexpr):
    """First row and column of the keys that queries at (y, x) see."""
    ratio_h, ratio_w, kernel_h, kernel_w = reach
    low_y, low_x = y // ratio_h - kernel_h // 2, x // ratio_w - kernel_w // 2
    if SHIFT:
        low_y = tl.maximum(tl.minimum(low_y, grid[0] - kernel_h), 0)
        low_x = tl.maximum(tl.minimum(low_x, grid[1] - kernel_w), 0)
    return low_y, low_x


@triton.jit
def query_windows(y, x, reach, grid, SHIFT: tl.constexpr):
    """First row and column, number of rows and columns of the queries that see keys at (y, x)."""
    ratio_h, ratio_w, kernel_h, kernel_w = reach
    low_y, low_x = (y - kernel_h // 2) * ratio_h, (x - kernel_w // 2) * ratio_w
    size_h, size_w = ratio_h * kernel_h, ratio_w * kernel_w
    if SHIFT:
        low_y, size_h = shifted_queries(y, kernel_h, grid[0])
        low_x, size_w = shifted_queries(x, kernel_w, grid[1])
    return low_y, low_x, size_h, size_w


@triton.jit
def shifted_queries(y, kernel, length):
    """Of one axis: the keys of the window at an edge are seen from the edge on."""
    low = tl.where(y < kernel, 0, y - kernel // 2)
    return low, tl.where(y >= length - kernel, length, y + kernel // 2 + 1) - low


@triton.jit
def box_around(low_y, high_y, low_x, high_x, size, grid):
    """First row and column, number of rows and columns of windows from those at `low` to those at `high`."""
    top, left = tl.maximum(low_y, 0), tl.maximum(low_x, 0)
    bottom, right = tl.minimum(high_y + size[0], grid[0]), tl.minimum(high_x + size[1], grid[1])
    return top, left, tl.maximum(bottom - top, 0), tl.maximum(right - left, 0)


@triton.jit
def key_box(corners, reach, grid, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """Box of the keys that queries between two corners see."""
    low_y, low_x = key_windows(corners[0], corners[2], reach, grid, SHIFT)
    high_y, high_x = key_windows(corners[1], corners[3], reach, grid, SHIFT)
    top, left, rows, columns = box_around(low_y, high_y, low_x, high_x, (reach[2], reach[3]), grid)
    if CAUSAL:
        rows = tl.minimum(rows, corners[1] + 1 - top)
    return top, left, rows, columns


@triton.jit
def query_box(corners, reach, grid, CAUSAL: tl.constexpr, SHIFT: tl.constexpr):
    """Box of the queries that see keys between two corners."""
    low_y, low_x, _, _ = query_windows(corners[0], corners[2], reach, grid, SHIFT)
    high_y, high_x, size_h, size_w = query_windows(corners[1], corners[3], reach, grid, SHIFT)
    if CAUSAL:
        low_y = corners[0]
    return box_around(low_y, high_y, low_x, high_x, (size_h, size_w), grid)


@triton.jit
def coarse_windows(y, x, corners, image, coarse, reach):
    """`key_windows` and `key_box` in the coarse image of cells (y, x) of a sub-image, between two corners."""
    y, x = image[2] + y * image[4], image[3] + x * image[5]
    top, bottom = image[2] + corners[0] * image[4], image[2] + corners[1] * image[4]
    left, right = image[3] + corners[2] * image[5], image[3] + corners[3] * image[5]
    low_y, low_x = key_windows(y, x, reach, coarse, False)
    return low_y, low_x, key_box((top, bottom, left, right), reach, coarse, False, False)


@triton.jit
def box_cells(t, box, image, N: tl.constexpr, SMALL: tl.constexpr):
    """Cells [t * N, t * N + N) of a box: rows and columns there, raster indices, and which there are."""
    top, left, rows, columns = box
    c = t * N + tl.arange(0, N)
    if SMALL:  # c // columns, exact where cells * columns < 2**31
        inverse = (0x7FFFFFFF // columns).to(tl.uint32) + 1
        y = tl.umulhi((2 * c).to(tl.uint32), inverse).to(tl.int32)
    else:
        y = c // columns
    x = left + c - y * columns
    y += top
    there = c < rows * columns
    return tl.where(there, y, FAR), x, raster(image, y, x), there


@triton.jit
def inside(low_y, low_x, y, x, size_h, size_w):
    """Whether cells (columns of the result) lie in windows (rows): one unsigned comparison for both ends of an axis."""
    near_y = (y[None, :] - low_y[:, None]).to(tl.uint32) < tl.cast(size_h, tl.uint32)
    near_x = (x[None, :] - low_x[:, None]).to(tl.uint32) < tl.cast(size_w, tl.uint32)
    return near_y & near_x


@triton.jit
def prefix_tile(t, mask, length, N: tl.constexpr, MASKED: tl.constexpr):
    """Prefix keys [t * N, t * N + N), and which of them every query sees."""
    j = t * N + tl.arange(0, N)
    seen = j < length
    if MASKED:
        seen = tl.load(mask + j, mask=seen, other=0) != 0
    return j, seen


@triton.jit
def grid_tile(t, box, image, low_y, low_x, size, i, last, N: tl.constexpr, SMALL: tl.constexpr, CAUSAL: tl.constexpr):
    """Raster indices of the N keys of a tile, which of them to read, and the mask [queries, N].

    Causal: query row r stands at raster index i[r], the last one at `last`; a cache may hold anything behind it.
    """
    y, x, j, read = box_cells(t, box, image, N, SMALL)
    seen = inside(low_y, low_x, y, x, size[0], size[1])
    if CAUSAL:
        read &= j <= last
        seen &= j[None, :] <= i[:, None]
    return j, read, seen
