"""Which keys a patch of queries sees, and which queries a patch of keys: shared by the kernels of 2D local attention.

A query at (y, x) sees the cells of a key grid that lie in a window: rows [y // ratio_h - kernel_h // 2, + kernel_h),
columns likewise; a key at (y, x) is seen from rows [(y - kernel_h // 2) * ratio_h, + kernel_h * ratio_h). The ratio is
1 for the image itself, image over grid for the coarse one. The windows of a patch fill a box, which is clipped at the
edges of the grid and walked in raster order, as many cells at a time as a tile has columns: halos are exact, wherever
the patch lies, and neither is anything permuted nor padded.
"""

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(2**30)  # the row of a cell that there is not: in no window


@triton.jit
def keys_of(k, v, k_b, k_h, k_s, v_b, v_h, v_s, b, h):
    """Keys and values of one head, with the strides of their rows."""
    return k + b * k_b + h * k_h, v + b * v_b + h * v_h, k_s, v_s


@triton.jit
def patch(tile, height, width, ROWS: tl.constexpr, CELLS: tl.constexpr):
    """Patch number `tile` of a grid, ROWS x CELLS // ROWS: its corners (first and last row, first and last column),
    the rows and columns of its cells, and which of them there are."""
    COLUMNS: tl.constexpr = CELLS // ROWS
    across = tl.cdiv(width, COLUMNS)
    top, left = tile // across * ROWS, tile % across * COLUMNS
    y = top + tl.arange(0, CELLS) // COLUMNS
    x = left + tl.arange(0, CELLS) % COLUMNS
    corners = (top, tl.minimum(top + ROWS, height) - 1, left, tl.minimum(left + COLUMNS, width) - 1)
    return corners, y, x, (y < height) & (x < width)


@triton.jit
def key_windows(y, x, reach):
    """First row and column of the keys that queries at (y, x) see."""
    ratio_h, ratio_w, kernel_h, kernel_w = reach
    return y // ratio_h - kernel_h // 2, x // ratio_w - kernel_w // 2


@triton.jit
def query_windows(y, x, reach):
    """First row and column of the queries that see keys at (y, x)."""
    ratio_h, ratio_w, kernel_h, kernel_w = reach
    return (y - kernel_h // 2) * ratio_h, (x - kernel_w // 2) * ratio_w


@triton.jit
def box_around(low_y, high_y, low_x, high_x, size, grid):
    """First row and column, number of rows and columns of windows from those at `low` to those at `high`."""
    top, left = tl.maximum(low_y, 0), tl.maximum(low_x, 0)
    bottom, right = tl.minimum(high_y + size[0], grid[0]), tl.minimum(high_x + size[1], grid[1])
    return top, left, tl.maximum(bottom - top, 0), tl.maximum(right - left, 0)


@triton.jit
def key_box(corners, reach, grid, CAUSAL: tl.constexpr):
    """Box of the keys that queries between two corners see."""
    low_y, low_x = key_windows(corners[0], corners[2], reach)
    high_y, high_x = key_windows(corners[1], corners[3], reach)
    top, left, rows, columns = box_around(low_y, high_y, low_x, high_x, (reach[2], reach[3]), grid)
    if CAUSAL:
        rows = tl.minimum(rows, corners[1] + 1 - top)
    return top, left, rows, columns


@triton.jit
def query_box(corners, reach, grid, CAUSAL: tl.constexpr):
    """Box of the queries that see keys between two corners."""
    low_y, low_x = query_windows(corners[0], corners[2], reach)
    high_y, high_x = query_windows(corners[1], corners[3], reach)
    if CAUSAL:
        low_y = corners[0]
    size = (reach[0] * reach[2], reach[1] * reach[3])
    return box_around(low_y, high_y, low_x, high_x, size, grid)


@triton.jit
def box_cells(t, box, width, N: tl.constexpr, SMALL: tl.constexpr):
    """Cells [t * N, t * N + N) of a box: rows and columns in the grid, raster indices there, and which there are."""
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
    return tl.where(there, y, FAR), x, y * width + x, there


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
def grid_tile(t, box, width, low_y, low_x, size, i, last, N: tl.constexpr, SMALL: tl.constexpr, CAUSAL: tl.constexpr):
    """Raster indices of the N keys of a tile, which of them to read, and the mask [queries, N].

    Causal: query row r stands at raster index i[r], the last one at `last`; a cache may hold anything behind it.
    """
    y, x, j, read = box_cells(t, box, width, N, SMALL)
    seen = inside(low_y, low_x, y, x, size[0], size[1])
    if CAUSAL:
        read &= j <= last
        seen &= j[None, :] <= i[:, None]
    return j, read, seen
