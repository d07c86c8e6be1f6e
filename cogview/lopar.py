"""The order in which local parallel autoregressive generation (LoPAR; CogView2, arXiv 2204.14217) fills a grid.

Order is a number for each cell of a tile, which is repeated over the grid. In round m, from 1 on, what is of m or later
is hidden, and cells of m are drawn, all at once; what is below 1 stays as it was given. A grid that the published tile
does not fit takes `diagonals` of another.
"""

import torch
from torch import Tensor

from cogview.config import require

Tile = tuple[tuple[int, ...], ...]

PUBLISHED: Tile = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)
"""Of released CogView2: of 36 cells 13 stay, and 4, 4, 5, 4, 4, 2 are drawn in its six rounds. Drawn cells go by
diagonals, x + y - 1, but for four at the end of the tile, which begin again at 1."""
PUBLISHED_TOP_K = (40, 40, 40, 20, 20, 10)
"""Of its rounds."""


def diagonals(rows: int, columns: int) -> Tile:
    """Of a tile of any sides: cell (x, y) stays where 3 divides x - y, and else is drawn in round x + y, so after its
    upper and its left neighbour. A third of the cells stays and some more at the edges, of 5 x 5 nine (of the published
    36 thirteen), so that inside a tile two of the four neighbours of every drawn cell do. A square of side n has
    2 n - 3 rounds."""
    require(min(rows, columns) >= 2, "tile", "sides of at least 2", [rows, columns])
    return tuple(tuple(x + y if (x - y) % 3 else 0 for x in range(columns)) for y in range(rows))


def fits(tile: Tile, side: int) -> bool:
    """Whether a tile's sides divide that of a grid."""
    return side % len(tile) == 0 and side % len(tile[0]) == 0


def fitting(side: int) -> Tile:
    """For a grid of side x side the published tile where it fits, or else diagonals of the square whose side is nearest
    to its six, of two as near the smaller."""
    if fits(PUBLISHED, side):
        return PUBLISHED
    require(side >= 2, "grid", "a side of at least 2", side)
    divisors = (n for n in range(2, side + 1) if side % n == 0)
    own = min(divisors, key=lambda n: abs(n - len(PUBLISHED)))
    return diagonals(own, own)


def order(tile: Tile, side: int) -> Tensor:
    """int64 [side, side]: a tile's order over a grid, whose sides it divides."""
    cells = torch.tensor(tile)
    require(cells.ndim == 2 and fits(tile, side), "tile", f"sides that divide {side}", list(cells.shape))
    require(int(cells.max()) >= 1, "tile", "a cell to be drawn", tile)
    return cells.repeat(side // cells.shape[0], side // cells.shape[1])


def top_k(rounds: int) -> tuple[int, ...]:
    """`PUBLISHED_TOP_K` over so many rounds: each has that of the published round in which its end falls."""
    count = len(PUBLISHED_TOP_K)
    return tuple(PUBLISHED_TOP_K[-(-number * count // rounds) - 1] for number in range(1, rounds + 1))
