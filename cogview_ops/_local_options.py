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


class Arguments(NamedTuple):
    """Options as arguments of the operators, in groups: a decode has its own between the first two, and no edges."""

    tensors: tuple[Any, ...]
    window: tuple[Any, ...]
    edges: tuple[Any, ...]
    rest: tuple[Any, ...]


TENSORS = 5  # in the first group
WITH_GRADIENT = 4  # of them, the first
SCHEMA = (
    "Tensor? prefix_key, Tensor? prefix_value, Tensor? coarse_key, Tensor? coarse_value, Tensor? prefix_mask",
    "SymInt[] grid, SymInt[] kernel_size, SymInt[] dilation",
    "bool raster_causal, bool shift",
    "float prefix_bias, SymInt[] coarse_grid, SymInt[] coarse_kernel_size, float coarse_bias, float scale",
)


def flatten(options: Options) -> Arguments:
    window = options.window
    prefix_key, prefix_value, prefix_mask, prefix_bias = options.prefix or (None, None, None, 0.0)
    coarse_key, coarse_value, *coarse_grids, coarse_bias = options.coarse or (None, None, (0, 0), (0, 0), 0.0)
    return Arguments(
        (prefix_key, prefix_value, coarse_key, coarse_value, prefix_mask),
        (list(window.grid), list(window.kernel_size), list(window.dilation)),
        (window.raster_causal, window.edge == "shift"),
        (prefix_bias, *map(list, coarse_grids), coarse_bias, options.scale),
    )


def unflatten(arguments: Arguments) -> Options:
    prefix_key, prefix_value, coarse_key, coarse_value, prefix_mask = arguments.tensors
    prefix_bias, coarse_grid, coarse_kernel_size, coarse_bias, scale = arguments.rest
    grid, kernel_size, dilation = (_pair(x) for x in arguments.window)
    raster_causal, shift = arguments.edges
    window = Window(grid, kernel_size, dilation, raster_causal, "shift" if shift else "clip")
    prefix = None if prefix_key is None else Prefix(prefix_key, prefix_value, prefix_mask, prefix_bias)
    sizes = _pair(coarse_grid), _pair(coarse_kernel_size)
    coarse = None if coarse_key is None else Coarse(coarse_key, coarse_value, *sizes, coarse_bias)
    return Options(window, prefix, coarse, scale)


def _pair(x: Any) -> Pair:
    rows, columns = x
    return rows, columns
