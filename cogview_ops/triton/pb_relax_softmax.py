"""PB-relax softmax in Triton: whole rows in registers, one read and one write; what is hidden is not read.

Memory. Rows lie at any offsets, their elements beside each other; of the mask both may have any stride, 0 too.
Rows of more than 16384 elements spill to local memory in the backward, of more than 32768 in the forward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _namespaces, _registration
from ..pb_relax_softmax import register
from . import _rows
from ._rows import load, matrix, row_starts, store, tile_of
from ._tiles import DEVICES, exactly, kernel, launch, number
from .configs import Config


@triton.jit
def visible_columns(tile, cols, rows_per_matrix):
    """How many leading columns rows see, causally in matrices of so many rows, or, with None, all; which elements they
    are, and which to read, in whole vectors."""
    n = tl.zeros_like(tile.i) + cols
    if rows_per_matrix is not None:
        n = tl.minimum(tl.maximum(tile.i % rows_per_matrix + cols - rows_per_matrix + 1, 0), cols)
    n = tl.where(tile.row, n, 0)
    return n, tile.j < n[:, None], (tile.j < (n + 15)[:, None] // 16 * 16) & (tile.j < cols)


@kernel
def forward_kernel(
    x, mask, mask_column, out, rows, cols, rows_per_matrix, alpha, ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    tile = tile_of(tl.program_id(0), rows, cols, M, N)
    visible, seen, near = visible_columns(tile, cols, rows_per_matrix)
    if mask is not None:
        at = row_starts(mask, tile) + tile.j.to(tl.int64) * mask_column
        seen = tl.load(at, mask=seen, other=0) != 0
    s = tl.where(seen, load(x, tile, near, ACC), float("-inf"))
    some = visible > 0 if mask is None else tl.max(seen.to(tl.int32), 1) > 0
    top = tl.where(some, tl.max(s, 1), 0.0)  # sees nothing: all exp(-inf) = 0
    p = tl.exp((s - top[:, None]) * exactly(alpha, ACC))
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0, 1.0, total)[:, None]
    store(out, tile, p)


@kernel
def backward_kernel(
    dout, out, grad, rows, cols, rows_per_matrix, alpha, ACC: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    tile = tile_of(tl.program_id(0), rows, cols, M, N)
    _, seen, near = visible_columns(tile, cols, rows_per_matrix)
    p = tl.where(seen, load(out, tile, near, ACC), 0.0)
    dp = tl.where(seen, load(dout, tile, near, ACC), 0.0)
    inner = tl.sum(p * dp, 1)
    ds = tl.where(seen, p * (dp - inner[:, None]) * exactly(alpha, ACC), 0.0)
    store(grad, tile, ds)


# --- host ------------------------------------------------------------------------------------------------------------


def _tiling(x: Tensor, size: int) -> Config:
    """With about `size` bytes of each tensor in a thread, as it is computed: rows of one warp wait for no other."""
    return _rows.tiling(x.shape[-1], size // (8 if x.dtype == torch.float64 else 4))


def _options(x: Tensor, alpha: float, causal: bool) -> dict[str, Any]:
    rows = x.shape[-2] if x.dim() > 1 else 1
    return {"rows_per_matrix": rows if causal else None, "alpha": number(alpha)}


def forward(scores: Tensor, mask: Tensor | None, alpha: float, causal: bool) -> Tensor:
    out = _registration.empty_rows(scores)
    if not scores.numel():
        return out
    config = _tiling(scores, 256)
    shared = _rows.shared(scores, config) | _options(scores, alpha, causal)
    made = matrix(out)
    seen = None if mask is None else matrix(mask.view(torch.uint8), contiguous_rows=False)
    shared |= {"mask": seen, "mask_column": None if seen is None else seen.at.stride(-1)}
    launch(forward_kernel, _rows.grid(scores, config), config, x=matrix(scores), out=made, **shared)
    return _rows.kept(out, made)


def backward(dout: Tensor, out: Tensor, alpha: float, causal: bool) -> Tensor:
    grad = _registration.empty_rows(out)
    if not out.numel():
        return grad
    config = _tiling(out, 128)
    shared = _rows.shared(out, config) | _options(out, alpha, causal)
    made = matrix(grad)
    launch(backward_kernel, _rows.grid(out, config), config, dout=matrix(dout), out=matrix(out), grad=made, **shared)
    return _rows.kept(grad, made)


register(_namespaces.TRITON)
_registration.implement("pb_relax_softmax_fwd", forward, DEVICES)
_registration.implement("pb_relax_softmax_bwd", backward, DEVICES)
