"""All validation of what users pass, written once. Messages name the argument, what was expected, what came.

Values inside tensors (pivots, cache_seqlens) are read on CPU, by the kernels themselves; on other devices only with
COGVIEW_OPS_CHECK=1, because reading them waits for the device.
"""

import math
import numbers
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._local_options import Coarse, Prefix, Window

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
# modes in which a comparison of real values gives no value
_TRACING = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def require(ok: bool, name: str, expected: str | Callable[[], str], got: Any) -> None:
    """Messages with numbers in them are functions: formatting a symbolic size would fix its value in a graph."""
    if ok is True:
        return
    if torch.compiler.is_compiling():  # a number read from a tensor is not known yet: it passes
        ok = torch.fx.experimental.symbolic_shapes.guard_or_true(ok)
    if not ok:
        expected, got = (x() if callable(x) else x for x in (expected, got))
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _swapped(suspected: bool, x: Tensor, name: str) -> str:
    """The end of a message about sizes, where they fit tensors whose tokens come before their heads."""
    if not suspected:
        return ""
    return f"; {name} should be [B, H, S, D], and its shape {tuple(x.shape)} looks like [B, S, H, D]"


def tensor(
    x: Any, name: str, dtypes: Sequence[torch.dtype] = FLOATS, ndim: int | None = None, layout: str = ""
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_names([x.dtype])}")
    if ndim is not None and x.dim() != ndim:
        layout = layout or (" [B, H, S, D]" if ndim == 4 else "")
        raise ValueError(f"{name}: expected {ndim} dimensions{layout}, got shape {tuple(x.shape)}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def same(x: Tensor, name: str, like: Tensor, like_name: str, *, wider: bool = False) -> None:
    """Same dtype and device as another argument; `wider`: or float32 beside a dtype of 16 bits."""
    wider = wider and like.dtype in (torch.bfloat16, torch.float16)
    if x.dtype != like.dtype and not (wider and x.dtype == torch.float32):
        other = " or torch.float32" if wider else ""
        raise TypeError(f"{name}: expected {like_name}'s dtype {like.dtype}{other}, got {x.dtype}")
    same_device(x, name, like, like_name)


def same_device(x: Tensor, name: str, like: Tensor, like_name: str) -> None:
    require(x.device == like.device, name, lambda: f"{like_name}'s device {like.device}", x.device)


def shape(x: Tensor, name: str, expected: Sequence[int]) -> None:
    require(tuple(x.shape) == tuple(expected), name, lambda: f"shape {tuple(expected)}", tuple(x.shape))


def last_contiguous(x: Tensor, name: str) -> None:
    if x.dim() and x.shape[-1] > 1 and x.numel():
        require(x.stride(-1) == 1, name, "a contiguous last dimension", lambda: f"stride {x.stride(-1)}")


def integer(x: Any, name: str, minimum: int) -> int:
    """x, NumPy's as Python's."""
    if type(x) is not int and not isinstance(x, torch.SymInt):
        x = _index(x, name)
    require(x >= minimum, name, lambda: f"at least {minimum}", x)
    require(x < 2**63, name, "an int below 2**63", x)
    return x


def _index(x: Any, name: str) -> int:
    _leave_graph()
    try:
        if not isinstance(x, (bool, Tensor)):
            return operator.index(x)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an int, got {type(x).__name__}")


def _leave_graph() -> None:
    """Dynamo makes a tensor of a NumPy scalar, whose value no graph knows."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break("a NumPy number among the arguments: a graph takes those of Python")


def boolean(x: Any, name: str) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected True or False, got {x!r}")


def finite(x: Any, name: str, dtype: torch.dtype = torch.float32, *, positive: bool = False) -> float:
    """x, NumPy's as Python's, if the kernels can hold it, also times the binary logarithm of e, where they compute with
    `dtype`; with `positive` as a normal number above 0."""
    if type(x) is not float and type(x) is not int and not isinstance(x, (torch.SymInt, torch.SymFloat)):
        x = _real(x, name)
    for ok in (x > -math.inf, x < math.inf):  # math.isfinite breaks graphs of dynamic floats
        require(ok, name, "a finite number", x)
    if positive:
        require(x > 0, name, "a number above 0", x)
    held = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    least, most = held.tiny if positive else -held.max / 2, held.max / 2
    for ok in (x >= least, x <= most):
        require(ok, name, lambda: f"a number from {least:.2g} to {most:.2g}", x)
    return x


def probability(x: Any, name: str) -> float:
    x = finite(x, name)
    require(0 <= x <= 1, name, "a probability", x)
    return x


def _real(x: Any, name: str) -> float:
    _leave_graph()
    if not isinstance(x, Tensor) and getattr(x, "ndim", None) == 0:  # what Dynamo makes of a scalar is an array
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    return float(x)


def pair(x: Any, name: str, minimum: int = 1) -> tuple[int, int]:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"{name}: expected a pair of ints (rows, columns), got {x!r}")
    return integer(x[0], name, minimum), integer(x[1], name, minimum)


def choice(x: Any, name: str, allowed: Sequence[Any]) -> None:
    require(x in allowed, name, lambda: " or ".join(repr(a) for a in allowed), lambda: repr(x))


def scale(x: Any, query: Tensor) -> float:
    """The scale of an attention: `head_dim ** -0.5` where none is given."""
    if x is None:
        return query.shape[-1] ** -0.5
    return float(finite(x, "scale", query.dtype))


def attention(query: Any, key: Any, value: Any, key_name: str = "key", value_name: str = "value") -> None:
    """query `[B, H, Sq, D]` with key and value `[B, Hkv, Sk, D]`, Hkv dividing H."""
    for x, name in ((query, "query"), (key, key_name), (value, value_name)):
        tensor(x, name, ndim=4)
        last_contiguous(x, name)
    same(key, key_name, query, "query")
    same(value, value_name, query, "query")
    batch, heads, _, dim = query.shape
    require(dim >= 1, "query", "head_dim at least 1", dim)
    require(
        key.shape[0] == batch and key.shape[3] == dim,
        key_name,
        lambda: f"batch {batch} and head_dim {dim} as query",
        lambda: f"shape {tuple(key.shape)}",
    )
    kv_heads = key.shape[1]
    if not _divides(kv_heads, heads):
        tokens, of = key.shape[1:3]
        hint = _swapped(tokens > of > 0 and (heads % of == 0 or query.shape[2] % of == 0), key, key_name)
        raise ValueError(f"{key_name}: expected a number of heads that divides query's {heads}, got {kv_heads}{hint}")
    if value.shape != key.shape:
        hint = _swapped(value.shape == key.transpose(1, 2).shape, value, value_name)
        raise ValueError(f"{value_name}: expected shape {tuple(key.shape)}, got {tuple(value.shape)}{hint}")


def _divides(kv_heads: int, heads: int) -> bool:
    return kv_heads == heads or (kv_heads > 0 and heads % kv_heads == 0)


def packed_attention(query: Any, key: Any, value: Any) -> None:
    """query `[total, H, D]` with key and value `[total, Hkv, D]`, Hkv dividing H."""
    for x, name in ((query, "query"), (key, "key"), (value, "value")):
        tensor(x, name, ndim=3, layout=" [total, H, D]")
        last_contiguous(x, name)
    same(key, "key", query, "query")
    same(value, "value", query, "query")
    total, heads, dim = query.shape
    require(dim >= 1, "query", "head_dim at least 1", dim)
    require(
        key.shape[0] == total and key.shape[2] == dim,
        "key",
        lambda: f"{total} tokens and head_dim {dim} as query",
        lambda: f"shape {tuple(key.shape)}",
    )
    if not _divides(key.shape[1], heads):
        raise ValueError(f"key: expected a number of heads that divides query's {heads}, got {key.shape[1]}")
    shape(value, "value", key.shape)


def tokens(x: Tensor, name: str, count: int, why: str) -> None:
    """x `[B, H, S, D]` has `count` tokens, those of `why`."""
    if x.shape[2] != count:
        hint = _swapped(x.shape[1] == count, x, name)
        raise ValueError(f"{name}: expected {count} tokens ({why}), got shape {tuple(x.shape)}{hint}")


def same_tokens(key: Tensor, query: Tensor) -> None:
    """Of self-attention."""
    heads, count = query.shape[1:3]
    if key.shape[2] != count:
        grouped = key.shape[1] == heads > count and key.shape[2] > 0 and count % key.shape[2] == 0
        hint = _swapped(grouped, key, "key")
        raise ValueError(f"key: expected {count} tokens as query, got shape {tuple(key.shape)}{hint}")


def pivots(x: Any, query: Tensor, rows: int) -> None:
    tensor(x, "pivots", INTEGERS, ndim=2)
    same_device(x, "pivots", query, "query")
    require(x.shape[0] == rows, "pivots", lambda: f"shape [{rows}, P]", tuple(x.shape))


def pivot_values(x: Tensor, query: Tensor, num_keys: int) -> None:
    if not _readable(x):
        return
    _pivots_ascend(x)
    least, most = x.aminmax()
    if not bool((least >= -1) & (most < num_keys)):
        hint = _swapped(bool(num_keys <= most < query.shape[1] > query.shape[2]), query, "query")
        raise ValueError(f"pivots: expected indices below {num_keys} or -1, got {_range(x)}{hint}")


def packed_pivot_values(x: Tensor, cu_seqlens: Tensor) -> None:
    """Of sequences that are known to be right, if they can be read."""
    if not (_readable(x) and _readable(cu_seqlens)):
        return
    _pivots_ascend(x)
    bad = ((x < -1) | (x >= cu_seqlens.diff()[:, None])).any(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        length = int(cu_seqlens.diff()[row])
        raise ValueError(f"pivots: expected indices below {length} (sequence {row}) or -1, got {_range(x[row])}")


def _pivots_ascend(x: Tensor) -> None:
    ordered = (x[:, 1:] > x[:, :-1]) & (x[:, :-1] >= 0) | (x[:, 1:] == -1)
    if not bool(ordered.all()):
        row = int((~ordered).any(1).nonzero()[0])
        raise ValueError(f"pivots: expected strictly ascending rows, then -1 as padding, got {x[row].tolist()}")


def cu_seqlens(x: Any, like: Tensor, like_name: str) -> None:
    """Where sequences begin and end, on the device of another argument."""
    tensor(x, "cu_seqlens", INTEGERS, ndim=1)
    same_device(x, "cu_seqlens", like, like_name)
    require(x.shape[0] >= 1, "cu_seqlens", "shape [sequences + 1]", tuple(x.shape))


def cu_seqlens_values(x: Tensor, total: int, max_seqlen: int | None = None) -> None:
    if not _readable(x):
        return
    first, last = int(x[0]), int(x[-1])
    require((first, last) == (0, total), "cu_seqlens", lambda: f"values from 0 to {total}", f"{first} to {last}")
    lengths = x.diff()
    if bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens: expected values that ascend, got {x.tolist()}")
    if max_seqlen is not None and lengths.numel():
        longest = int(lengths.max())
        least = f"at least the {longest} tokens of the longest sequence"
        require(longest <= max_seqlen, "max_seqlen", least, max_seqlen)


def cache_seqlens(x: Any, query: Tensor, name: str = "cache_seqlens") -> None:
    """One place in a cache for each row of the batch."""
    tensor(x, name, INTEGERS, ndim=1)
    same_device(x, name, query, "query")
    shape(x, name, (query.shape[0],))


def leftpad_values(x: Tensor | None, ends: Tensor) -> None:
    if x is not None and _readable(x) and _readable(ends):
        inside = bool(((x >= 0) & (x <= ends)).all())
        require(inside, "cache_leftpad", lambda: f"places from 0 to cache_seqlens {ends.tolist()}", lambda: x.tolist())


def seqlen_values(x: Tensor, query: Tensor, capacity: int, before: int = 0) -> None:
    """Where the new tokens end in a cache that has `before` others at least."""
    if _readable(x):
        lengths, least = x.tolist(), before + query.shape[2]
        what = f"{before} of text and the new tokens" if before else "the new tokens"
        require(
            least <= min(lengths) and max(lengths) <= capacity,
            "cache_seqlens",
            lambda: f"lengths from {least} ({what}) to {capacity} (the cache)",
            lambda: _range(x),
        )


def query_index(x: Any, query: Tensor) -> None:
    tensor(x, "query_index", INTEGERS, ndim=2)
    same_device(x, "query_index", query, "query")
    shape(x, "query_index", (query.shape[0], query.shape[2]))


def query_index_values(x: Tensor, cache_seqlens: Tensor, cells: int) -> None:
    """Cells of a grid, and how many of those of a sample are in the cache."""
    if _readable(cache_seqlens):
        inside = bool(((cache_seqlens >= 0) & (cache_seqlens <= cells)).all())
        require(
            inside, "cache_seqlens", lambda: f"lengths from 0 to {cells} (the cache)", lambda: _range(cache_seqlens)
        )
    if _readable(x):
        inside = bool(((x >= 0) & (x < cells)).all())
        require(inside, "query_index", lambda: f"cells from 0 to {cells - 1}", lambda: _range(x))
        ascending = x.sort(-1).values
        twice = ascending[:, 1:][ascending[:, 1:] == ascending[:, :-1]]
        require(not len(twice), "query_index", "each cell at most once", lambda: f"{int(twice[0])} twice")


def _range(x: Tensor) -> str:
    return f"values from {int(x.min())} to {int(x.max())}"


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.numel() == 0 or x.device.type == "meta":
        return False
    if isinstance(x, torch._subclasses.FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING):
        return False
    if hasattr(x, "device_mesh"):  # a DTensor
        return False
    return x.device.type == "cpu" or os.environ.get("COGVIEW_OPS_CHECK") == "1"


def mask(x: Any, of: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype] = (torch.bool,)) -> None:
    """A mask of scores of this shape: those given, or those of a query."""
    tensor(x, "mask", dtypes)
    require(x.device == of.device, "mask", lambda: f"device {of.device}", x.device)
    sizes = zip(reversed(x.shape), reversed(shape), strict=False)
    if x.dim() > len(shape) or not all(m in (1, s) for m, s in sizes):
        hint = _swapped(of.shape[-1] != shape[-1] and x.dim() > 1 and x.shape[-2] == of.shape[1] != 1, of, "query")
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(shape)}, got {tuple(x.shape)}{hint}")


def no_forward_mode(name: str, *arguments: Any) -> None:
    """Fused operators have no forward-mode derivative; without this check it would silently be zero."""
    if torch.compiler.is_compiling():
        return
    if torch.autograd.forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in arguments
    ):
        raise NotImplementedError(f"{name} has no forward-mode derivative; impl='reference' has")


def text_fits(text_mask: Tensor, image_mask: Tensor, num_pivots: int, cu_seqlens: Tensor | None) -> None:
    """Masks `[B, S]`, or `[total]` of sequences that are known to be right, if they can be read."""
    if _readable(text_mask) and (cu_seqlens is None or _readable(cu_seqlens)):
        require(
            not bool((text_mask & image_mask).any()),
            "image_mask",
            "no token that is also in text_mask",
            "one",
        )
        if cu_seqlens is None:
            texts, of = text_mask.sum(-1), "row"
        else:
            before = torch.nn.functional.pad(text_mask.cumsum(0), (1, 0))
            texts, of = before[cu_seqlens.long()].diff(), "sequence"
        most = int(texts.max())
        require(
            most <= num_pivots,
            "num_pivots",
            lambda: f"at least the {most} text tokens of the longest {of}",
            num_pivots,
        )


def together(**arguments: Any) -> None:
    """All given or none."""
    missing = [name for name, x in arguments.items() if x is None]
    if missing and len(missing) < len(arguments):
        raise ValueError(f"{missing[0]}: expected with {', '.join(n for n in arguments if n not in missing)}, got None")


def same_heads(x: Tensor, name: str, key: Tensor, key_name: str = "key") -> None:
    if x.shape[1] != key.shape[1]:
        hint = _swapped(x.shape[2] == key.shape[1], x, name)
        raise ValueError(f"{name}: expected {key_name}'s {key.shape[1]} heads, got {x.shape[1]}{hint}")


def grid_tokens(key: Tensor, key_name: str, grid: Any, name: str) -> None:
    """A grid that key's tokens fill."""
    grid = pair(grid, name)
    count = grid[0] * grid[1]
    if key.shape[2] != count:
        hint = _swapped(key.shape[1] == count, key, key_name)
        raise ValueError(f"{name}: expected {key_name}'s {key.shape[2]} tokens, got {grid}: {count}{hint}")


ANY_GRID = 2**31, 2**31  # one that is not known yet, in which every window fits


def local_window(grid: Any, kernel_size: Any, dilation: Any, raster_causal: Any = False, edge: Any = "clip") -> Window:
    """A window of `local_attention_2d`; one dilation may stand for both axes."""
    grid = pair(grid, "grid")
    if isinstance(dilation, (tuple, list)):
        dilation = pair(dilation, "dilation")
    else:
        dilation = (integer(dilation, "dilation", 1),) * 2
    kernel_size = window_size(kernel_size, "kernel_size", grid, dilation, edge)
    boolean(raster_causal, "raster_causal")
    rule = "'clip' with raster_causal, of whose keys a shifted window would have too few"
    require(not raster_causal or edge == "clip", "edge", rule, repr(edge))
    return Window(grid, kernel_size, dilation, raster_causal, edge)


def no_window(grid: Any, **others: Any) -> Window:
    """Of a `local_attention_2d` without a local set; `others`: what only that one has."""
    defaults = {"dilation": 1, "raster_causal": False, "edge": "clip"}
    for name, x in others.items():
        default = defaults.get(name)
        if name == "dilation" and x in ((1, 1), [1, 1]):
            continue
        if x is not default and not (default and x == default):
            raise ValueError(f"{name}: expected {default!r} where kernel_size is None, got {_of(x)}")
    return Window(pair(grid, "grid"), (0, 0))


def alone(query: Any, prefix_key: Any, coarse_key: Any, grid: tuple[int, int]) -> None:
    """The query of an attention without keys of its own; other checks see to the others."""
    tensor(query, "query", ndim=4)
    last_contiguous(query, "query")
    require(query.shape[3] >= 1, "query", "head_dim at least 1", query.shape[3])
    tokens(query, "query", grid[0] * grid[1], f"grid {grid}")
    others = "one, or prefix_key, where kernel_size is None"
    require(coarse_key is not None or prefix_key is not None, "coarse_key", others, None)


def _of(x: Any) -> str:
    return "a tensor" if isinstance(x, Tensor) else repr(x)


def window_size(
    kernel: Any, name: str, grid: tuple[int, int], dilation: tuple[int, int] = (1, 1), edge: str = "clip"
) -> tuple[int, int]:
    """No larger than a grid can use; shifted, no larger than the least of the grids it moves in."""
    kernel = pair(kernel, name)
    choice(edge, "edge", ("clip", "shift"))
    sizes = list(zip(grid, dilation, strict=True))
    most, why = tuple(2 * -(-n // d) - 1 for n, d in sizes), "2 * ceil(grid / dilation) - 1"
    if edge == "shift":
        if any(d > n for n, d in sizes):
            raise ValueError(f"dilation: expected at most the grid {grid} with edge 'shift', got {dilation}")
        most, why = tuple(n // d for n, d in sizes), "grid // dilation, with edge 'shift'"
    for k, limit in zip(kernel, most, strict=True):
        if k > limit:
            raise ValueError(f"{name}: expected at most {most} ({why}), got {kernel}")
    return kernel


def bias_table(x: Any, query: Tensor, window: Window) -> None:
    """Of the local set, by relative position."""
    tensor(x, "bias", ndim=3)
    same(x, "bias", query, "query", wider=True)
    shape(x, "bias", (query.shape[1], *(2 * k - 1 for k in window.kernel_size)))


def token_mask(x: Any, name: str, query: Tensor, count: int) -> None:
    """Of so many keys."""
    tensor(x, name, (torch.bool,))
    shape(x, name, (query.shape[0], count))
    same_device(x, name, query, "query")


def prefix(query: Tensor, keys: Tensor | None, key: Any, value: Any, mask: Any, bias: Any) -> Prefix | None:
    """The prefix of an attention with `keys` of its own."""
    bias = finite(bias, "prefix_bias", query.dtype)
    together(prefix_key=key, prefix_value=value)
    if key is None:
        require(mask is None, "prefix_mask", "prefix_key and prefix_value with it", "none")
        return None
    attention(query, key, value, "prefix_key", "prefix_value")
    if keys is not None:
        same_heads(key, "prefix_key", keys)
    if mask is not None:
        token_mask(mask, "prefix_mask", query, key.shape[2])
    return Prefix(key, value, mask, bias)


def coarse(
    query: Tensor, keys: dict[str, Any], image: Any, key: Any, value: Any, grid: Any, kernel_size: Any, bias: Any
) -> Coarse | None:
    """The coarse grid of an attention with other `keys`, of an image."""
    bias = finite(bias, "coarse_bias", query.dtype)
    together(coarse_key=key, coarse_value=value, coarse_grid=grid, coarse_kernel_size=kernel_size)
    if key is None:
        return None
    attention(query, key, value, "coarse_key", "coarse_value")
    for name, other in keys.items():
        if other is not None:
            same_heads(key, "coarse_key", other, name)
    grid_tokens(key, "coarse_key", grid, "coarse_grid")
    return Coarse(key, value, *coarse_window(image, grid, kernel_size), bias)


def coarse_window(image: Any, grid: Any, kernel_size: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    grid = pair(grid, "coarse_grid")
    kernel_size = window_size(kernel_size, "coarse_kernel_size", grid)
    divides = image[0] % grid[0] == 0 and image[1] % grid[1] == 0
    require(divides, "coarse_grid", lambda: f"a grid that divides {tuple(image)}", tuple(grid))
    return grid, kernel_size


def whole_sequence(lengths: Sequence[int], **tensors: Tensor) -> None:
    """Tensors `[B, H, S, D]` with the tokens of all parts, one after the other."""
    count = sum(lengths)
    for name, x in tensors.items():
        if x.shape[2] != count:
            tokens(x, name, count, " + ".join(map(str, lengths)))


def text_mask(x: Any, query: Tensor, text_len: int) -> None:
    if x is not None:
        token_mask(x, "text_mask", query, text_len)


def new_tokens(x: Any, lengths: Tensor, given: int) -> None:
    """How many of the tokens given to a cache count, for each sample."""
    tensor(x, "new_tokens", INTEGERS, ndim=1)
    same_device(x, "new_tokens", lengths, "the cache")
    shape(x, "new_tokens", lengths.shape)
    if _readable(x):
        require(
            bool(((x >= 0) & (x <= given)).all()), "new_tokens", lambda: f"counts from 0 to {given}", lambda: _range(x)
        )


def room(lengths: Tensor, given: int, capacity: int) -> None:
    if _readable(lengths):
        left = capacity - int(lengths.max())
        require(given <= left, "key", lambda: f"at most {left} more tokens in a cache of {capacity}", given)


def appended(x: Tensor, name: str, expected: tuple[int, int, int, int]) -> None:
    """New tokens `[B, H, S, D]` for a cache."""
    if tuple(x.shape) != expected:
        batch, heads, _, dim = expected
        hint = _swapped(tuple(x.shape) == (batch, x.shape[1], heads, dim), x, name)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}{hint}")


def lse(x: Tensor, name: str, out: Tensor) -> None:
    if x.shape != out.shape[:-1]:
        hint = _swapped(x.dim() == 3 and out.dim() == 4 and x.mT.shape == out.shape[:-1], out, "its output")
        raise ValueError(f"{name}: expected shape {tuple(out.shape[:-1])}, got {tuple(x.shape)}{hint}")
