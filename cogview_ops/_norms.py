"""What layer_norm and rms_norm, and the steps of both, do with what users pass: checks, weights, dispatch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _namespaces, _registration, _sharding, reference
from ._remembered import remembered

RELAX = (None, "row", "tensor")  # the kernels' numbering
NORMS = ("both", "pre", "post")


def norm(
    kind: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relax: str | None,
    weight_offset: float,
    round_before_weight: bool,
    impl: str,
) -> Tensor:
    autocast = _registration.autocast_dtype(x)
    numbers, dtype = _checked(x, weight, bias, eps, relax, weight_offset, round_before_weight, autocast)
    weights = _weights(x, kind, dtype, numbers[2], weight, bias)
    namespace = _dispatch.select(f"{kind}_fwd", impl, x)
    if namespace is None:
        out = _reference(kind, weights, numbers)(x)
    else:
        out = _dispatch.run(namespace, f"{kind}_fwd", x, *weights, *numbers)[0]
    return out if autocast is None else out.to(autocast)


def step(
    kind: str,
    branch: Tensor,
    residual: Tensor,
    given: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    norms: str,
    eps: float,
    relax: str | None,
    weight_offset: float,
    round_before_weight: bool,
    branch_scale: float | Tensor,
    dropout_p: float,
    dropout_after_norm: bool,
    seed: int | Tensor | None,
    impl: str,
) -> Any:
    autocast = _registration.autocast_dtype(branch)
    options = eps, relax, weight_offset, round_before_weight, dropout_p, dropout_after_norm
    scale, numbers, drops, dtype = _checked_step(branch, residual, *given, norms, branch_scale, *options, autocast)
    if drops[0] > 0:
        seed = _checked_seed(seed, branch)
    absent: list[Tensor | None] = [None, None]
    post = absent if norms == "pre" else _weights(branch, kind, dtype, numbers[2], *given[:2])
    pre = absent if norms == "post" else _weights(branch, kind, dtype, numbers[2], *given[2:])
    rows = _row_scale(branch_scale, branch) if isinstance(branch_scale, Tensor) else None
    namespace = _dispatch.select(f"sandwich_{kind}_fwd", impl, branch)
    if namespace is None:
        post_norm, pre_norm = (None if w[0] is None else _reference(kind, w, numbers) for w in (post, pre))
        s = scale if rows is None else rows[..., None]
        h, x = reference.norm_step(branch, residual, post_norm, pre_norm, s, *drops, seed)
    else:
        at = None
        if drops[0] > 0 and seed is not None:
            at = seed if isinstance(seed, Tensor) else _on_device(seed, branch.device)
            at = _sharding.beside(at, branch)
        arguments = branch, residual, *post, *pre, rows, scale, *numbers, *drops, at
        h, x, *_ = _dispatch.run(namespace, f"sandwich_{kind}_fwd", *arguments)
    return h if norms == "post" else (h, x)


def _reference(kind: str, weights: list[Any], numbers: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    (weight, bias), (eps, relax, weight_offset, round_before_weight) = weights, numbers
    options = {"weight": weight, "eps": eps, "weight_offset": weight_offset}
    if kind == "rms_norm":
        return partial(reference.rms_norm, **options, round_before_weight=round_before_weight)
    return partial(reference.layer_norm, **options, bias=bias, relax=RELAX[relax])


@remembered
def _checked(
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    relax: Any,
    weight_offset: Any,
    round_before_weight: Any,
    autocast: torch.dtype | None,
) -> tuple[Any, torch.dtype]:
    """Numbers as the torch operator takes them, and the dtype that weights and biases are read in."""
    _check_input(x, "x")
    _check_weights(x, weight=weight, bias=bias)
    numbers = _check_options(x, eps, relax, weight_offset, round_before_weight)
    return numbers, _dtype_of_weights(x, autocast, weight is not None or numbers[2] in (0, 1), weight=weight, bias=bias)


@remembered
def _checked_step(
    branch: Any,
    residual: Any,
    post_weight: Any,
    post_bias: Any,
    pre_weight: Any,
    pre_bias: Any,
    norms: Any,
    branch_scale: Any,
    eps: Any,
    relax: Any,
    weight_offset: Any,
    round_before_weight: Any,
    dropout_p: Any,
    dropout_after_norm: Any,
    autocast: torch.dtype | None,
) -> tuple[float, Any, tuple[float, bool], torch.dtype]:
    """The scale that is a number, numbers and dropout as the torch operator takes them, the dtype of weights."""
    _check_input(branch, "branch")
    _check_input(residual, "residual")
    _checks.same(residual, "residual", branch, "branch", wider=True)
    _checks.shape(residual, "residual", branch.shape)
    _checks.choice(norms, "norms", NORMS)
    given = {"post_weight": post_weight, "post_bias": post_bias, "pre_weight": pre_weight, "pre_bias": pre_bias}
    for name, x in given.items():
        there = norms in ("both", name.partition("_")[0])
        _checks.require(there or x is None, name, lambda: f"None with norms={norms!r}", "one")
    _check_weights(branch, **given)
    scale = _check_scale(branch_scale, branch)
    numbers = _check_options(branch, eps, relax, weight_offset, round_before_weight)
    dropout_p = float(_checks.probability(dropout_p, "dropout_p"))
    _checks.boolean(dropout_after_norm, "dropout_after_norm")
    drops = dropout_p, dropout_after_norm and norms != "pre" and dropout_p > 0
    complete = (post_weight is not None or norms == "pre") and (pre_weight is not None or norms == "post")
    dtype = _dtype_of_weights(branch, autocast, complete or numbers[2] in (0, 1), **given)
    return scale, numbers, drops, dtype


def _check_input(x: Any, name: str) -> None:
    _checks.tensor(x, name)
    _checks.require(x.dim() >= 1 and x.shape[-1] >= 1, name, "[..., D] with D >= 1", lambda: f"shape {tuple(x.shape)}")
    _checks.last_contiguous(x, name)


def _check_weights(x: Tensor, **weights: Tensor | None) -> None:
    for name, weight in weights.items():
        if weight is None:
            continue
        _checks.tensor(weight, name)
        _checks.shape(weight, name, x.shape[-1:])
        _checks.require(weight.device == x.device, name, lambda: f"the input's device {x.device}", weight.device)


def _check_options(x: Tensor, eps: Any, relax: Any, weight_offset: Any, round_before_weight: Any) -> tuple[Any, ...]:
    _checks.choice(relax, "relax", RELAX)
    eps = _checks.finite(eps, "eps", x.dtype, positive=True)
    weight_offset = _checks.finite(weight_offset, "weight_offset", x.dtype)
    _checks.boolean(round_before_weight, "round_before_weight")
    return eps, RELAX.index(relax), weight_offset, round_before_weight


def _check_scale(scale: Any, branch: Tensor) -> float:
    """The number, or 1 beside a tensor."""
    if not isinstance(scale, Tensor):
        return _checks.finite(scale, "branch_scale", branch.dtype)
    _checks.tensor(scale, "branch_scale")
    rows = (*branch.shape[:-1], 1)
    fits = scale.dim() <= len(rows) and all(
        n == 1 or n == m for n, m in zip(reversed(scale.shape), reversed(rows), strict=False)
    )
    expected = "a number, or a tensor that broadcasts to"
    _checks.require(fits, "branch_scale", lambda: f"{expected} {tuple(rows)}", lambda: f"shape {tuple(scale.shape)}")
    device = branch.device
    _checks.require(scale.device == device, "branch_scale", lambda: f"branch's device {device}", scale.device)
    return 1.0


def _row_scale(scale: Tensor, branch: Tensor) -> Tensor:
    """One number a row, in the statistics' dtype."""
    dtype = _registration.wide(branch.dtype)
    rows = scale.to(dtype).expand(*branch.shape[:-1], 1)[..., 0].contiguous()
    return _sharding.beside(rows, branch)


