"""What a norm module computes, found by running it: names do not say (GLM's `post_attention_layernorm` is a pre-norm).

A copy of the module with random weights is run on rows of every magnitude in three dtypes, in several shapes, in
training and evaluation, with its gradients. What it gives must be a formula of the operators, roundings included.
"""

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .source import Unknown

HOLDERS = list, dict, set
EXACT = 4e-6  # what float32 is trusted to; any two formulas differ by more


class Formula(NamedTuple):
    """`N(x) * (weight + weight_offset) + bias` over the last dimension."""

    kind: str  # "rms" or "layer"
    weight: str | None  # names of the module's parameters
    bias: str | None
    eps: str  # name of its attribute
    weight_offset: float
    round_before_weight: bool
    keeps_dtype: bool = False  # float32 weights leave a 16-bit input its dtype
    widens: bool = False  # under autocast they make float32 of it (on a CPU)
    native: bool = False  # torch's own function, which autocast treats differently on every device

    def __str__(self) -> str:
        weight = "" if self.weight is None else " * (1 + w)" if self.weight_offset else " * w"
        x = "x^.to(dtype)" if self.round_before_weight else "x^"
        return f"{'RMSNorm' if self.kind == 'rms' else 'LayerNorm'}, {x}{weight}{' + b' if self.bias else ''}"


def recognise(module: nn.Module) -> Formula | str | None:
    """The formula of a norm module; or why it has none; None of what is no norm at all."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            found = _looked_at(module)
    except Unknown as unknown:
        found = str(unknown)
    except Exception as error:  # other people's code: whatever it raises, it is no norm of rows
        found = f"its forward raises {type(error).__name__}"
    return found if isinstance(found, Formula) or "norm" in type(module).__name__.lower() else None


def _looked_at(module: nn.Module) -> Formula | str | None:
    parameters = dict(module.named_parameters(recurse=False))
    shapes = {tuple(p.shape) for p in parameters.values()}
    eps = [name for name, value in vars(module).items() if type(value) is float and 0 < value < 0.1]
    of_rows = len(parameters) <= 2 and len(shapes) <= 1 and all(len(shape) == 1 for shape in shapes)
    if list(module.children()):
        return None
    if list(module.buffers(recurse=False)) or not of_rows:
        return "it has more than a weight and a bias of the last dimension"
    if not eps:
        return "it has no number that could be eps"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if type(module).__call__ is not nn.Module.__call__:
        return "it is called in a way of its own"
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return "its forward takes more than the input"
    width = shapes.pop()[0] if shapes else getattr(module, "normalized_shape", (64,))[-1]
    return _probe(module, list(parameters), width, eps)


def _probe(module: nn.Module, names: list[str], width: int, eps: list[str]) -> Formula | str:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).bfloat16().float()  # exact in 16 bits too

    weights = {name: normal(width) for name in names}
    # rows with a mean, with an outlier, large, as small as eps, zero, as they are
    scale = torch.tensor([1, 1, 64, *[getattr(module, name) ** 0.5 for name in eps], 0, *[1] * (1 + 512 // width)])
    x = normal(len(scale), width) * scale[:, None]
    x[0] += 2
    x[1, 0] = 100

    fits = list(_candidates(names, eps))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = x.to(dtype), _cast(weights, dtype)
        out = _run(module, *rounded)
        if out.shape != x.shape or out.dtype != dtype:
            return f"it gives {out.dtype}, shape {tuple(out.shape)} for {dtype}, shape {tuple(x.shape)}"
        fits = [f for f in fits if _equal(out, f, getattr(module, f.eps), *rounded)]
        if not fits:
            return f"it computes no formula that is known, in {dtype}"
    if len(fits) > 1:
        return "it may be more than one formula"
    (found,) = fits

    plain = _run(module, x, weights)
    for shape in ((1, -1, width), (-1, 1, 1, width)):
        if not torch.allclose(_run(module, x.view(shape), weights), plain.view(shape), EXACT, EXACT):
            return "its rows depend on the shape"
    if not torch.equal(_run(module, x, weights, training=not module.training), plain):
        return "it is another in training"
    if not _same_gradients(found, module, x, weights):
        return "its gradients are not those of its formula"
    low = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), _Called() as called:
        widens = _run(module, low, weights).dtype == torch.float32
    native = bool(called.names & {"layer_norm", "rms_norm"})
    return found._replace(keeps_dtype=_keeps_dtype(found, module, low, weights), widens=widens, native=native)


def _candidates(names: list[str], eps: list[str]) -> Iterator[Formula]:
    """Every formula that these parameters and this eps could be of."""
    roles = list(itertools.permutations(names)) if len(names) == 2 else [(name, None) for name in (*names, None)]
    for kind, name, (weight, bias) in itertools.product(("rms", "layer"), eps, roles):
        offsets = (0.0,) if weight is None else (0.0, 1.0)
        for offset, rounds in itertools.product(offsets, (False, True) if kind == "rms" and weight else (False,)):
            yield Formula(kind, weight, bias, name, offset, rounds)


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.to(dtype) for name, weight in weights.items()}


def _run(module: nn.Module, x: Tensor, weights: dict[str, Tensor], **state: Any) -> Tensor:
    """The module's forward, without what hangs on it, with these weights in place of its own."""
    probe = copy.copy(module)
    vars(probe).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, HOLDERS)})
    vars(probe).update(state, _parameters={**module._parameters, **weights})
    before = _attributes(probe)
    out = type(module).forward(probe, x)
    if _attributes(probe) != before:
        raise Unknown("its forward changes its attributes")
    return out


