"""What is timed of the operators on rows: softmax, norms and the steps between them; the rest is in problems.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layer_norm as our_layer_norm
from .. import linear_decode, pb_relax_softmax, sandwich_layer_norm, sandwich_rms_norm
from .. import rms_norm as our_rms_norm
from . import baselines, packages
from .problems import Contestant, Problem, gpu_only, on_gpu


def softmax(dtype: torch.dtype, back: bool, *, heads=16, seqlen=1088, causal=False, alpha=32.0) -> Problem:
    scores = torch.randn(1, heads, seqlen, seqlen, dtype=dtype) / alpha
    mask = torch.ones(seqlen, seqlen, dtype=torch.bool).tril() if causal else None
    formula = baselines.relaxed_softmax(alpha, mask)
    visible = scores.numel() if mask is None else int(mask.sum()) * heads
    return Problem(
        (scores,),
        partial(pb_relax_softmax, alpha=alpha, causal=causal),
        {"eager formula": formula, "torch.compile": baselines.compile_formula(formula)},
        {"torch.softmax": baselines.torch_softmax, **gpu_only(Liger=packages.liger_softmax)},
        bytes=(2 if back else 1) * scores.nbytes + (3 if back else 1) * visible * scores.element_size(),
        exps=visible,
    )


def linear(dtype: torch.dtype, back: bool, *, rows=1, out=16384, dim=4096, int8=False) -> Problem:
    x, bias = torch.randn(rows, dim, dtype=dtype), torch.randn(out, dtype=dtype)
    if not int8:
        weight = torch.randn(out, dim, dtype=dtype)
        return Problem((x, weight, bias), linear_decode, {"F.linear": F.linear}, {}, bytes=weight.nbytes)
    numbers, scale = torch.randint(-127, 128, (out, dim), dtype=torch.int8), torch.rand(out) / 127
    wide = (numbers * scale[:, None]).to(dtype)
    return Problem(
        (x, bias),
        lambda x, bias, **how: linear_decode(x, numbers, bias, scale=scale, **how),
        {},
        {"F.linear without int8": lambda x, bias: F.linear(x, wide, bias)},
        bytes=numbers.nbytes,
        truth=lambda x, bias: F.linear(x, numbers.double() * scale.double()[:, None], bias),
    )


def first_rows(x: Tensor) -> Tensor:
    return x[:4096] if x.dim() > 1 else x


def _norm_weights(count: int, dim: int, dtype: torch.dtype, biased: bool = True) -> tuple[Tensor, ...]:
    drawn = ((torch.randn(dim) * 0.1 + (i % 2 == 0)).to(dtype) for i in range(2 * count))
    return tuple(w for i, w in enumerate(drawn) if biased or i % 2 == 0)


def _norms(
    dtype: torch.dtype, back: bool, step: Callable[..., Any], relaxed: bool = True
) -> tuple[dict[str, Contestant], dict[str, Contestant]]:
    """The same result and others, of a step made of a norm."""
    formula = step(baselines.relaxed_layer_norm if relaxed else baselines.layer_norm)
    same: dict[str, Contestant] = {"eager formula": formula, "torch.compile": baselines.compile_formula(formula)}
    others: dict[str, Contestant] = {"F.layer_norm": step(baselines.layer_norm)} if relaxed else {}
    if back and dtype == torch.bfloat16 and not on_gpu():  # torch sums the weights' gradients in it: off by half
        others["eager formula"] = same.pop("eager formula")
        if relaxed:
            same["eager formula in float32"] = step(baselines.float32_layer_norm)
    return same, others


def layer_norm(dtype: torch.dtype, back: bool, *, rows=8704, dim=2560) -> Problem:
    x = torch.randn(rows, dim, dtype=dtype)
    same, others = _norms(dtype, back, lambda norm: norm)
    return Problem(
        (x, *_norm_weights(1, dim, dtype)),
        our_layer_norm,
        same,
        others | gpu_only(Liger=packages.liger_layer_norm),
        bytes=(5 if back else 2) * x.nbytes,
        sample=(lambda x: x) if back else first_rows,  # all rows are in the gradients of weights
    )


def sandwich(dtype: torch.dtype, back: bool, *, rows=8704, dim=2560) -> Problem:
    branch, residual = torch.randn(2, rows, dim, dtype=dtype)
    same, others = _norms(dtype, back, baselines.sandwich)
    return Problem(
        (branch, residual, *_norm_weights(2, dim, dtype)),
        sandwich_layer_norm,
        same,
        others,
        bytes=(10 if back else 4) * branch.nbytes,
        sample=(lambda x: x) if back else first_rows,
    )


def add_layer_norm(dtype: torch.dtype, back: bool, *, rows=8704, dim=2560) -> Problem:
    """GPT-2's step, and ViT's."""
    branch, residual = torch.randn(2, rows, dim, dtype=dtype)

    def ours(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> Any:
        given: dict[str, Any] = {"pre_weight": weight, "pre_bias": bias, "norms": "pre", "relax": None}
        return sandwich_layer_norm(branch, residual, **given, **how)

    same, others = _norms(dtype, back, baselines.add_norm, relaxed=False)
    return Problem(
        (branch, residual, *_norm_weights(1, dim, dtype)),
        ours,
        same,
        others,
        bytes=(8 if back else 4) * branch.nbytes,
        sample=(lambda x: x) if back else first_rows,
    )


def rms_norm(dtype: torch.dtype, back: bool, *, rows=2048, dim=4096) -> Problem:
    """Gemma's."""
    x = torch.randn(rows, dim, dtype=dtype)
    formula = baselines.gemma_rms_norm
    same: dict[str, Contestant] = {"eager formula": formula, "torch.compile": baselines.compile_formula(formula)}
    return Problem(
        (x, *_norm_weights(1, dim, dtype, biased=False)),
        partial(our_rms_norm, weight_offset=1.0),
        same | gpu_only(Liger=packages.liger_rms_norm),
        {"F.rms_norm": baselines.torch_rms_norm},
        bytes=(5 if back else 2) * x.nbytes,
    )


