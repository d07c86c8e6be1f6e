"""PB-relax softmax in Triton: whole rows in registers, one read and one write; what is hidden is not read.

Memory. Rows lie at any offsets, their elements beside each other; of the mask both may have any stride, 0 too.
Rows of more than 16384 elements spill to local memory in the backward, of more than 32768 in the forward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _registration
from ..pb_relax_softmax import register
from . import _rows
from ._rows import row_offsets
from ._tiles import DEVICES, accumulator, check_interpreter, exactly, kernel, launch, two_parts


@triton.jit
def visible_columns(i, rows, cols, rows_per_matrix, CAUSAL: tl.constexpr):
    """How many leading columns rows i see."""
    n = tl.zeros_like(i) + cols
    if CAUSAL:
        n = tl.minimum(tl.maximum(i % rows_per_matrix + cols - rows_per_matrix + 1, 0), cols)
    return tl.where(i < rows, n, 0)


@kernel
def forward_kernel(
    x, mask, out,
    x_n1, x_n2, x_s0, x_s1, x_s2, mask_n1, mask_n2, mask_s0, mask_s1, mask_s2, mask_col,
    out_n1, out_n2, out_s0, out_s1, out_s2,
    rows, cols, rows_per_matrix, alpha, alpha_low,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    j = tl.arange(0, N)[None, :]
    visible = visible_columns(i, rows, cols, rows_per_matrix, CAUSAL)
    seen = j < visible[:, None]
    near = (j < (visible + 15)[:, None] // 16 * 16) & (j < cols)  # in whole vectors
    if MASK:
        at = mask + row_offsets(i, mask_n1, mask_n2, mask_s0, mask_s1, mask_s2)[:, None] + j.to(tl.int64) * mask_col
        seen = tl.load(at, mask=seen, other=0) != 0
    at = x + row_offsets(i, x_n1, x_n2, x_s0, x_s1, x_s2)[:, None] + j
    s = tl.where(seen, tl.load(at, mask=near, other=0.0).to(ACC), float("-inf"))
    some = tl.max(seen.to(tl.int32), 1) > 0 if MASK else visible > 0
    top = tl.where(some, tl.max(s, 1), 0.0)  # sees nothing: all exp(-inf) = 0
    p = tl.exp((s - top[:, None]) * exactly(alpha, alpha_low, ACC))
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0, 1.0, total)[:, None]
    at = out + row_offsets(i, out_n1, out_n2, out_s0, out_s1, out_s2)[:, None] + j
    tl.store(at, p.to(out.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols))


@kernel
def backward_kernel(
    dout, out, grad,
    dout_n1, dout_n2, dout_s0, dout_s1, dout_s2, out_n1, out_n2, out_s0, out_s1, out_s2,
    grad_n1, grad_n2, grad_s0, grad_s1, grad_s2,
    rows, cols, rows_per_matrix, alpha, alpha_low,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    j = tl.arange(0, N)[None, :]
    visible = visible_columns(i, rows, cols, rows_per_matrix, CAUSAL)
    seen = j < visible[:, None]
    near = (j < (visible + 15)[:, None] // 16 * 16) & (j < cols)
    at = out + row_offsets(i, out_n1, out_n2, out_s0, out_s1, out_s2)[:, None] + j
    p = tl.where(seen, tl.load(at, mask=near, other=0.0).to(ACC), 0.0)
    at = dout + row_offsets(i, dout_n1, dout_n2, dout_s0, dout_s1, dout_s2)[:, None] + j
    dp = tl.where(seen, tl.load(at, mask=near, other=0.0).to(ACC), 0.0)
    inner = tl.sum(p * dp, 1)
    ds = tl.where(seen, p * (dp - inner[:, None]) * exactly(alpha, alpha_low, ACC), 0.0)
    at = grad + row_offsets(i, grad_n1, grad_n2, grad_s0, grad_s1, grad_s2)[:, None] + j
    tl.store(at, ds.to(grad.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols))


# --- host ------------------------------------------------------------------------------------------------------------


def _shared(like: Tensor, alpha: float, causal: bool) -> _rows.Arguments:
    check_interpreter(like)
    cols = like.shape[-1]
    _rows.fits_one_program(cols)
    return {
        "rows": like.numel() // cols, "cols": cols, "rows_per_matrix": like.shape[-2] if like.dim() > 1 else 1,
        **two_parts(alpha=alpha), "CAUSAL": causal, "ACC": accumulator(like.dtype),
    }  # fmt: skip


def _tile(x: Tensor, size: int) -> _rows.Config:
    """With about `size` bytes of each tensor in a thread, as it is computed: rows of one warp wait for no other."""
    return _rows.tile(x.shape[-1], size // (8 if x.dtype == torch.float64 else 4))


def forward(scores: Tensor, mask: Tensor | None, alpha: float, causal: bool) -> Tensor:
    out = _registration.empty_rows(scores)
    if not scores.numel():
        return out
    shared, config = _shared(scores, alpha, causal), _tile(scores, 256)
    x, y = _rows.addressable(scores), _rows.addressable(out)
    seen = x if mask is None else _rows.addressable(mask.view(torch.uint8), contiguous_rows=False)
    launch(
        forward_kernel, (triton.cdiv(shared["rows"], config.m),), config,
        x=x, mask=seen, out=y, **_rows.row_strides(x=x, mask=seen, out=y), mask_col=seen.stride(-1),
        **shared, MASK=mask is not None, M=config.m, N=config.n,
    )  # fmt: skip
    return out if y is out else out.copy_(y)


def backward(dout: Tensor, out: Tensor, alpha: float, causal: bool) -> Tensor:
    grad = _registration.empty_rows(out)
    if not out.numel():
        return grad
    shared, config = _shared(out, alpha, causal), _tile(out, 128)
    dy, y, dx = (_rows.addressable(x) for x in (dout, out, grad))
    launch(
        backward_kernel, (triton.cdiv(shared["rows"], config.m),), config,
        dout=dy, out=y, grad=dx, **_rows.row_strides(dout=dy, out=y, grad=dx), **shared, M=config.m, N=config.n,
    )  # fmt: skip
    return grad if dx is grad else grad.copy_(dx)


register("cogview_ops_triton")
_registration.implement("pb_relax_softmax_fwd", forward, DEVICES)
_registration.implement("pb_relax_softmax_bwd", backward, DEVICES)
