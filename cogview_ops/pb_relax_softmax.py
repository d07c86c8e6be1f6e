"""PB-relax softmax: softmax of pre-divided scores without a float16 overflow (CogView, arXiv 2105.13290, eq. 4)."""

from typing import Any

from torch import Tensor

from . import _checks, _dispatch, _namespaces, _registration, _sharding, reference
from ._remembered import remembered


def pb_relax_softmax(
    scores: Tensor,
    *,
    alpha: float = 32.0,
    mask: Tensor | None = None,
    causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""`softmax(alpha * (scores - max(scores)))` over the last dimension, in one pass over memory.

    The caller divides the scores by alpha, `scores = (q / (alpha * sqrt(d))) @ k.T`, so that they cannot overflow
    in float16; this multiplies it back after subtracting the row maximum (finer than the paper's head maximum, the
    same result). A row that sees nothing gives zeros and zero gradient; one that sees NaN, +inf or nothing but -inf
    gives NaN, as the formula does. Hidden entries do not count, whatever they hold.

    Args:
        scores: `[..., R, K]`, K >= 1; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        alpha: the divisor used by the caller, above 0.
        mask: bool, True = attend, broadcastable to `scores`.
        causal: row i of R sees columns j <= i + K - R (bottom-right aligned); needs no mask tensor.
        impl: "auto", "reference", "cpp", "cuda" or "triton".

    Returns:
        Probabilities, shape and dtype of `scores`, under autocast as well; on CPU, those below the normal range are 0.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    alpha = _checked(scores, alpha, mask, causal)
    if mask is not None:
        mask = _sharding.beside(mask.expand(scores.shape), scores)
    namespace = _dispatch.select("pb_relax_softmax_fwd", impl, scores)
    if namespace is None:
        return reference.pb_relax_softmax(scores, alpha=alpha, mask=mask, causal=causal)
    return _dispatch.run(namespace, "pb_relax_softmax_fwd", scores, mask, alpha, causal)


@remembered
def _checked(scores: Any, alpha: Any, mask: Any, causal: Any) -> float:
    _checks.tensor(scores, "scores")
    _checks.require(
        scores.dim() >= (2 if causal else 1), "scores", "[..., R, K]", lambda: f"shape {tuple(scores.shape)}"
    )
    _checks.require(
        scores.shape[-1] >= 1, "scores", "rows of at least one entry", lambda: f"shape {tuple(scores.shape)}"
    )
    _checks.last_contiguous(scores, "scores")
    alpha = _checks.finite(alpha, "alpha", scores.dtype, positive=True)
    if mask is not None:
        _checks.mask(mask, scores, scores.shape)
    return alpha


def _fwd_fake(scores: Tensor, mask: Tensor | None, alpha: float, causal: bool) -> Tensor:
    return _registration.empty_rows(scores)


def _bwd_fake(dout: Tensor, out: Tensor, alpha: float, causal: bool) -> Tensor:
    return _registration.empty_rows(out)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, _, ctx.alpha, ctx.causal = inputs
    ctx.save_for_backward(output)


def _backward_of(namespace: str) -> Any:
    def backward(ctx: Any, dout: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        grad = _dispatch.run(namespace, "pb_relax_softmax_bwd", dout, out, ctx.alpha, ctx.causal)
        return grad, None, None, None

    return backward


def register(namespace: str) -> None:
    """Define the two operators in a namespace."""
    _registration.define(
        "pb_relax_softmax_bwd",
        "(Tensor dout, Tensor out, float alpha, bool causal) -> Tensor",
        _bwd_fake,
        namespace=namespace,
    )
    _registration.define(
        "pb_relax_softmax_fwd",
        "(Tensor scores, Tensor? mask, float alpha, bool causal) -> Tensor",
        _fwd_fake,
        namespace=namespace,
        backward=_backward_of(namespace),
        setup_context=_setup_context,
    )


register(_namespaces.COMPILED)
