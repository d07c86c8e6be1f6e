"""What 2D local attention is asked for, as objects: built from what users pass in `_checks.py`, as arguments of the
operators and back here.

A new option is a field here and in `SCHEMA`, `flatten` and `unflatten`; a check; a line in `reference.py`; its kernels.
"""

from typing import Any, NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Window(NamedTuple):
    grid: Pair
    kernel_size: Pair
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


class Numbers(NamedTuple):
    """Options but for their tensors as arguments of the operators, in groups: a decode has no edges."""

    window: tuple[Any, ...]
    edges: tuple[Any, ...]
    rest: tuple[Any, ...]


TENSORS = 5  # come before the numbers
WITH_GRADIENT = 4  # of them, the first
SCHEMA = (
    "Tensor? prefix_key, Tensor? prefix_value, Tensor? coarse_key, Tensor? coarse_value, Tensor? prefix_mask",
    "SymInt[] grid, SymInt[] kernel_size, SymInt[] dilation",
    "bool raster_causal, bool shift",
    "float prefix_bias, SymInt[] coarse_grid, SymInt[] coarse_kernel_size, float coarse_bias, float scale",
)


def flatten(options: Options) -> Numbers:
    window = options.window
    prefix_bias = options.prefix.bias if options.prefix else 0.0
    *coarse_grids, coarse_bias = options.coarse[2:] if options.coarse else ((0, 0), (0, 0), 0.0)
    return Numbers(
        (list(window.grid), list(window.kernel_size), list(window.dilation)),
        (window.raster_causal, window.edge == "shift"),
        (prefix_bias, *map(list, coarse_grids), coarse_bias, options.scale),
    )


def unflatten(tensors: tuple[Any, ...], numbers: Numbers) -> Options:
    prefix_key, prefix_value, coarse_key, coarse_value, prefix_mask = tensors
    prefix_bias, coarse_grid, coarse_kernel_size, coarse_bias, scale = numbers.rest
    grid, kernel_size, dilation = (_pair(x) for x in numbers.window)
    raster_causal, shift = numbers.edges
    window = Window(grid, kernel_size, dilation, raster_causal, "shift" if shift else "clip")
    prefix = None if prefix_key is None else Prefix(prefix_key, prefix_value, prefix_mask, prefix_bias)
    sizes = _pair(coarse_grid), _pair(coarse_kernel_size)
    coarse = None if coarse_key is None else Coarse(coarse_key, coarse_value, *sizes, coarse_bias)
    return Options(window, prefix, coarse, scale)


def _pair(x: Any) -> Pair:
    rows, columns = x
    return rows, columns