def _on_device(seed: int, device: torch.device) -> Tensor:
    return _seed_on(seed, device) if torch.compiler.is_compiling() else _full(seed, device)


def _full(seed: int, device: torch.device) -> Tensor:
    return torch.full((), seed, dtype=torch.int64, device=device)


def _checked_full(seed: int, device: torch.device) -> Tensor:
    _checks.integer(seed, "seed", 0)  # one that was read from a tensor is not known before
    return _full(seed, device)


# An operator, since Inductor would make a kernel of torch.full that takes the number as 32 bits.
_seed_on = torch.library.custom_op(f"{_namespaces.COMPILED}::seed_on", _checked_full, mutates_args=())
_seed_on.register_fake(lambda seed, device: torch.empty((), dtype=torch.int64, device=device))


def _checked_seed(seed: Any, branch: Tensor) -> int | Tensor:
    if isinstance(seed, Tensor):
        fits = seed.numel() == 1 or (branch.dim() > 1 and seed.shape == branch.shape[:1])
        if seed.dtype != torch.int64 or not fits or seed.device != branch.device:
            got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            each = f", or one for each of the {branch.shape[0]} samples" if branch.dim() > 1 else ""
            _checks.require(False, "seed", lambda: f"one int64 on the input's device {branch.device}{each}", got)
    elif seed is None:
        raise ValueError("seed: expected an int or a tensor when dropout_p > 0, got None")
    else:
        seed = _checks.integer(seed, "seed", 0)
    return seed


def _dtype_of_weights(x: Tensor, autocast: torch.dtype | None, exact: bool, **given: Tensor | None) -> torch.dtype:
    """x's or float32; those given are all alike, but under autocast. Not `exact`: weights that are not given may be
    no number of x's dtype."""
    wide = _registration.wide(x.dtype)
    there = {name: w.dtype for name, w in given.items() if w is not None}
    dtypes = set(there.values()) or {x.dtype}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        if autocast is None:
            known, first = (x.dtype, torch.float32), next(iter(there.values()))
            odd = [n for n, dtype in there.items() if dtype not in known] or [n for n in there if there[n] != first]
            expected = f"the input's dtype {x.dtype} or torch.float32, the same for all weights and biases"
            raise TypeError(f"{odd[0]}: expected {expected}, got {there[odd[0]]}")
        return torch.float32
    return dtypes.pop() if exact and wide == torch.float32 else wide


def _weights(
    x: Tensor, kind: str, dtype: torch.dtype, weight_offset: float, weight: Tensor | None, bias: Tensor | None
) -> list[Tensor | None]:
    """Weight and bias of a norm, contiguous; what is not given makes them 1 and 0."""
    if weight is None:
        weight = x.new_full(x.shape[-1:], 1 - weight_offset, dtype=dtype)
    if kind == "rms_norm":
        return [_as(weight, dtype), None]
    if bias is None:
        bias = x.new_full(x.shape[-1:], 0, dtype=dtype)
    return [_as(weight, dtype), _as(bias, dtype)]


def _as(w: Tensor, dtype: torch.dtype) -> Tensor:
    return w if w.dtype == dtype and w.is_contiguous() else w.to(dtype).contiguous()