# of a model with these norms: its step, its norm and options of ours; tensors that are moved forward, and in all
GEMMA = baselines.gemma_rms_norm, {"weight_offset": 1.0}
LLAMA = baselines.llama_rms_norm, {"round_before_weight": True}
STEPS: dict[str, Any] = {
    "both": (baselines.sandwich, *GEMMA, 4, 10),
    "pre": (baselines.add_norm, *LLAMA, 4, 8),
    "post": (baselines.norm_add, *GEMMA, 3, 6),  # OLMo 2's with Gemma's weight
}


def sandwich_rms(dtype: torch.dtype, back: bool, *, norms="both", rows=2048, dim=4096) -> Problem:
    branch, residual = torch.randn(2, rows, dim, dtype=dtype)
    names = ["post_weight", "pre_weight"] if norms == "both" else [f"{norms}_weight"]
    step, norm, options, forward, whole = STEPS[norms]

    def ours(branch: Tensor, residual: Tensor, *weights: Tensor, **how: Any) -> Any:
        given: dict[str, Any] = dict(zip(names, weights, strict=True)) | options
        return sandwich_rms_norm(branch, residual, norms=norms, **given, **how)

    formula = step(norm)
    liger = gpu_only(Liger=packages.liger_add_rms_norm) if norms == "pre" else {}
    return Problem(
        (branch, residual, *_norm_weights(len(names), dim, dtype, biased=False)),
        ours,
        {"eager formula": formula, "torch.compile": baselines.compile_formula(formula)} | liger,
        {"F.rms_norm": step(baselines.torch_rms_norm)},
        bytes=(whole if back else forward) * branch.nbytes,
    )
