"""How many pairs of query and key each pattern of `patterns` sees, of one sequence and head: what attention costs.

Masks count as all True, and pivots as the first tokens: upper bounds, and exact where there is nothing of that kind.
"""

import math

from . import patterns

Pair = tuple[int, int]


def causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def prefix(tokens: int, first: int) -> int:
    """The first so many see each other; causal behind them."""
    return causal(tokens) + causal(max(0, first - 1))


def three_region(tokens: int, pivots: int, block_size: int, window_blocks: int) -> int:
    """Causal in the block, all of the window's blocks before it, and pivots before those."""
    pairs = 0
    for begin in range(0, tokens, block_size):
        rows, before = min(block_size, tokens - begin), max(0, begin - (window_blocks - 1) * block_size)
        pairs += rows * (begin - before + min(pivots, before)) + causal(rows)
    return pairs


def local_2d(grid: Pair, kernel_size: Pair, dilation: Pair = (1, 1), edge: str = "clip", *, raster_causal: bool) -> int:
    """Windows are products of one for rows and one for columns; of kernel_size (0, 0) there is none."""
    if not kernel_size[0]:
        return 0
    axes = list(zip(grid, kernel_size, dilation, strict=True))
    if not raster_causal:
        return math.prod(_seen(*axis, edge) for axis in axes)
    above, before = (_beside(n, k // 2, step) for n, k, step in axes)  # rows above, and tokens before in their own row
    return above * _seen(*axes[1]) + grid[0] * (grid[1] + before)


def coarse_2d(grid: Pair, coarse_grid: Pair, kernel_size: Pair) -> int:
    sizes = zip(grid, coarse_grid, kernel_size, strict=True)
    return math.prod(fine // cells * _seen(cells, k) for fine, cells, k in sizes)


def dalle(*, kind: str, text_len: int, grid: Pair, kernel_size: int = 11, wrap: bool = False) -> int:
    window, kernel = patterns.dalle_window(kind, grid, kernel_size, wrap)
    image = local_2d(window, kernel, raster_causal=True) + math.prod(grid) * text_len
    return causal(text_len) + image


def cogview2(
    *, text_len: int, grid: Pair, kernel_size: Pair, coarse_grid: Pair | None = None, coarse_kernel_size: Pair = (5, 5)
) -> int:
    image = local_2d(grid, kernel_size, raster_causal=False)
    if coarse_grid is None:
        return text_len * (text_len + math.prod(grid)) + image
    cells = math.prod(coarse_grid)
    return text_len**2 + cells * (text_len + cells) + image + coarse_2d(grid, coarse_grid, coarse_kernel_size)


def _seen(length: int, kernel_size: int, dilation: int = 1, edge: str = "clip") -> int:
    """Pairs along one axis."""
    if edge == "shift":
        return length * kernel_size
    return length + sum(_beside(length, reach, dilation) for reach in (kernel_size // 2, (kernel_size - 1) // 2))


def _beside(length: int, reach: int, dilation: int) -> int:
    """Of them those in one direction."""
    return sum(max(0, length - step * dilation) for step in range(1, reach + 1))
