"""What 2D local attention is asked for, in the units of its Triton kernels: options, patches, sizes of boxes."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .._local_options import Options, Pair
from . import configs
from ._local_2d_pattern import FAR, Biased, Form
from ._tiles import Keys, Shape, accumulator, block_d, check_interpreter, logit, rows_of, section


def patch_rows(
    grid: Pair, kernel: Pair, cells: int, tile: int, causal: bool, ratio: tuple[float, float] = (1, 1)
) -> int:
    """Rows of the patch of `cells` cells whose boxes take the fewest tiles over the whole grid, itself counted as one.

    A box is `ratio` times the patch and its halo. Row kernels get patches of one row, column kernels of one column.
    """

    def cost(rows: int) -> int:
        columns = cells // rows
        halo = kernel[0] // 2 if causal else kernel[0] - 1
        box = min(grid[0], rows + halo) * min(grid[1], columns + kernel[1] - 1) * ratio[0] * ratio[1]
        return triton.cdiv(grid[0], rows) * triton.cdiv(grid[1], columns) * (math.ceil(box / tile) + 1)

    return min((1 << n for n in range(cells.bit_length())), key=cost)


def log2(power: int) -> int:
    return power.bit_length() - 1


def sub_image(grid: Pair, dilation: Pair) -> Pair:
    """Rows and columns of the largest of the parts into which dilation splits an image."""
    return triton.cdiv(grid[0], dilation[0]), triton.cdiv(grid[1], dilation[1])


def patches(image: Pair, patch: Pair, dilation: Pair) -> int:
    """How many there are in all sub-images."""
    return triton.cdiv(image[0], patch[0]) * triton.cdiv(image[1], patch[1]) * dilation[0] * dilation[1]


class Call:
    """What the kernels of one call share: shapes, and options as the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor | None, v: Tensor | None, options: Options) -> None:
        check_interpreter(q)
        self.device, self.element_size = q.device, q.element_size()
        self.batch, self.heads, _, self.dim = q.shape
        window, prefix, coarse, self.scale, table, key_mask = options
        most = next(x for x in (k, coarse and coarse.key, prefix and prefix.key) if x is not None)
        self.kv_heads = most.shape[1]
        self.group, self.pairs = self.heads // self.kv_heads, self.batch * self.kv_heads
        self.grid, self.causal, self.shift = window.grid, window.raster_causal, window.edge == "shift"
        self.kernel = (1, 1) if k is None else window.kernel_size
        # of an axis on which only itself is seen it does not matter
        dilation = window.dilation
        self.dilation = dilation[0] if self.kernel[0] > 1 else 1, dilation[1] if self.kernel[1] > 1 else 1
        self.image = sub_image(self.grid, self.dilation)
        self.local = None if k is None or v is None else Keys(rows_of(k), rows_of(v))
        self.table = None if table is None else self.padded(table)
        # not bools: kernels add it to what they compare
        self.key_mask = None if key_mask is None else (key_mask.to(torch.int32) - 1).contiguous() * -FAR.value
        self.section = section(self.batch * self.heads, self.group, most)
        self.prefix, self.mask, self.prefix_len = None, None, 0 if prefix is None else prefix.key.shape[2]
        if prefix is not None and self.prefix_len:
            self.prefix = Biased(Keys(rows_of(prefix.key), rows_of(prefix.value)), logit(prefix.bias))
            # not of bytes: Triton 3.6 lays float64 keys out for products as if they were as narrow, and fails
            self.mask = None if prefix.mask is None else prefix.mask.to(torch.int32).contiguous()
        self.coarse, self.coarse_grid, self.coarse_kernel = None, (1, 1), (1, 1)
        if coarse is not None:
            self.coarse = Biased(Keys(rows_of(coarse.key), rows_of(coarse.value)), logit(coarse.bias))
            self.coarse_grid, self.coarse_kernel = coarse.grid, coarse.kernel_size
        self.ratio = self.grid[0] // self.coarse_grid[0], self.grid[1] // self.coarse_grid[1]
        self.acc = accumulator(q.dtype)

    def padded(self, table: Tensor) -> Tensor:
        """In base 2, and with room around: of a tile's pairs that do not see each other kernels read something too."""
        room = 256 * table.shape[2] + self.grid[1]  # of patches of so many cells, or two lines of the image
        room = triton.cdiv(room, 16) * 16
        return torch.nn.functional.pad(table.flatten() / math.log(2), (room, room))[room:]

    def config(self, kernel: str) -> configs.Config:
        chip = configs.chip(self.device)
        if self.table is not None:  # it takes registers: smaller tiles
            chip = min(chip, 0)
        return configs.lookup(f"local_{kernel}", chip, self.element_size, block_d(self.dim))

    def shape(self, config: configs.Config) -> Shape:
        return Shape(self.dim, block_d(self.dim), config.m, config.n)

    def small(self, grid: Pair, size: Pair, tile: int) -> bool:
        """Whether 16 bits tell cells of a box of this size and near it apart, and 31 bits cells * columns."""
        rows, columns = min(grid[0], size[0]), min(grid[1], size[1])
        return (rows * columns + tile) * columns < 2**31 and 2 * max(size) + tile < 2**15

    def beside(self, axis: int) -> tuple[int, int]:
        """Of any query: how many rows (0) or columns (1) before it, and how many in all, it may see keys in."""
        n, k = self.image[axis], self.kernel[axis]
        before, behind = (k - 1, k - 1) if self.shift else (k // 2, (k - 1) // 2)
        before, behind = min(before, n - 1), min(behind, n - 1)
        return before, before + 1 + (0 if axis == 0 and self.causal else behind)

    def query_side(self, patch: Pair, config: configs.Config, partial: bool = False) -> dict[str, Any]:
        """Arguments of the kernels that own queries."""
        spread = (patch[0] - 1) * self.dilation[0] + 1, (patch[1] - 1) * self.dilation[1] + 1
        small = self.small(self.image, plus(patch, self.kernel), config.n)
        small = small and self.small(self.coarse_grid, plus(spread, self.coarse_kernel), config.n)
        return {
            "local": self.local,
            "table": self.table,
            "key_mask": self.key_mask,
            "prefix": self.prefix,
            "mask": self.mask,
            "coarse": self.coarse,
            "group": self.group,
            **sizes("height", "width", self.grid),
            **sizes("kernel_h", "kernel_w", self.kernel),
            **sizes("dilation_h", "dilation_w", self.dilation),
            "prefix_len": self.prefix_len,
            **sizes("coarse_height", "coarse_width", self.coarse_grid),
            **sizes("coarse_kernel_h", "coarse_kernel_w", self.coarse_kernel),
            "FORM": Form(self.causal, self.shift, self.dilation != (1, 1), small, partial),
            "ACC": self.acc,
            "SHAPE": self.shape(config),
        }

    def patches(self, config: configs.Config) -> tuple[int, dict[str, Any]]:
        """Programs, and arguments, of the kernels that own a patch of queries each."""
        kernel, share = self.kernel, (1.0, 1.0)
        if self.local is None:  # by coarse keys, in cells of the image
            (h, w), ratio = self.coarse_kernel, self.ratio
            kernel, share = ((h - 1) * ratio[0] + 1, (w - 1) * ratio[1] + 1), (1 / ratio[0], 1 / ratio[1])
        rows = patch_rows(self.image, kernel, config.m, config.n, self.causal, share)
        columns, total = config.m // rows, self.batch * self.heads
        count = patches(self.image, (rows, columns), self.dilation)
        launched = {"heads": self.heads, "total_heads": total, "section": self.section, "tiles": count}
        return count * total, {**self.query_side((rows, columns), config), **launched, "bits": log2(columns)}


def sizes(rows: str, columns: str, pair: Pair) -> dict[str, int]:
    """Two arguments. Not one pair: in tuples Triton compiles anew for 1 and for multiples of 16."""
    return {rows: pair[0], columns: pair[1]}


def plus(patch: Pair, kernel: Pair) -> Pair:
    """Rows and columns of the windows of a patch."""
    return patch[0] + kernel[0] - 1, patch[1] + kernel[1] - 1


def box_tiles(grid: Pair, size: Pair, tile: int) -> int:
    return triton.cdiv(min(grid[0], size[0]) * min(grid[1], size[1]), tile)
