"""Formulas for `torch.utils.flop_counter`: of attention its matrix products over the pairs of query and key that its
pattern sees, two forwards and five backwards, as torch counts SDPA. Norms and softmax have none, as torch's.

Shapes are all that is known: beside what `pairs` says, no pivot counts as padding, cached sequences count as full,
packed ones as long as they may be. So these are upper bounds, and exact where there is nothing of that kind.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import pairs
from ._local_options import TENSORS, Options, unflatten

_MODULE = "torch.utils.flop_counter"


def three_region_packed_pairs(total: int, longest: int, pivots: int, block_size: int, window_blocks: int) -> int:
    """Of sequences of any lengths: at most those of one, and at most what a query has on average where it has most, in
    the longest one or at the end of its last whole block."""

    def seen(tokens: int) -> int:
        return pairs.three_region(tokens, pivots, block_size, window_blocks)

    longest = min(longest, total)
    lengths = (n for n in (longest, longest // block_size * block_size) if n)
    return min(seen(total), max((-(-total * seen(n) // n) for n in lengths), default=0))


def local_2d_pairs(options: Options, prefix: int) -> int:
    """Of an image."""
    grid, kernel, dilation, raster_causal, edge = options.window
    seen = pairs.local_2d(grid, kernel, dilation, edge, raster_causal=raster_causal) + math.prod(grid) * prefix
    if options.coarse is not None:
        seen += pairs.coarse_2d(grid, options.coarse.grid, options.coarse.kernel_size)
    return seen


def _three_region(query: Any, key: Any, value: Any, pivots: Any, block_size: int, window_blocks: int, *_: Any) -> int:
    batch, heads, tokens, dim = query
    return 4 * batch * heads * dim * pairs.three_region(tokens, pivots[1], block_size, window_blocks)


def _three_region_varlen(
    query: Any, key: Any, value: Any, pivots: Any, ends: Any, longest: int, block_size: int, window_blocks: int, *_: Any
) -> int:
    total, heads, dim = query
    return 4 * heads * dim * three_region_packed_pairs(total, longest, pivots[1], block_size, window_blocks)


def _three_region_decode(
    query: Any, keys: Any, values: Any, pivots: Any, ends: Any, block_size: int, window_blocks: int, *_: Any
) -> int:
    return 4 * math.prod(query) * min(keys[2], block_size * window_blocks + pivots[1])


def _local_2d(query: Any, key: Any, value: Any, *rest: Any) -> int:
    batch, heads, _, dim = query
    tensors = rest[:TENSORS]
    options = unflatten(tensors, rest[TENSORS:])
    return 4 * batch * heads * dim * local_2d_pairs(options, 0 if tensors[0] is None else tensors[0][2])


def _local_2d_decode(query: Any, keys: Any, values: Any, *rest: Any) -> int:
    tensors = rest[:TENSORS]
    options = unflatten(tensors, rest[TENSORS + 2 :])
    (rows, columns), coarse = options.window.kernel_size, options.coarse
    seen = rows // 2 * columns + columns // 2 + 1 if options.window.raster_causal else rows * columns
    seen += 0 if tensors[0] is None else tensors[0][2]
    if coarse is not None:
        seen += math.prod(min(size) for size in zip(coarse.grid, coarse.kernel_size, strict=True))
    return 4 * math.prod(query) * seen


def _linear_decode(x: Any, weight: Any, *_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _none(*_: Any) -> int:
    return 0


def _backward(forward: Callable[..., int], gradients: int, extra: slice) -> Callable[..., int]:
    """Five products where the forward has two; its arguments are those of the forward and others between them."""

    def formula(*arguments: Any) -> int:
        rest = list(arguments[gradients:])
        del rest[extra]
        return forward(*rest) * 5 // 2

    return formula


FORMULAS: dict[str, Callable[..., int]] = {
    "three_region_attention_fwd": _three_region,
    "three_region_attention_bwd": _backward(_three_region, 2, slice(3, 5)),
    "three_region_attention_decode": _three_region_decode,
    "three_region_attention_varlen_fwd": _three_region_varlen,
    "three_region_attention_varlen_bwd": _backward(_three_region_varlen, 2, slice(3, 5)),
    "local_attention_2d_fwd": _local_2d,
    "local_attention_2d_bwd": _backward(_local_2d, 2, slice(3 + TENSORS, 5 + TENSORS)),
    "local_attention_2d_decode": _local_2d_decode,
    "linear_decode": _linear_decode,
    **{
        f"{name}_{which}": _none
        for name in ("layer_norm", "pb_relax_softmax", "rms_norm", "sandwich_layer_norm", "sandwich_rms_norm")
        for which in ("fwd", "bwd")
    },
}


def register(namespace: str, name: str) -> None:
    """Give the counter an operator's formula, now or when it is imported: it imports Triton, which is slow."""
    if _MODULE in sys.modules:
        _give(namespace, name)
        return
    if _WhenImported.instance not in sys.meta_path:
        sys.meta_path.insert(0, _WhenImported.instance)
    _WhenImported.instance.waiting.append((namespace, name))


def _give(namespace: str, name: str) -> None:
    formula = FORMULAS[name]
    target = getattr(getattr(torch.ops, namespace), name)
    sys.modules[_MODULE].register_flop_formula(target)(lambda *args, out_shape=None: formula(*args))


class _WhenImported:
    """A finder of modules that finds what the others find, and acts after the counter was loaded."""

    instance: "_WhenImported"

    def __init__(self) -> None:
        self.waiting: list[tuple[str, str]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: Any) -> None:
                load(module)
                for operator in self.waiting:
                    _give(*operator)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


_WhenImported.instance = _WhenImported()
