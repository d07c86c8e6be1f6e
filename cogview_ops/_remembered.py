"""What has passed its checks passes again: of a small call they would be the larger part."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

MOST = 4096  # kinds of calls that are remembered; then all is forgotten
PLAIN = {bool, float, int, str, torch.dtype, type(None)}
P = ParamSpec("P")
R = TypeVar("R")


def remembered(check: Callable[P, R]) -> Callable[P, R]:
    """`check`, not asked again about what it has let pass: tensors of the same dtype, shape, strides and device, and
    other arguments of the same types and values. It must depend on nothing else, and keep no tensor in its result.
    It is always asked in graphs and traces, whose sizes are symbols or tensors, and about arguments of other types."""
    passed: dict[Any, tuple[R]] = {}

    @wraps(check)
    def ask(*args: P.args, **no: P.kwargs) -> R:
        if no or torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return check(*args, **no)
        try:
            values = [
                (x.dtype, x.shape, x.stride(), x.device) if type(x) is Tensor else x if type(x) in PLAIN else _kind(x)
                for x in args
            ]
            kind = (*map(type, args), *values)  # 1 equals 1.0 and True
            known = passed.get(kind)
        except TypeError:  # of another type, or a symbolic size, which has no hash
            return check(*args, **no)
        if known:
            return known[0]
        result = check(*args, **no)
        if len(passed) >= MOST:
            passed.clear()
        passed[kind] = (result,)
        return result

    return ask


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.stride(), x.device
    if isinstance(x, tuple) and all(type(i) in PLAIN for i in x):
        return (*map(type, x), *x)
    raise TypeError(f"{type(x)} may equal, or change to, what is none of its kind")
