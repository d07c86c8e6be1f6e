"""What runs in place of norms and steps: the fused operator wherever it computes the same, else the model's modules.

Everything is asked anew at every call. A norm that hooks hang on, or that has been wrapped, replaced, offloaded or given
another dtype in the meantime, is called as the model would call it.
"""

import copyreg
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn

from cogview_ops import _registration, layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm

from .formula import Formula

HALVES = torch.bfloat16, torch.float16
DTYPES = torch.float32, *HALVES  # in which formulas have been looked at


class Fused(type):
    """The type of the classes that are put in place of a model's, each a subclass of the one that it replaces."""

    original: type
    itself: type  # not what is derived from it later (by FSDP, by parametrizations)
    formula: Formula  # of norms
    impl: str


# pickled, a fused module is what it was before
copyreg.pickle(Fused, lambda cls: (_identity, (cls.original,)) if cls.itself is cls else cls.__qualname__)


def _identity(cls: type) -> type:
    return cls


def fused_class(original: type, forward: Callable[..., Any], **members: Any) -> type:
    named = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    cls = Fused(original.__name__, (original,), {**named, "forward": forward, "original": original, **members})
    cls.itself = cls
    return cls


def fused_norm(original: Any, formula: Formula, impl: str) -> type:
    own = original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = normed(args[0], self) if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        return own(self, *args, **kwargs) if out is None else out

    return fused_class(original, forward, formula=formula, impl=impl)


def known(module: Any) -> Formula | None:
    """The formula of a fused norm, if nobody wants to know of its being called."""
    cls: Any = type(module)
    return cls.formula if getattr(cls, "itself", None) is cls and not watched(module) else None


def watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def joined(post: Any, pre: Any) -> bool:
    """Whether one call can do both norms."""
    f, g = type(post).formula, type(pre).formula
    same = (f.kind, f.weight_offset, f.round_before_weight) == (g.kind, g.weight_offset, g.round_before_weight)
    return same and getattr(post, f.eps) == getattr(pre, g.eps)


def normed(x: Tensor, norm: Any) -> Tensor | None:
    """A fused norm of x; None where that would not be what its module computes."""
    f: Formula = type(norm).formula
    autocast = _registration.autocast_dtype(x) is not None
    if autocast and f.widens and x.dtype in HALVES:
        x = x.float()
    if not _keeps(norm, x):
        return None
    if not autocast:
        return _norm(x, norm, f)
    with torch.autocast(x.device.type, enabled=False):  # it would give its own dtype
        return _norm(x, norm, f)


def _norm(x: Tensor, norm: Any, f: Formula) -> Tensor:
    weight, bias = _parameters(norm)
    eps, impl = getattr(norm, f.eps), type(norm).impl
    if f.kind == "layer":
        return layer_norm(x, weight, bias, eps=eps, relax=None, weight_offset=f.weight_offset, impl=impl)
    rounds = f.round_before_weight
    return rms_norm(x, weight, eps=eps, weight_offset=f.weight_offset, round_before_weight=rounds, impl=impl)


def add(a: Tensor, b: Tensor, *, post: Any, at: int, between: Any = None, scales: Set[type] = frozenset()) -> Tensor:
    """`a + between(post(b))`; with at=0 of a. `scales` are modules like drop-path, which scale whole samples."""
    branch, residual = (a, b) if at == 0 else (b, a)
    if known(post) and _adds(post, branch, residual):
        options = _options(between, branch, scales)
        if options is not None:
            return _step(branch, residual, post, None, options)
    out = post(branch)
    if isinstance(between, nn.Module):
        out = between(out)
    elif between is not None:
        out = out * between
    return out + residual if at == 0 else residual + out


def add_norm(
    a: Tensor,
    b: Tensor,
    *,
    pre: Any,
    post: Any = None,
    at: int = 1,
    between: Any = None,
    scales: Set[type] = frozenset(),
) -> tuple[Tensor, Tensor]:
    """The same, without `post` of a and b themselves, and `pre` of it."""
    branch, residual = (a, b) if at == 0 else (b, a)
    fits = known(pre) and _alike(a, b) and _keeps(pre, a)
    if fits and post is None:
        return _step(branch, residual, None, pre, {})
    if fits and known(post) and joined(post, pre) and _keeps(post, branch):
        options = _options(between, branch, scales)
        if options is not None:
            return _step(branch, residual, post, pre, options)
    h = a + b if post is None else add(a, b, post=post, at=at, between=between, scales=scales)
    return h, pre(h)


def _step(branch: Tensor, residual: Tensor, post: Any, pre: Any, options: dict[str, Any]) -> Any:
    norm = pre if post is None else post
    f = type(norm).formula
    options |= {"norms": "pre" if post is None else "post" if pre is None else "both", "impl": type(norm).impl}
    options |= {"eps": getattr(norm, f.eps), "weight_offset": f.weight_offset}
    weights = [*_parameters(post), *_parameters(pre)]
    if f.kind == "layer":
        return sandwich_layer_norm(branch, residual, *weights, relax=None, **options)
    return sandwich_rms_norm(branch, residual, *weights[::2], round_before_weight=f.round_before_weight, **options)


def _options(between: Any, branch: Tensor, scales: Set[type]) -> dict[str, Any] | None:
    """What is between norm and sum as options of the step; None of what cannot be."""
    if between is None or (type(between) is nn.Identity and not watched(between)):
        return {}
    if isinstance(between, int | float):
        return {"branch_scale": float(between)}
    if not isinstance(between, nn.Module) or watched(between):
        return None
    if type(between) in scales:
        if not between.training:
            return {}
        one = torch.ones(branch.shape[:1] + (1,) * (branch.dim() - 1), device=branch.device)
        return {"branch_scale": between(one)}  # its own numbers, drawn as it draws them
    if type(between) is not nn.Dropout:
        return None
    if not between.training or between.p == 0:
        return {}
    seed = torch.randint(2**63 - 1, (), device=branch.device)
    return {"dropout_p": between.p, "dropout_after_norm": True, "seed": seed}


def _parameters(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    f = type(norm).formula
    return (f.weight and getattr(norm, f.weight)), (f.bias and getattr(norm, f.bias))


def _rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1)


def _alike(a: Any, b: Any) -> bool:
    return _rows(a) and _rows(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _reads(norm: Any, x: Tensor) -> bool:
    """Whether the operator takes such an x with the weights that are there."""
    weights = [w for w in _parameters(norm) if w is not None]
    alike = all(w.shape == x.shape[-1:] and w.device == x.device and w.dtype == weights[0].dtype for w in weights)
    return x.dtype in DTYPES and _rows(x) and alike and (not weights or weights[0].dtype in (x.dtype, torch.float32))


def _keeps(norm: Any, x: Tensor) -> bool:
    """And whether the module gives it back in its dtype."""
    if not _reads(norm, x):
        return False
    f = type(norm).formula
    if x.dtype in HALVES and _registration.autocast_dtype(x) is not None:
        return not (f.widens or (f.native and x.device.type != "cpu"))
    weight = _parameters(norm)[0]
    return weight is None or weight.dtype == x.dtype or f.keeps_dtype


def _adds(post: Any, branch: Tensor, residual: Tensor) -> bool:
    """Whether the sum has the residual's dtype, whatever of the two the norm gives."""
    if _alike(branch, residual):
        return _keeps(post, branch)
    wider = residual.dtype == torch.float32 and branch.dtype in HALVES
    return wider and branch.shape == residual.shape and _rows(residual) and _reads(post, branch)
