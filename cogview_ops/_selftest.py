"""Whether operators give right results on this machine: a tiny call of each and its derivative, against the plain-torch
formula in float64 on the CPU. Seconds; on a GPU longer, where Triton compiles its kernels first."""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _dispatch, _manifest

_HEADS, _ROWS = (2, 2, 20, 32), (5, 96)
_Shapes = dict[str, tuple[int, ...]]
_QKV: _Shapes = dict.fromkeys(("query", "key", "value"), _HEADS)
_STEP: _Shapes = {"query": (2, 2, 1, 32), "key_cache": _HEADS, "value_cache": _HEADS}
_NORMS: _Shapes = dict.fromkeys(("post_weight", "pre_weight"), _ROWS[1:])
_PIVOTS, _ENDS = torch.tensor([[0, 1, 7, 12], [0, 2, 3, -1]]), torch.tensor([20, 13])
_WINDOWS: dict[str, Any] = {"pivots": _PIVOTS, "block_size": 4, "window_blocks": 2}
_TEXT_AND_IMAGE = {"text_len": 4, "grid": (4, 4)}
# of every operator that has a reference: shapes of its floating-point arguments, and all others
CALLS: dict[str, tuple[_Shapes, dict[str, Any]]] = {
    "cogview2_attention": (_QKV, {**_TEXT_AND_IMAGE, "kernel_size": (3, 3)}),
    "dalle_attention": (_QKV, {**_TEXT_AND_IMAGE, "kind": "row"}),
    "dalle_attention_decode": (_STEP, {**_TEXT_AND_IMAGE, "kind": "row", "cache_seqlens": _ENDS}),
    "layer_norm": ({"x": _ROWS, "weight": _ROWS[1:], "bias": _ROWS[1:]}, {}),
    "linear_decode": ({"x": _ROWS, "weight": (64, 96)}, {}),
    "local_attention_2d": (_QKV, {"grid": (4, 5), "kernel_size": (3, 3)}),
    "local_attention_2d_decode": (_STEP, {"grid": (4, 5), "kernel_size": (3, 3), "cache_seqlens": _ENDS}),
    "pb_relax_attention": (_QKV, {"causal": True}),
    "pb_relax_softmax": ({"scores": (2, 20, 20)}, {"causal": True}),
    "rms_norm": ({"x": _ROWS, "weight": _ROWS[1:]}, {}),
    "sandwich_layer_norm": ({"branch": _ROWS, "residual": _ROWS, **_NORMS}, {}),
    "sandwich_rms_norm": ({"branch": _ROWS, "residual": _ROWS, **_NORMS}, {}),
    "three_region_attention": (_QKV, _WINDOWS),
    "three_region_attention_decode": (_STEP, {**_WINDOWS, "cache_seqlens": _ENDS}),
    "three_region_attention_varlen": (
        dict.fromkeys(("query", "key", "value"), (20, 2, 32)),
        {**_WINDOWS, "cu_seqlens": torch.tensor([0, 12, 20]), "pivots": torch.tensor([[0, 1, 7], [0, 2, -1]])},
    ),
}
_ON = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# in units of the largest value; rounding comes to 5e-7 and 6e-3
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Way(NamedTuple):
    """Where, in what and by which implementation operators are tried."""

    device: str
    dtype: torch.dtype
    impl: str

    def __str__(self) -> str:
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {self.impl}"


def ways() -> list[Way]:
    """Those of this machine. Attention in CUDA C++ takes 16 bits alone."""
    here = [] if _dispatch._C is None else [Way("cpu", dtype, "auto") for dtype in TOLERANCES]
    if torch.cuda.is_available():
        here += [Way("cuda", dtype, "auto") for dtype in TOLERANCES]
        here += [Way("cuda", torch.bfloat16, impl) for impl in ("cuda", "triton")]
    return here


def error(name: str, way: Way) -> float | None:
    """The largest error of outputs and gradients in units of the largest value; None where there is no such
    implementation. Raises what the operator does."""
    known = _manifest.OPERATORS[name]
    impls = _ON[way.device] if way.impl == "auto" else (way.impl,)
    if known.made_of != "kernels" and way.impl != "auto":
        return None  # it takes of each operator what there is
    if known.made_of == "kernels" and all(_dispatch.reason_unavailable(known.forward, impl) for impl in impls):
        return None
    found, expected = _run(name, way), _run(name, Way("cpu", torch.float64, "reference"), rounded=way.dtype)
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN if any is


def _run(name: str, way: Way, rounded: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients in float64. `rounded`: with the values that the inputs have in this dtype."""
    operator = getattr(importlib.import_module(__name__.rpartition(".")[0]), name)
    shapes, options = CALLS[name]
    generator = torch.Generator().manual_seed(1)
    floats = {key: torch.randn(shape, generator=generator).to(rounded or way.dtype) for key, shape in shapes.items()}
    differentiable = _manifest.OPERATORS[name].differentiable
    floats = {key: x.to(way.device, way.dtype).requires_grad_(differentiable) for key, x in floats.items()}
    options = {key: x.to(way.device) if isinstance(x, Tensor) else x for key, x in options.items()}
    outputs = operator(**floats, **options, impl=way.impl)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if differentiable:
        weights = [torch.randn(x.shape, generator=generator).to(rounded or way.dtype).to(x) for x in outputs]
        grads = torch.autograd.grad(outputs, list(floats.values()), weights)
    else:
        grads = ()
    return [x.detach().double().cpu() for x in (*outputs, *grads)]
