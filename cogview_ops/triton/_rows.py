"""What kernels over rows share: any strides, tiles of whole rows, parameters that stay on the device."""

import math
from typing import Any

import torch
import triton
import triton.language as tl  # noqa: F401  Triton's interpreter looks for it
from torch import Tensor

from . import configs
from .configs import Config

ROW_AXES = 3  # leading dimensions of a row's address, after merging; what has more is copied


@triton.jit
def row_offsets(i, n1, n2, s0, s1, s2):
    """Offsets of rows i (int64) of a tensor that `row_strides` describes."""
    return i // n2 // n1 * s0 + i // n2 % n1 * s1 + i % n2 * s2


# --- host ------------------------------------------------------------------------------------------------------------


def merged(x: Tensor) -> list[tuple[int, int]] | None:
    """(size, stride) of the leading dimensions, merged where they can be; None where there are too many."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes if len(axes) <= ROW_AXES else None


def addressable(x: Tensor, contiguous_rows: bool = True) -> Tensor:
    """x, or a copy where the kernels cannot address its rows."""
    inside = x.stride(-1) == 1 or x.shape[-1] == 1 or not contiguous_rows
    return x if inside and merged(x) is not None else x.contiguous()


def row_strides(**tensors: Tensor) -> dict[str, int]:
    """Arguments `<name>_n1`, `_n2`, `_s0`, `_s1`, `_s2` of tensors that are `addressable`."""
    out: dict[str, int] = {}
    for name, x in tensors.items():
        axes = merged(x)
        assert axes is not None, name
        # missing ones come last: sizes of 1, by which no kernel divides
        (_, s0), (n1, s1), (n2, s2) = axes + [(1, 0)] * (ROW_AXES - len(axes))
        out |= {f"{name}_n1": n1, f"{name}_n2": n2, f"{name}_s0": s0, f"{name}_s1": s1, f"{name}_s2": s2}
    return out


def tile(cols: int, elements: int) -> Config:
    """m rows of n columns in a program, n at least `cols`; about `elements` of each tensor in a thread."""
    n = max(triton.next_power_of_2(cols), 16)
    m = max(1, 512 // n)
    return Config(m, n, min(max(triton.next_power_of_2(math.ceil(m * n / 32 / elements)), 1), 32), 1)


def fits_one_program(cols: int) -> None:
    if cols > 2**20:
        raise NotImplementedError(f"the Triton kernels take rows of up to {2**20} elements, got {cols}")


def programs(tiles: int, device: torch.device) -> int:
    """Of a kernel whose programs take one tile after another."""
    return min(tiles, 4 * configs.processors(device))


Arguments = dict[str, Any]
