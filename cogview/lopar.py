"""The order in which local parallel autoregressive generation (LoPAR; CogView2, arXiv 2204.14217) fills a grid.

Order is a number for each cell of a tile, which is repeated over the grid. In round m, from 1 on, what is of m or later
is hidden, and cells of m are drawn, all at once; what is below 1 stays as it was given.
"""

import torch
from torch import Tensor

from cogview.config import require

PUBLISHED = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)
"""Of released CogView2: of 36 cells 13 stay, and 4, 4, 5, 4, 4, 2 are drawn in its six rounds."""
PUBLISHED_TOP_K = (40, 40, 40, 20, 20, 10)
"""Of its rounds."""


def diagonals(side: int) -> tuple[tuple[int, ...], ...]:
    """Of a tile of side x side, none of which stays: one diagonal after the other, 2 * side - 1 rounds."""
    return tuple(tuple(1 + x + y for x in range(side)) for y in range(side))


def order(tile: tuple[tuple[int, ...], ...], side: int) -> Tensor:
    """int64 [side, side]: a tile's order over a grid, whose sides it divides."""
    cells = torch.tensor(tile)
    fits = cells.ndim == 2 and side % cells.shape[0] == 0 and side % cells.shape[1] == 0
    require(fits, "tile", f"sides that divide {side}", list(cells.shape))
    require(int(cells.max()) >= 1, "tile", "a cell to be drawn", tile)
    return cells.repeat(side // cells.shape[0], side // cells.shape[1])
