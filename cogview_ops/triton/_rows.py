"""What kernels over rows share: any strides, tiles of whole rows, parameters that stay on the device."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from ._tiles import accumulator, check_interpreter
from .configs import Config

ROW_AXES = 3  # leading dimensions of a row's address, after merging; what has more is copied


class Matrix(NamedTuple):
    """A tensor as rows on three axes: where it starts, sizes of the last two axes, strides.

    A size n is kept as 2 * n - 1, which is odd: for multiples of 16 Triton would compile anew. It does for 1, by which
    nothing is divided then.
    """

    at: Any
    odd1: Any
    odd2: Any
    s0: Any
    s1: Any
    s2: Any


class Tile(NamedTuple):
    """Rows i (int64) and columns j [1, N], which of the rows there are, and which of the elements."""

    i: Any
    j: Any
    row: Any
    there: Any


@triton.jit
def tile_of(t, rows, cols, M: tl.constexpr, N: tl.constexpr):
    """Number t, of M rows and N columns."""
    i, j = tl.cast(t, tl.int64) * M + tl.arange(0, M), tl.arange(0, N)[None, :]
    return Tile(i, j, i < rows, (i < rows)[:, None] & (j < cols))


@triton.jit
def row_starts(x, tile):
    """Pointers to the rows of a tile."""
    n1, n2, i = (x.odd1 >> 1) + 1, (x.odd2 >> 1) + 1, tile.i
    return x.at + (i // n2 // n1 * x.s0 + i // n2 % n1 * x.s1 + i % n2 * x.s2)[:, None]


@triton.jit
def load(x, tile, mask, ACC: tl.constexpr):
    return tl.load(row_starts(x, tile) + tile.j, mask=mask, other=0.0).to(ACC)


@triton.jit
def store(x, tile, values):
    tl.store(row_starts(x, tile) + tile.j, values.to(x.at.dtype.element_ty), mask=tile.there)


# --- host ------------------------------------------------------------------------------------------------------------


def merged(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, merged where they can be."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def matrix(x: Tensor, contiguous_rows: bool = True) -> Matrix:
    """Of x, or of a copy where the kernels cannot address its rows."""
    inside = x.stride(-1) == 1 or x.shape[-1] == 1 or not contiguous_rows
    if not inside or len(merged(x)) > ROW_AXES:
        x = x.contiguous()
    axes = merged(x)
    (_, s0), (n1, s1), (n2, s2) = axes + [(1, 0)] * (ROW_AXES - len(axes))  # missing ones come last
    return Matrix(x, 2 * n1 - 1, 2 * n2 - 1, s0, s1, s2)


def shared(x: Tensor, config: Config) -> dict[str, Any]:
    """Arguments of all kernels over the rows of x."""
    check_interpreter(x)
    cols = x.shape[-1]
    if cols > 2**20:
        raise NotImplementedError(f"the Triton kernels take rows of up to {2**20} elements, got {cols}")
    return {"rows": x.numel() // cols, "cols": cols, "ACC": accumulator(x.dtype), "M": config.m, "N": config.n}


def kept(out: Tensor, made: Matrix) -> Tensor:
    """`out`, whose rows are `made` or a copy of them."""
    return out if made.at is out else out.copy_(made.at)


def tiling(cols: int, elements: int) -> Config:
    """m rows of n columns in a program, n at least `cols`; about `elements` of each tensor in a thread."""
    n = max(triton.next_power_of_2(cols), 16)
    m = max(1, 512 // n)
    return Config(m, n, min(max(triton.next_power_of_2(math.ceil(m * n / 32 / elements)), 1), 32), 1)


def grid(x: Tensor, config: Config) -> tuple[int]:
    return (triton.cdiv(x.numel() // x.shape[-1], config.m),)


def programs(tiles: int, device: torch.device) -> int:
    """Of a kernel whose programs take one tile after another."""
    return min(tiles, 4 * configs.processors(device))