def _attributes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which they are, and how much is in them."""
    own = vars(module).items()
    return {name: (id(value), len(value) if isinstance(value, HOLDERS) else 0) for name, value in own}


def _value(
    f: Formula, eps: float, x: Tensor, weights: dict[str, Tensor], dtype: torch.dtype, nudge: float = 0
) -> tuple[Tensor, Tensor]:
    """f of x in float64, and how large its terms are. What f rounds to `dtype` before its end is moved by `nudge`."""
    x = x.double()
    if f.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if f.round_before_weight:
        x = (x * (1 + nudge)).to(dtype).double()
    size = x.abs() + (f.kind == "layer")  # the mean is as inexact as what it is subtracted from
    if f.weight is not None:
        weight = weights[f.weight].double() + f.weight_offset
        x, size = x * weight, size * weight.abs()
    if f.bias is not None:
        bias = weights[f.bias].double()
        x, size = x + bias, size + bias.abs()
    return x, size


def _equal(out: Tensor, f: Formula, eps: float, x: Tensor, weights: dict[str, Tensor]) -> bool:
    """float32 within its error; 16 bits bit for bit, but where float32's error decides how they are rounded."""
    hit = torch.zeros_like(out, dtype=torch.bool)
    for nudge in (0, -EXACT, EXACT) if f.round_before_weight else (0,):
        exact, size = _value(f, eps, x, weights, out.dtype, nudge)
        hit |= ((exact - EXACT * size).to(out.dtype) <= out) & (out <= (exact + EXACT * size).to(out.dtype))
    return bool(hit.all())


def _same_gradients(f: Formula, module: nn.Module, x: Tensor, weights: dict[str, Tensor]) -> bool:
    toward = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    inputs = [t.clone().requires_grad_() for t in (x, *weights.values())]
    out = _run(module, inputs[0], dict(zip(weights, inputs[1:], strict=True)))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    value, _ = _value(f, getattr(module, f.eps), exact[0], dict(zip(weights, exact[1:], strict=True)), torch.float64)
    grads = zip(
        torch.autograd.grad(out, inputs, toward),
        torch.autograd.grad(value, exact, toward.double()),
        strict=True,
    )
    return all(torch.linalg.vector_norm(a - b, dim=-1).le(1e-4 * b.norm(dim=-1) + 1e-6).all() for a, b in grads)


class _Called(TorchFunctionMode):
    """Names of the functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **kwargs or {})


def _keeps_dtype(f: Formula, module: nn.Module, x: Tensor, weights: dict[str, Tensor]) -> bool:
    try:
        out = _run(module, x, weights)
    except RuntimeError:  # that refuses the mixture
        return False
    return out.dtype == x.dtype and _equal(out, f, getattr(module, f.eps), x, weights)


def scales_samples(module: nn.Module) -> bool:
    """Whether a module multiplies whole samples by numbers it draws in training (drop-path), and is idle else."""
    if module._modules or module._parameters or module._buffers or "forward" in vars(module):
        return False
    rates = {name: 0.5 for name, value in vars(module).items() if type(value) is float}  # so that it shows
    x = torch.randn(64, 3, 2, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            outs = []
            for given in (x, torch.ones(64, 1, 1)):
                torch.manual_seed(0)
                outs.append(_run(module, given, {}, **rates, training=True))
            idle = torch.equal(_run(module, x, {}, **rates, training=False), x)
            return idle and len(outs[1].unique()) > 1 and torch.allclose(outs[0], x * outs[1])
    except Exception:  # other people's code
        return False
