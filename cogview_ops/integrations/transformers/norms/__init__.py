"""`fuse_norms`: the norm steps of a transformer's layers by the fused operators, found by structure.

    report = fuse_norms(model)
    print(report)  # which steps and norms, and what was left and why
    report.undo()

A norm is recognised by what it computes (formula.py), a step by the source of its layer's forward (rewrite.py),
whatever their names are. What is found gets a class derived from its own, of the same name, with another `forward`
(steps.py): parameters, hooks, names and `state_dict` stay what they are.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

from torch import nn

from .... import _checks, _dispatch
from .formula import Formula, recognise, scales_samples
from .rewrite import Sum, rewrite
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
    """Replace the norm steps of a model by `sandwich_rms_norm` or `sandwich_layer_norm`, its other norms by `rms_norm`
    or `layer_norm`, in place.

    A step is a residual sum with the norm of its branch, or the norm that is taken of it, or both, in one layer: the
    sum at a layer's end and the next layer's norm are two calls. What a norm computes is measured, to the rounding, and
    what a layer does is read from the source that it runs; where either is not known exactly, it is left. A fused norm
    is called as a module where it has hooks or has been wrapped, and is the model's own in float64.
    A forward that is put into a class afterwards has no effect on what is fused: patch first, or fuse again.

    Results are those of the model up to rounding. Dropout and drop-path between a post-norm and the sum are part of the
    step; dropout draws from a seed out of torch's generator. What differentiates twice takes impl="reference".

    Args:
        model: of transformers or of one's own, or a part of one; with FSDP, before or after it is sharded.
        impl: as of the operators.

    Returns:
        What was replaced, and what was left and why; `undo()` gives the model back as it was. A model in which nothing
        is known stays as it is.
    """
    _checks.choice(impl, "impl", _dispatch.IMPLS)
    unfuse_norms(model)
    report, modules = FusedNorms(model), dict(model.named_modules())
    norms: dict[nn.Module, type] = {}
    formulas: dict[Any, Any] = {}
    norm_class: Any = cache(partial(fused_norm, impl=impl))
    for name, module in modules.items():
        kind = _kind(module)
        if kind not in formulas:
            formulas[kind] = recognise(module)
        formula = formulas[kind]
        if isinstance(formula, Formula):
            try:
                norms[module] = norm_class(type(module), formula)
            except Unknown as unknown:
                report.left[name] = str(unknown)
        elif formula:
            report.left[name] = formula

    layers: dict[type, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if any(child in norms for child in module._modules.values()):
            if "forward" in vars(module):
                report.left[name] = "its forward has been replaced"
            else:
                layers[type(module)].append(name)
    planned = dict(norms)
    found: dict[str, list[Sum]] = {}
    for cls, names in layers.items():
        instances = [modules[name] for name in names]
        try:
            forward, sums = _rewritten(cls, instances, norms)
            if any(x.runs_in(layer) for x in sums if x.post or x.pre for layer in instances):
                planned |= dict.fromkeys(instances, fused_class(cls, forward))
        except Unknown as unknown:
            report.left |= dict.fromkeys(names, str(unknown))
            continue
        found |= dict.fromkeys(names, sums)
    for module, cls in planned.items():
        module.__class__ = cls
    _describe(report, modules, norms, found)
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


def _rewritten(cls: type, instances: list[nn.Module], norms: dict[nn.Module, type]) -> tuple[Any, list[Sum]]:
    """The forward of these layers with fused steps, and their sums."""
    children: dict[str, list[nn.Module | None]] = defaultdict(list)
    for module in instances:
        for name, child in module._modules.items():
            children[name].append(child)
    named = {name for name, modules in children.items() if any(child in norms for child in modules)}
    others = {type(child): child for name in children.keys() - named for child in children[name] if child is not None}
    scales = frozenset(kind for kind, child in others.items() if scales_samples(child))
    idle = {nn.Identity, nn.Dropout, *scales}
    between = {name for name, modules in children.items() if all(type(child) in idle for child in modules)}
    forward = cls.forward  # type: ignore[attr-defined]
    steps = partial(add, scales=scales), partial(add_norm, scales=scales)
    return rewrite(forward, set(children), named, between, *steps)


def _describe(
    report: FusedNorms, modules: dict[str, Any], norms: Iterable[nn.Module], found: dict[str, list[Sum]]
) -> None:
    """What runs at a call, as the modules are now."""
    in_steps = set()
    for layer, sums in found.items():
        here = [x for x in sums if x.runs_in(modules[layer])]
        lines: set[int] = set()
        steps: dict[FusedStep, None] = {}  # each once, where it has several places
        for x in here:
            post, pre = (getattr(modules[layer], name, None) if name else None for name in (x.post, x.pre))
            first, last = known(post), known(pre)
            post = post if first else None
            pre = pre if last and not (first and not joined(first, last)) else None  # else by itself
            if post or pre:
                kind = "both" if post and pre else "post" if post else "pre"
                steps[FusedStep(layer, kind, x.post if post else None, x.pre if pre else None)] = None
                in_steps |= {post, pre}
                lines.add(x.line)
        report.steps += steps
        if rest := [f"`{x.text}` has no norm beside it" for x in here if x.text and x.line not in lines]:
            report.left[layer] = "; ".join(dict.fromkeys(rest))
    for name, module in modules.items():
        if module in norms and module not in in_steps:
            report.norms[name] = type(module).formula
        if module in norms and watched(module):
            report.left[name] = "it has hooks, so that it is in no step"


def _counted(lines: Iterable[str]) -> list[str]:
    counts = Counter(re.sub(r"(?<![^.])\d+(?=[.:])", "*", line) for line in lines)
    return [f"  {count} x {line}" for line, count in counts.items()]
