"""Three-region attention in Triton: see cogview_ops/three_region_attention.py for what it computes.

A query tile's keys are two contiguous runs: the visible pivots, a prefix of a copy of their rows, and the window
(_three_region_pattern.py). One loop goes over both.

Backward owns keys: a pivot's gradient is one program's sum over all queries that see it (or a few programs', over
fixed parts of them), a window key's likewise, and the second starts from the first's float32 result: no atomics.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _registration
from ..three_region_attention import register
from . import configs
from ._three_region_backward import grad_key_kernel, grad_query_kernel
from ._three_region_forward import decode_kernel, forward_kernel
from ._three_region_pattern import gather_kernel, rank_kernel
from ._tiles import (
    DEVICES,
    accumulator,
    block_d,
    check_interpreter,
    combine_kernel,
    launch,
    power_of_4,
    rows_of,
    section,
    strides,
    two_parts,
    wide,
)

PIVOT_ROWS = 128  # copies of pivot rows are allocated in multiples of this, the most rows of a tile


class _Call:
    """What the kernels of one call share: clamped sizes, the rank table, the pivots' copies."""

    def __init__(self, q: Tensor, k: Tensor, pivots: Tensor, block_size: int, window_blocks: int) -> None:
        check_interpreter(q)
        self.arch = configs.chip(q.device)
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads, self.seqlen = k.shape[1], k.shape[2]
        # larger ones mean the same, and products stay below 2**31; a pivot beyond the first S is no pivot
        self.block_size = min(block_size, self.seqlen)
        self.window_blocks = min(window_blocks, triton.cdiv(self.seqlen, self.block_size))
        self.pivots = pivots[:, : self.seqlen].contiguous()
        self.num_pivots = self.pivots.shape[1]
        self.pattern = {"block_size": self.block_size, "window_blocks": self.window_blocks}
        self.shape = {"D": self.dim, "BLOCK_D": block_d(self.dim), "ACC": accumulator(q.dtype)}

    def config(self, kernel: str, q: Tensor) -> configs.Config:
        return configs.lookup(kernel, self.arch, q.element_size(), block_d(self.dim))

    def rank(self) -> Tensor:
        rank = torch.empty(self.batch, self.seqlen + 1, dtype=torch.int32, device=self.pivots.device)
        steps, rows = self.num_pivots.bit_length(), 256
        launch(
            rank_kernel, (triton.cdiv(self.seqlen + 1, rows) * self.batch,), configs.SMALL,
            pivots=self.pivots, rank=rank, num_pivots=self.num_pivots, seqlen=self.seqlen, steps=steps, ROWS=rows,
        )  # fmt: skip
        return rank

    def copies(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Rows of k and v at the pivots, contiguous, and how many there is room for.

        A copy moves 4 * P * D * size bytes per head, once; every query tile behind the window then reads runs of rows
        as it does in the window, not one row at an address that it must first load.
        """
        seen = self.num_pivots if self.block_size * self.window_blocks < self.seqlen else 0
        room = triton.cdiv(seen, PIVOT_ROWS) * PIVOT_ROWS
        shape = (self.batch, self.kv_heads, room, self.shape["BLOCK_D"])
        pivot_k, pivot_v, rows = k.new_empty(shape), v.new_empty(shape), 32
        if room:
            launch(
                gather_kernel, (room // rows * self.batch * self.kv_heads,), configs.SMALL,
                k=k, v=v, pivots=self.pivots, pivot_k=pivot_k, pivot_v=pivot_v, **strides(k=k, v=v),
                kv_heads=self.kv_heads, num_pivots=self.num_pivots, room=room, seqlen=self.seqlen,
                D=self.dim, BLOCK_D=self.shape["BLOCK_D"], ROWS=rows,
            )  # fmt: skip
        return pivot_k, pivot_v, room


def forward(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor,
    block_size: int, window_blocks: int, pivot_bias: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _registration.empty_attention(q)
    if not q.numel():
        return out, lse
    call = _Call(q, k, pivots, block_size, window_blocks)
    config = call.config("forward", q)
    pivot_k, pivot_v, room = call.copies(k, v)
    group, total = call.heads // call.kv_heads, call.batch * call.heads
    launch(
        forward_kernel, (triton.cdiv(call.seqlen, config.m) * total,), config,
        q=q, k=k, v=v, pivot_k=pivot_k, pivot_v=pivot_v, rank=call.rank(), out=out, lse=lse,
        **strides(q=q, k=k, v=v, out=out), heads=call.heads, group=group, total_heads=total,
        section=section(total, group, k), seqlen=call.seqlen, room=room, **call.pattern,
        **_logits(abs(scale), pivot_bias), NEGATE=scale < 0, WIDE=wide(q, k, v), **call.shape, M=config.m, N=config.n,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pivots: Tensor,
    block_size: int, window_blocks: int, pivot_bias: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (_registration.empty_rows(x) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    call = _Call(q, k, pivots, block_size, window_blocks)
    config = call.config("grad_query", q)
    pivot_k, pivot_v, room = call.copies(k, v)
    rank, delta = call.rank(), torch.empty_like(lse)
    group, total = call.heads // call.kv_heads, call.batch * call.heads
    numbers = {**_logits(scale, pivot_bias), **two_parts(step=scale)}
    shared: dict[str, Any] = {
        "q": q, "k": k, "v": v, "rank": rank, "dout": dout, "lse": lse, "delta": delta,
        "section": section(total, group, k), "seqlen": call.seqlen, "room": room, **call.pattern, **numbers,
        "WIDE": wide(q, k, v, dout, out), **call.shape,
    }  # fmt: skip
    launch(
        grad_query_kernel, (triton.cdiv(call.seqlen, config.m) * total,), config,
        **shared, pivot_k=pivot_k, pivot_v=pivot_v, out=out, dlse=lse if dlse is None else dlse.contiguous(), dq=dq,
        **strides(q=q, k=k, v=v, out=out, dout=dout, dq=dq), heads=call.heads, group=group, total_heads=total,
        HAS_DLSE=dlse is not None, M=config.m, N=config.n,
    )  # fmt: skip
    del pivot_k, pivot_v
    pairs = call.batch * call.kv_heads
    pivot_config = call.config("grad_pivot", q)
    pivot_programs = triton.cdiv(min(room, call.num_pivots), pivot_config.n) * pairs
    splits = configs.splits(pivot_programs, triton.cdiv(call.seqlen, pivot_config.m) * group, 8, q.device)
    parts = [torch.empty(splits, pairs, room, block_d(call.dim), dtype=lse.dtype, device=q.device) for _ in "kv"]
    shared |= {
        "pivots": call.pivots, "part_k": parts[0], "part_v": parts[1], "dk": dk, "dv": dv,
        **strides(q=q, k=k, v=v, dout=dout, dk=dk, dv=dv), "section": section(pairs, 1, q),
        "kv_heads": call.kv_heads, "total_kv_heads": pairs, "num_pivots": call.num_pivots,
        "splits": splits, "group": group,
    }  # fmt: skip
    if room:
        grid = (pivot_programs, splits)
        launch(grad_key_kernel, grid, pivot_config, **shared, PIVOT=True, M=pivot_config.m, N=pivot_config.n)
    config = call.config("grad_key", q)
    shared["splits"] = splits if room else 0
    grid = (triton.cdiv(call.seqlen, config.n) * pairs, 1)
    launch(grad_key_kernel, grid, config, **shared, PIVOT=False, M=config.m, N=config.n)
    return dq, dk, dv


def decode(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, cache_seqlens: Tensor,
    block_size: int, window_blocks: int, pivot_bias: float, scale: float,
) -> Tensor:  # fmt: skip
    out = _registration.empty_decode(q)
    if not q.numel():
        return out
    call = _Call(q, k, pivots, block_size, window_blocks)
    config = call.config("decode", q)
    steps, group, pairs = q.shape[2], call.heads // call.kv_heads, call.batch * call.kv_heads
    row_tiles = triton.cdiv(steps * group, config.m)
    # the window of a tile's rows is at most that of one row and the steps between them
    window = call.block_size * call.window_blocks + min(steps, triton.cdiv(config.m, group) + 1)
    pivot_tiles = triton.cdiv(call.num_pivots, config.n)
    tiles = pivot_tiles + triton.cdiv(min(window, call.seqlen), config.n)
    shares = configs.splits(pairs * row_tiles, tiles, 64, q.device)
    share_size = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, share_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    part = torch.empty(shares, pairs, row_tiles * config.m, block_d(call.dim), dtype=dtype, device=q.device)
    part_lse = torch.empty(part.shape[:3], dtype=dtype, device=q.device)
    launch(
        decode_kernel, (pairs * row_tiles, shares), config,
        q=q, k=k, v=v, pivots=call.pivots, lengths=cache_seqlens.contiguous(), part=part, part_lse=part_lse,
        **strides(q=q, k=k, v=v), kv_heads=call.kv_heads, group=group, steps=steps, row_tiles=row_tiles,
        num_pivots=call.num_pivots, capacity=call.seqlen, **call.pattern, pivot_tiles=pivot_tiles, tiles=tiles,
        share_size=share_size, **_logits(abs(scale), pivot_bias), NEGATE=scale < 0, **call.shape,
        M=config.m, N=config.n,
    )  # fmt: skip
    launch(
        combine_kernel, (steps * group * pairs,), configs.SMALL,
        part=part, part_lse=part_lse, out=rows_of(out), kv_heads=call.kv_heads, group=group, pitch=group,
        steps=steps, row_tiles=row_tiles, shares=shares, D=call.dim, BLOCK_D=block_d(call.dim),
        SHARES=power_of_4(shares), M=config.m,
    )  # fmt: skip
    return out


def _logits(scale: float, pivot_bias: float) -> dict[str, float]:
    """`scale` and `bias` in base 2. Not quite 0: masked scores, -inf, must stay below all others."""
    return two_parts(scale=scale / math.log(2) or 1e-30, bias=pivot_bias / math.log(2))


register("cogview_ops_triton")
_registration.implement("three_region_attention_fwd", forward, DEVICES)
_registration.implement("three_region_attention_bwd", backward, DEVICES)
_registration.implement("three_region_attention_decode", decode, DEVICES)
