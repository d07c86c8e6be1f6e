"""What 2D local attention is asked for, as objects: built from what users pass in `_checks.py`, as arguments of the
operators and back here.

A new option is a field here and in `SCHEMA`, `flatten` and `unflatten`; a check; a line in `reference.py`; its kernels.
"""

from typing import Any, NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Window(NamedTuple):
    grid: Pair
    kernel_size: Pair  # (0, 0): without a local set
    dilation: Pair = (1, 1)
    raster_causal: bool = False
    edge: str = "clip"


class Prefix(NamedTuple):
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    bias: float = 0.0


class Coarse(NamedTuple):
    key: Tensor
    value: Tensor
    grid: Pair
    kernel_size: Pair
    bias: float = 0.0


class Options(NamedTuple):
    window: Window
    prefix: Prefix | None
    coarse: Coarse | None
    scale: float
    bias: Tensor | None = None  # of the local set
    key_mask: Tensor | None = None  # of the local set


TENSORS = 7  # come before the numbers
WITH_GRADIENT = 5  # of them, the first
SCHEMA = (
    "Tensor? prefix_key, Tensor? prefix_value, Tensor? coarse_key, Tensor? coarse_value, Tensor? bias, "
    "Tensor? prefix_mask, Tensor? key_mask",
    "SymInt[] grid, SymInt[] kernel_size, SymInt[] dilation, bool raster_causal, bool shift, float prefix_bias, "
    "SymInt[] coarse_grid, SymInt[] coarse_kernel_size, float coarse_bias, float scale",
)


def flatten(options: Options) -> tuple[Any, ...]:
    """The numbers among them, as arguments of the operators."""
    window = options.window
    prefix_bias = options.prefix.bias if options.prefix else 0.0
    *coarse_grids, coarse_bias = options.coarse[2:] if options.coarse else ((0, 0), (0, 0), 0.0)
    sizes = list(window.grid), list(window.kernel_size), list(window.dilation)
    edges = window.raster_causal, window.edge == "shift"
    return *sizes, *edges, prefix_bias, *map(list, coarse_grids), coarse_bias, options.scale


def unflatten(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Options:
    prefix_key, prefix_value, coarse_key, coarse_value, bias, prefix_mask, key_mask = tensors
    grid, kernel_size, dilation, raster_causal, shift, *rest = numbers
    prefix_bias, coarse_grid, coarse_kernel_size, coarse_bias, scale = rest
    edge = "shift" if shift else "clip"
    window = Window(_pair(grid), _pair(kernel_size), _pair(dilation), raster_causal, edge)
    prefix = None if prefix_key is None else Prefix(prefix_key, prefix_value, prefix_mask, prefix_bias)
    sizes = _pair(coarse_grid), _pair(coarse_kernel_size)
    coarse = None if coarse_key is None else Coarse(coarse_key, coarse_value, *sizes, coarse_bias)
    return Options(window, prefix, coarse, scale, bias, key_mask)


def _pair(x: Any) -> Pair:
    rows, columns = x
    return rows, columns
