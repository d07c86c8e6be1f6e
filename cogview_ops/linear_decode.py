"""Products of few rows with a weight, as a model that generates token by token has them: as fast as memory is read."""

from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _registration, _sharding, reference
from ._remembered import remembered


def linear_decode(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    r"""`x @ weight.T + bias`, as `torch.nn.functional.linear`, for few rows on a CPU; inference only.

    Reads the weight from memory once, where it lies; from cache again for every further eight rows of x (four without
    AVX-512, 16 in bfloat16 with AMX). Sums are in float32 (float64 for float64), rounded once with scale and bias, and
    do not depend on the other rows of x: a batch gives the bits that its samples give alone. Where processors multiply
    bfloat16 in pairs, what is below the normal range is 0. From some dozens of rows on F.linear is faster, and on GPUs,
    where it reads weights as fast as memory gives them.

    Args:
        x: `[..., in]`; float64, float32, bfloat16 or float16; any strides, last dimension contiguous.
        weight: `[out, in]`, x's dtype or, with `scale`, int8; its rows may lie at any stride, as those of a slice do.
        bias: `[out]`, x's dtype.
        scale: `[out]`, float32 (float64 for float64): the weight is `weight * scale[:, None]`, whose scale multiplies
            the sum, which must not overflow without it.
        impl: "auto", "reference" or "cpp".

    Returns:
        `[..., out]`, x's dtype; under autocast in its dtype, as F.linear.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    x, weight, bias = _registration.autocast(x, weight, bias)
    _checked(x, weight, bias, scale)
    weight, bias, scale = (_sharding.beside(part, x) for part in (weight, bias, scale))
    namespace = _dispatch.select("linear_decode", impl, x)
    if namespace is None:
        return reference.linear_decode(x, weight, bias, scale)
    return _dispatch.run(namespace, "linear_decode", x, weight, bias, scale)


@remembered
def _checked(x: Any, weight: Any, bias: Any, scale: Any) -> None:
    _checks.tensor(x, "x")
    _checks.require(x.dim() >= 1, "x", "[..., in]", lambda: f"shape {tuple(x.shape)}")
    _checks.last_contiguous(x, "x")
    _checks.tensor(weight, "weight", (x.dtype,) if scale is None else (torch.int8,), ndim=2, layout=" [out, in]")
    _checks.same_device(weight, "weight", x, "x")
    _checks.shape(weight, "weight", (weight.shape[0], x.shape[-1]))
    _checks.last_contiguous(weight, "weight")
    for part, name, dtype in ((bias, "bias", x.dtype), (scale, "scale", _registration.wide(x.dtype))):
        if part is not None:
            _checks.tensor(part, name, (dtype,))
            _checks.same_device(part, name, x, "x")
            _checks.shape(part, name, weight.shape[:1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_registration.define("linear_decode", "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor", _fake)
