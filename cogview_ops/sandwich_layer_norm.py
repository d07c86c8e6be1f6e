"""LayerNorm with precision-bottleneck relaxation, and the fused step of a Sandwich-LN transformer.

CogView, arXiv 2105.13290, section 2.4. PB-relax is LN(x / c), which equals LN(x) with `eps * c**2`: no pass over
memory of its own, and nothing can overflow. c is held constant in the backward. On CPU, gradients of weights are sums
over blocks of rows that depend on the shape alone: they repeat bit for bit with any number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _registration, _sharding, reference
from ._remembered import remembered

_RELAX = {None: 0, "row": 1, "tensor": 2}  # the kernels' numbering


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relax: str | None = "row",
    impl: str = "auto",
) -> Tensor:
    r"""LayerNorm over the last dimension, `(y - mean(y)) / sqrt(var(y) + eps) * weight + bias` with `y = x / c`.

    Args:
        x: `[..., D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        weight, bias: `[D]`, in x's dtype or float32, under autocast in any; None is 1, or 0.
        eps: added to the variance of `x / c`, above 0.
        relax: c. "row": the largest |x| of the row. "tensor": the largest |x| of the whole tensor over 8, what the
            published CogView weights were trained with (it couples the samples of a batch). None: 1, plain LayerNorm.
            c = 0 counts as 1, so all-zero rows give `bias`.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        Shape and dtype of `x`; under autocast its dtype, since a product is next that would cast: `x` is read in its
        own and rounded once. (`torch.nn.functional.layer_norm` gives float32 there.)
    """
    autocast = _registration.autocast_dtype(x)
    eps, dtype = _checked(x, weight, bias, eps, relax, autocast)
    weight, bias = _weights(x, dtype, weight, bias)
    namespace = _dispatch.select("layer_norm_fwd", impl, x)
    if namespace is None:
        out = reference.layer_norm(x, weight, bias, eps=eps, relax=relax)
    else:
        out = _dispatch.run(namespace, "layer_norm_fwd", x, weight, bias, eps, _RELAX[relax])[0]
    return out if autocast is None else out.to(autocast)


def sandwich_layer_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor | None = None,
    post_bias: Tensor | None = None,
    pre_weight: Tensor | None = None,
    pre_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relax: str | None = "row",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""One step of a Sandwich-LN transformer: `h = residual + LN_post(dropout(branch))`, `x = LN_pre(h)`.

    In a model the pre-norm is that of the next sub-layer, so a whole layer is two calls.

    Args:
        branch: `[..., D]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        residual: the same shape, in branch's dtype, or float32 beside bfloat16 or float16: a residual stream that keeps
            its precision, under autocast as well, which changes no dtype here.
        post_weight, post_bias, pre_weight, pre_bias: `[D]`, all in branch's dtype or all in float32, under autocast in
            any; None is 1, or 0.
        eps, relax: as in `layer_norm`, for both norms. "tensor" reads the branch once more; h's maximum comes with h.
        dropout_p: probability in [0, 1] that an element of `branch` is zeroed; the others are divided by 1 - p.
        seed: which elements (Philox4x32-10 of the seed and the element's place in raster order), 0 <= seed < 2**63;
            required with dropout, so that a run repeats. The backward computes the mask again. A tensor of one int64 on
            the input's device is read when the kernels run, forward and backward alike: a CUDA graph drops anew when
            it has changed in between. It must stay the same from a forward to its backward.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        `(h, x)`: h with shape and dtype of `residual`, x of `branch`, each computed in float32 (float64 for float64)
        from what was read and rounded once. Gradients have their input's dtype.
    """
    given = post_weight, post_bias, pre_weight, pre_bias
    autocast = _registration.autocast_dtype(branch)
    eps, dropout_p, dtype = _checked_step(branch, residual, *given, eps, relax, dropout_p, autocast)
    if dropout_p > 0:
        seed = _checked_seed(seed, branch)
    weights = _weights(branch, dtype, *given)
    namespace = _dispatch.select("sandwich_layer_norm_fwd", impl, branch)
    if namespace is None:
        return reference.sandwich_layer_norm(
            branch, residual, *weights, eps=eps, relax=relax, dropout_p=dropout_p, seed=seed
        )
    at = None
    if dropout_p > 0 and seed is not None:
        at = seed if isinstance(seed, Tensor) else _on_device(seed, branch.device)
        at = _sharding.beside(at, branch)
    numbers = eps, _RELAX[relax], float(dropout_p)
    return _dispatch.run(namespace, "sandwich_layer_norm_fwd", branch, residual, *weights, *numbers, at)[:2]


@remembered
def _checked(x: Any, weight: Any, bias: Any, eps: Any, relax: Any, autocast: torch.dtype | None) -> tuple[float, Any]:
    """eps, and the dtype that weights and biases are read in."""
    _check_input(x, "x")
    _check_weights(x, weight=weight, bias=bias)
    eps = _check_options(x, eps, relax)
    return eps, _dtype_of_weights(x, autocast, weight, bias)


@remembered
def _checked_step(
    branch: Any,
    residual: Any,
    post_weight: Any,
    post_bias: Any,
    pre_weight: Any,
    pre_bias: Any,
    eps: Any,
    relax: Any,
    dropout_p: Any,
    autocast: torch.dtype | None,
) -> tuple[float, float, Any]:
    """eps, dropout_p, and the dtype that weights and biases are read in."""
    _check_input(branch, "branch")
    _check_input(residual, "residual")
    _checks.same(residual, "residual", branch, "branch", wider=True)
    _checks.shape(residual, "residual", branch.shape)
    _check_weights(branch, post_weight=post_weight, post_bias=post_bias, pre_weight=pre_weight, pre_bias=pre_bias)
    eps = _check_options(branch, eps, relax)
    dropout_p = _checks.finite(dropout_p, "dropout_p")
    _checks.require(0 <= dropout_p <= 1, "dropout_p", "a probability", dropout_p)
    return eps, dropout_p, _dtype_of_weights(branch, autocast, post_weight, post_bias, pre_weight, pre_bias)


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


def _check_options(x: Tensor, eps: float, relax: str | None) -> float:
    _checks.choice(relax, "relax", tuple(_RELAX))
    return _checks.finite(eps, "eps", x.dtype, positive=True)


def _on_device(seed: int, device: torch.device) -> Tensor:
    return _seed_on(seed, device) if torch.compiler.is_compiling() else _full(seed, device)


def _full(seed: int, device: torch.device) -> Tensor:
    return torch.full((), seed, dtype=torch.int64, device=device)


def _checked_full(seed: int, device: torch.device) -> Tensor:
    _checks.integer(seed, "seed", 0)  # one that was read from a tensor is not known before
    return _full(seed, device)


# An operator, since Inductor would make a kernel of torch.full that takes the number as 32 bits.
_seed_on = torch.library.custom_op("cogview_ops::seed_on", _checked_full, mutates_args=())
_seed_on.register_fake(lambda seed, device: torch.empty((), dtype=torch.int64, device=device))


def _checked_seed(seed: Any, branch: Tensor) -> int | Tensor:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != branch.device:
            got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            _checks.require(False, "seed", lambda: f"one int64 on the input's device {branch.device}", got)
    elif seed is None:
        raise ValueError("seed: expected an int or a tensor of one when dropout_p > 0, got None")
    else:
        seed = _checks.integer(seed, "seed", 0)
    return seed


def _dtype_of_weights(x: Tensor, autocast: torch.dtype | None, *given: Tensor | None) -> torch.dtype:
    """x's or float32; those given are all alike, but under autocast."""
    dtypes = {w.dtype for w in given if w is not None} or {x.dtype}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        if autocast is None:
            got = sorted(str(dtype) for dtype in dtypes)
            raise TypeError(f"weights and biases: expected all {x.dtype} (the input's) or all float32, got {got}")
        return torch.float32
    return x.dtype if x.dtype == torch.float64 else dtypes.pop()


def _weights(x: Tensor, dtype: torch.dtype, *given: Tensor | None) -> list[Tensor]:
    """Weights and biases in turn, contiguous; what is not given is 1, or 0."""
    return [
        x.new_full(x.shape[-1:], 1 - k % 2, dtype=dtype)
        if w is None
        else w
        if w.dtype == dtype and w.is_contiguous()
        else w.to(dtype).contiguous()
        for k, w in enumerate(given)
    ]


def _ln_fwd_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relax: int) -> tuple[Tensor, ...]:
    return _registration.empty_rows(x), _registration.statistic(x), _registration.statistic(x)


