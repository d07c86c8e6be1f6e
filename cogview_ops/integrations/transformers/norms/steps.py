"""What runs in place of norms and steps: the fused operator wherever it computes the same, else the model's modules.

Everything is asked anew at every call. A norm that hooks hang on, or that has been wrapped, replaced, offloaded or
given another dtype in the meantime, is called as the model would call it.
"""

import copyreg
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .... import _registration, layer_norm, rms_norm, sandwich_layer_norm, sandwich_rms_norm
from .formula import Formula
from .source import Unknown

HALVES = torch.bfloat16, torch.float16
DTYPES = torch.float32, *HALVES  # in which formulas have been looked at


def _identity(cls: Any) -> Any:
    return cls


class Fused(type):
    """The type of the classes that are put in place of a model's, each a subclass of the one that it replaces."""

    original: type
    itself: type  # not what is derived from it later (by FSDP, by parametrizations)
    formula: Formula  # of norms
    impl: str


# pickled, a fused module is what it was before
copyreg.pickle(Fused, lambda cls: (_identity, (cls.original,)) if cls.itself is cls else cls.__qualname__)  # type: ignore


def fused_class(original: type, forward: Callable[..., Any], **members: Any) -> type:
    if type(original) is not type:
        raise Unknown("its class has a metaclass")
    named = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        cls = Fused(original.__name__, (original,), {**named, "forward": forward, "original": original, **members})
    except Exception as error:  # of an __init_subclass__
        raise Unknown(f"its class cannot be derived from: {type(error).__name__}") from error
    cls.itself = cls
    return cls


def fused_norm(original: Any, formula: Formula, impl: str) -> type:
    own = original.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        fused = hasattr(type(self), "formula")  # not undone since, with this forward held by a wrapper
        out = normed(args[0], read(self)) if alone and fused else None
        return own(self, *args, **kwargs) if out is None else out

    return fused_class(original, forward, formula=formula, impl=impl)


class Norm(NamedTuple):
    """What a norm is at a call."""

    formula: Formula
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    impl: str

    def keeps(self, x: Tensor) -> bool:
        """Whether the operator takes such an x, and the module would give it back in its dtype."""
        if not self.reads(x):
            return False
        f, weight = self.formula, self.weight
        if x.dtype in HALVES and _registration.autocast_dtype(x) is not None:
            return not (f.widens or (f.native and x.device.type != "cpu"))
        return weight is None or weight.dtype == x.dtype or f.keeps_dtype

    def reads(self, x: Tensor) -> bool:
        weight, bias = self.weight, self.bias
        if x.dtype not in DTYPES or not _rows(x):
            return False
        if weight is None:
            return True
        fits = weight.shape == x.shape[-1:] and weight.dtype in (x.dtype, torch.float32)
        return fits and (bias is None or bias.dtype == weight.dtype)


def read(module: Any) -> Norm:
    cls: Any = type(module)
    f: Formula = cls.formula
    weight = None if f.weight is None else getattr(module, f.weight)
    return Norm(f, weight, None if f.bias is None else getattr(module, f.bias), getattr(module, f.eps), cls.impl)


def known(module: Any) -> Norm | None:
    """A fused norm, if nobody wants to know of its being called."""
    cls: Any = type(module)
    return read(module) if getattr(cls, "itself", None) is cls and not watched(module) else None


def watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module) or _has_any_global_hook()


def joined(post: Norm, pre: Norm) -> bool:
    """Whether one call can do both."""
    f, g = post.formula, pre.formula
    same = (f.kind, f.weight_offset, f.round_before_weight) == (g.kind, g.weight_offset, g.round_before_weight)
    return same and post.eps == pre.eps


def normed(x: Tensor, norm: Norm) -> Tensor | None:
    """The norm of x; None where the operator's would not be what the module computes."""
    autocast = _registration.autocast_dtype(x) is not None
    if autocast and norm.formula.widens and x.dtype in HALVES:
        x = x.float()
    if not norm.keeps(x):
        return None
    if not autocast:
        return _normed(x, norm)
    with torch.autocast(x.device.type, enabled=False):  # where the operator would give another dtype
        return _normed(x, norm)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    f, weight, bias, eps, impl = norm
    if f.kind == "layer":
        return layer_norm(x, weight, bias, eps=eps, relax=None, weight_offset=f.weight_offset, impl=impl)
    rounds = f.round_before_weight
    return rms_norm(x, weight, eps=eps, weight_offset=f.weight_offset, round_before_weight=rounds, impl=impl)


def add(a: Tensor, b: Tensor, *, post: Any, at: int, between: Any = None, scales: Set[type] = frozenset()) -> Tensor:
    """`a + between(post(b))`; with at=0 of a. `scales` are modules like drop-path, which scale whole samples."""
    branch, residual = (a, b) if at == 0 else (b, a)
    norm = known(post)
    if norm and _adds(norm, branch, residual):
        options = _options(between, branch, scales)
        if options is not None:
            return _step(branch, residual, norm, None, options)
    out = _by_modules(post, between, branch)
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
    first, last = None if post is None else known(post), known(pre)
    if post is not None and first is None:
        a, b = (_by_modules(post, between, a), b) if at == 0 else (a, _by_modules(post, between, b))
        post = None
    branch, residual = (a, b) if at == 0 else (b, a)
    if last and _alike(a, b) and last.keeps(a):
        if first is None:
            return _step(branch, residual, None, last, {})
        options = _options(between, branch, scales) if joined(first, last) and first.keeps(branch) else None
        if options is not None:
            return _step(branch, residual, first, last, options)
    h = a + b if post is None else add(a, b, post=post, at=at, between=between, scales=scales)
    return h, pre(h)


def _by_modules(post: Any, between: Any, branch: Tensor) -> Tensor:
    out = post(branch)
    if isinstance(between, nn.Module):
        return between(out)
    return out if between is None else out * between


def _step(branch: Tensor, residual: Tensor, post: Norm | None, pre: Norm | None, options: dict[str, Any]) -> Any:
    one: Any = post or pre
    f, post_weight, post_bias, eps, impl = one
    pre_weight, pre_bias = pre[1:3] if pre else (None, None)
    if post is None:
        post_weight = post_bias = None
    options |= {"norms": "pre" if post is None else "post" if pre is None else "both", "impl": impl}
    options |= {"eps": eps, "weight_offset": f.weight_offset}
    if f.kind == "rms":
        rounds = f.round_before_weight
        return sandwich_rms_norm(branch, residual, post_weight, pre_weight, round_before_weight=rounds, **options)
    weights = post_weight, post_bias, pre_weight, pre_bias
    return sandwich_layer_norm(branch, residual, *weights, relax=None, **options)


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


def _rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1)


def _alike(a: Any, b: Any) -> bool:
    return _rows(a) and _rows(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _adds(post: Norm, branch: Tensor, residual: Tensor) -> bool:
    """Whether the sum has the residual's dtype, whichever of the two the norm gives."""
    if _alike(branch, residual):
        return post.keeps(branch)
    if not (_rows(branch) and _rows(residual) and branch.shape == residual.shape):
        return False
    return residual.dtype == torch.float32 and branch.dtype in HALVES and post.reads(branch)
