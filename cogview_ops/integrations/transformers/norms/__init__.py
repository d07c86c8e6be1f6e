"""`fuse_norms`: the norm steps of a transformer's layers by the fused operators, found by structure.

    report = fuse_norms(model)
    print(report)  # which steps and norms, and what was left and why
    report.undo()

A norm is recognised by what it computes (formula.py), a step by the source of its layer's forward (rewrite.py), whatever
their names are. What is found gets a class derived from its own, of the same name, with another `forward` (steps.py):
parameters, hooks, names and `state_dict` stay what they are.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from torch import nn

from cogview_ops import _checks, _dispatch

from .formula import Formula, recognise, scales_samples
from .rewrite import Step, rewrite
from .source import Unknown
from .steps import Fused, add, add_norm, fused_class, fused_norm, joined, known, watched

__all__ = ["FusedNorms", "fuse_norms", "unfuse_norms"]


class FusedStep(NamedTuple):
    """A step of a layer, with `norms` as of `sandwich_rms_norm`, and its norms' names."""

    layer: str
    norms: str
    post: str | None
    pre: str | None

    def __str__(self) -> str:
        post = f"{self.post}(branch)" if self.post else "branch"
        return f"{self.layer}: residual + {post}{f', {self.pre}' if self.pre else ''}"


@dataclass
class FusedNorms:
    """What `fuse_norms` has done to a model."""

    model: nn.Module = field(repr=False)
    steps: list[FusedStep] = field(default_factory=list)
    norms: dict[str, Formula] = field(default_factory=dict)  # those that are in no step, by their modules' names
    left: dict[str, str] = field(default_factory=dict)  # why a norm or a residual sum is the model's own still

    def undo(self) -> None:
        unfuse_norms(self.model)

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.steps)} steps and {len(self.norms)} other norms are fused"]
        lines += _counted(map(str, self.steps))
        lines += _counted(f"{name}: {formula}" for name, formula in self.norms.items())
        left = _counted(f"{name}: {why}" for name, why in self.left.items())
        return "\n".join([*lines, *(["left:", *left] if left else [])])


def fuse_norms(model: nn.Module, *, impl: str = "auto") -> FusedNorms:
    """Replace the norm steps of `model` by `sandwich_rms_norm` or `sandwich_layer_norm`, its other norms by `rms_norm` or
    `layer_norm`, in place.

    A step is a residual sum with the norm of its branch, or with the norm that is taken of it, or with both, in one
    layer: the sum at a layer's end and the next layer's norm are two calls. What a norm computes is measured, to the
    rounding, and what a layer does is read from the source that it runs; where either is not known exactly, it is left.
    At run time a fused norm is still called as a module if it has hooks or has been wrapped, as are all in float64.

    Results are those of the model up to rounding. Dropout and drop-path between a post-norm and the sum are part of the
    step: dropout draws its numbers from a seed out of torch's generator. A model of which nothing is known is unchanged.

    Args:
        model: a model, or a part of one, of transformers or of one's own; for FSDP, before or after it is sharded.
        impl: as of the operators.
    """
    _checks.choice(impl, "impl", _dispatch.IMPLS)
    unfuse_norms(model)
    report, modules = FusedNorms(model), dict(model.named_modules())
    norms: dict[nn.Module, type] = {}
    formulas: dict[Any, Any] = {}
    norm_class = cache(partial(fused_norm, impl=impl))
    for name, module in modules.items():
        kind = _kind(module)
        if kind not in formulas:
            formulas[kind] = recognise(module)
        found = formulas[kind]
        if isinstance(found, Formula):
            norms[module] = norm_class(type(module), found)
        elif found:
            report.left[name] = found

    layers: dict[type, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if any(child in norms for child in module._modules.values()):
            layers[type(module)].append(name)
    planned = dict(norms)
    found_steps: dict[str, list[Step]] = {}
    for cls, names in layers.items():
        instances = [modules[name] for name in names]
        try:
            forward, steps, sums = _rewritten(cls, instances, norms)
        except Unknown as unknown:
            report.left |= dict.fromkeys(names, str(unknown))
            continue
        if steps:
            planned |= dict.fromkeys(instances, fused_class(cls, forward))
            found_steps |= dict.fromkeys(names, steps)
        if sums:
            report.left |= dict.fromkeys(names, "; ".join(f"`{total}` has no norm beside it" for total in sums))
    for module, cls in planned.items():
        module.__class__ = cls
    _describe(report, modules, norms, found_steps)
    return report


def unfuse_norms(model: nn.Module) -> None:
    """Give every module of `model` its own class back."""
    fused = {name: module for name, module in model.named_modules() if isinstance(type(module), Fused)}
    for name, module in fused.items():
        cls: Any = type(module)
        if cls.itself is not cls:
            raise RuntimeError(f"{name}: its class has been replaced since by {cls}; undo that first")
    for module in fused.values():
        module.__class__ = type(module).original  # type: ignore[attr-defined]


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Modules of one kind compute the same with the same parameters."""
    plain = bool, int, float, str, tuple, type(None)
    own = [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    state = tuple((name, repr(value) if isinstance(value, plain) else id(value)) for name, value in own)
    parameters = tuple((name, None if p is None else p.shape) for name, p in module._parameters.items())
    return type(module), state, parameters, bool(module._modules), bool(module._buffers)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _rewritten(cls: Any, instances: list[nn.Module], norms: dict[nn.Module, type]) -> tuple[Any, list[Step], list[str]]:
    """The forward of these layers with fused steps, the steps, and sums that are in none."""
    if type(cls) is not type:
        raise Unknown("its class has a metaclass")
    children: dict[str, list[nn.Module | None]] = defaultdict(list)
    for module in instances:
        for name, child in module._modules.items():
            children[name].append(child)
    named = {name for name, modules in children.items() if any(child in norms for child in modules)}
    rest = [child for name in children.keys() - named for child in children[name] if child is not None]
    scales = frozenset(type(child) for child in {type(child): child for child in rest}.values() if scales_samples(child))
    idle = {nn.Identity, nn.Dropout, *scales}
    between = {name for name, modules in children.items() if all(type(child) in idle for child in modules)}
    return rewrite(cls.forward, named, between, partial(add, scales=scales), partial(add_norm, scales=scales))


def _describe(
    report: FusedNorms, modules: dict[str, Any], norms: Iterable[nn.Module], found: dict[str, list[Step]]
) -> None:
    """What runs at a call, as the modules are now."""
    in_steps = set()
    for layer, steps in found.items():
        for post, pre in steps:
            a, b = (getattr(modules[layer], name, None) if name else None for name in (post, pre))
            a, b = (norm if known(norm) else None for norm in (a, b))
            if a and b and not joined(a, b):
                b = None  # two calls
            if a or b:
                kind = "both" if a and b else "post" if a else "pre"
                report.steps.append(FusedStep(layer, kind, post if a else None, pre if b else None))
                in_steps |= {a, b}
    for name, module in modules.items():
        if module in norms and watched(module):
            report.left[name] = "it has hooks"
        elif module in norms and module not in in_steps:
            report.norms[name] = type(module).formula


def _counted(lines: Iterable[str]) -> list[str]:
    counts = Counter(re.sub(r"\.\d+(?=[.:])", ".*", line) for line in lines)
    return [f"  {count} x {line}" for line, count in counts.items()]