def _ln_bwd_fake(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    return _registration.empty_rows(x), torch.empty_like(weight), torch.empty_like(weight)


def _sandwich_fwd_fake(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
    pre_weight: Tensor,
    pre_bias: Tensor,
    eps: float,
    relax: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, ...]:
    stats = [_registration.statistic(branch) for _ in range(4)]
    return _registration.empty_rows(residual), _registration.empty_rows(branch), *stats


def _sandwich_bwd_fake(
    dh: Tensor | None,
    dx: Tensor | None,
    branch: Tensor,
    h: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    posts = [torch.empty_like(post_weight) for _ in range(2)]
    pres = [torch.empty_like(pre_weight) for _ in range(2)]
    return _registration.empty_rows(branch), _registration.empty_rows(h), *posts, *pres


def _ln_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _sandwich_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    branch, _, post_weight, _, pre_weight, _, _, _, ctx.dropout_p, seed = inputs
    h, _, *stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(branch, h, post_weight, pre_weight, *stats, seed)


def _ln_backward_of(namespace: str) -> Any:
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        grads = _dispatch.run(namespace, "layer_norm_bwd", dout, *ctx.saved_tensors)
        return *grads, None, None

    return backward


def _sandwich_backward_of(namespace: str) -> Any:
    def backward(ctx: Any, dh: Tensor | None, dx: Tensor | None, *_: Any) -> Any:
        if dh is None and dx is None:
            return (None,) * 10
        *saved, seed = ctx.saved_tensors
        arguments = dh, dx, *saved, ctx.dropout_p, seed
        grads = _dispatch.run(namespace, "sandwich_layer_norm_bwd", *arguments)
        return *grads, None, None, None, None

    return backward


def register(namespace: str) -> None:
    """Define the four operators in a namespace."""
    _registration.define(
        "layer_norm_bwd",
        "(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
        _ln_bwd_fake,
        namespace=namespace,
    )
    _registration.define(
        "layer_norm_fwd",
        "(Tensor x, Tensor weight, Tensor bias, float eps, int relax) -> (Tensor, Tensor, Tensor)",
        _ln_fwd_fake,
        namespace=namespace,
        backward=_ln_backward_of(namespace),
        setup_context=_ln_setup_context,
    )
    _registration.define(
        "sandwich_layer_norm_bwd",
        "(Tensor? dh, Tensor? dx, Tensor branch, Tensor h, Tensor post_weight, Tensor pre_weight, "
        "Tensor post_mean, Tensor post_rstd, Tensor pre_mean, Tensor pre_rstd, float dropout_p, Tensor? seed) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _sandwich_bwd_fake,
        namespace=namespace,
    )
    _registration.define(
        "sandwich_layer_norm_fwd",
        "(Tensor branch, Tensor residual, Tensor post_weight, Tensor post_bias, Tensor pre_weight, Tensor pre_bias, "
        "float eps, int relax, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _sandwich_fwd_fake,
        namespace=namespace,
        backward=_sandwich_backward_of(namespace),
        setup_context=_sandwich_setup_context,
    )


register("cogview_ops")
