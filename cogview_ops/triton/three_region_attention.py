"""Three-region attention in Triton: see cogview_ops/three_region_attention.py for what it computes.

A query tile's keys are two contiguous runs: the visible pivots, a prefix of a copy of their rows, and the window
(_three_region_pattern.py). Two loops, of edge tiles and of full ones, go over both.

Backward owns keys: a pivot's gradient is one program's sum over all queries that see it (or a few programs', over
fixed parts of them), a window key's likewise, and the second starts from the first's float32 result: no atomics.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .. import _registration
from .._three_region_operators import define_forward, register
from . import configs
from ._three_region_backward import grad_key_kernel, grad_query_kernel
from ._three_region_forward import decode_kernel, forward_kernel
from ._three_region_pattern import gather_kernel, rank_kernel
from ._tiles import (
    DEVICES,
    Keys,
    Shape,
    accumulator,
    block_d,
    check_interpreter,
    combine_kernel,
    launch,
    logit,
    number,
    power_of_4,
    rows_of,
    scale_of,
    section,
    wide,
)

PIVOT_ROWS = 128  # copies of pivot rows are allocated in multiples of this, the most rows of a tile


class _Call:
    """What the kernels of one call share: clamped sizes, keys, the rank table, the pivots' copies."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, *numbers: Any) -> None:
        check_interpreter(q)
        self.device, self.element_size = q.device, q.element_size()
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads, self.seqlen = k.shape[1], k.shape[2]
        self.group, self.pairs = self.heads // self.kv_heads, self.batch * self.kv_heads
        self.keys = Keys(rows_of(k), rows_of(v))
        block_size, window_blocks, pivot_bias, self.scale = numbers
        # larger ones mean the same, and products stay below 2**31; a pivot beyond the first S is no pivot
        block_size = min(block_size, self.seqlen)
        window_blocks = min(window_blocks, triton.cdiv(self.seqlen, block_size))
        self.window = block_size * window_blocks
        self.pivots = pivots[:, : self.seqlen].contiguous()
        self.num_pivots = self.pivots.shape[1]
        # with copies or without
        self.room = triton.cdiv(self.num_pivots, PIVOT_ROWS) * PIVOT_ROWS if self.window < self.seqlen else 0
        self.pattern = {"block_size": block_size, "window_blocks": window_blocks, "bias": logit(pivot_bias)}
        self.acc = accumulator(q.dtype)

    def config(self, kernel: str) -> configs.Config:
        return configs.lookup(kernel, configs.chip(self.device), self.element_size, block_d(self.dim))

    def shape(self, config: configs.Config, *tensors: Tensor) -> Shape:
        return Shape(self.dim, block_d(self.dim), config.m, config.n, wide(*tensors))

    def rank(self) -> Tensor:
        rank = torch.empty(self.batch, self.seqlen + 1, dtype=torch.int32, device=self.device)
        sizes = {"num_pivots": self.num_pivots, "seqlen": self.seqlen, "steps": self.num_pivots.bit_length()}
        grid = (triton.cdiv(self.seqlen + 1, 256) * self.batch,)
        launch(rank_kernel, grid, configs.SMALL, pivots=self.pivots, rank=rank, **sizes, ROWS=256)
        return rank

    def copies(self) -> Keys:
        """Rows of keys and values at the pivots, contiguous.

        A copy moves 4 * P * D * size bytes per head, once; every query tile behind the window then reads runs of rows
        as it does in the window, not one row at an address that it must first load.
        """
        shape = (self.batch, self.kv_heads, self.room, block_d(self.dim))
        copies = Keys(*(x.at.new_empty(shape) for x in self.keys))
        if self.room:
            launch(
                gather_kernel,
                (self.room // 32 * self.pairs,),
                configs.SMALL,
                keys=self.keys,
                pivots=self.pivots,
                copies=copies,
                kv_heads=self.kv_heads,
                num_pivots=self.num_pivots,
                room=self.room,
                seqlen=self.seqlen,
                D=self.dim,
                BLOCK_D=block_d(self.dim),
                ROWS=32,
            )
        return copies

    def tiles(self, config: configs.Config) -> tuple[int, dict[str, Any]]:
        """Programs, and arguments, of the kernels that own a tile of queries each."""
        total = self.batch * self.heads
        launched = {"heads": self.heads, "group": self.group, "total_heads": total}
        launched |= {"section": section(total, self.group, self.keys.k.at), "seqlen": self.seqlen, "room": self.room}
        shared = {"keys": self.keys, "copies": self.copies(), **launched, **self.pattern, "ACC": self.acc}
        return triton.cdiv(self.seqlen, config.m) * total, shared


def forward(q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    out, lse = _registration.empty_attention(q)
    if not q.numel():
        return out, lse
    call = _Call(q, k, v, pivots, *numbers)
    config = call.config("forward")
    programs, shared = call.tiles(config)
    shared |= {"scale": scale_of(abs(call.scale)), "NEGATE": call.scale < 0, "SHAPE": call.shape(config, q, k, v)}
    launch(forward_kernel, (programs,), config, q=rows_of(q), rank=call.rank(), out=rows_of(out), lse=lse, **shared)
    return out, lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, pivots, *numbers = arguments
    dq, dk, dv = (_registration.empty_rows(x) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    call = _Call(q, k, v, pivots, *numbers)
    tensors = q, k, v, dout, out
    rows = {"q": rows_of(q), "rank": call.rank(), "dout": rows_of(dout), "lse": lse, "delta": torch.empty_like(lse)}
    rows |= {"scale": scale_of(call.scale), "step": number(call.scale)}
    config = call.config("grad_query")
    programs, shared = call.tiles(config)
    launch(
        grad_query_kernel,
        (programs,),
        config,
        **rows,
        **shared,
        out=rows_of(out),
        dlse=None if dlse is None else dlse.contiguous(),
        dq=rows_of(dq),
        SHAPE=call.shape(config, *tensors),
    )
    del shared  # the copies' memory is free for the parts
    config = call.config("grad_pivot")
    programs = triton.cdiv(min(call.room, call.num_pivots), config.n) * call.pairs
    splits = configs.splits(programs, triton.cdiv(call.seqlen, config.m) * call.group, 8, call.device)
    shape = (splits, call.pairs, call.room, block_d(call.dim))
    rows |= {
        "keys": call.keys,
        "pivots": call.pivots,
        "parts": Keys(lse.new_empty(shape), lse.new_empty(shape)),
        "grads": Keys(rows_of(dk), rows_of(dv)),
        "kv_heads": call.kv_heads,
        "group": call.group,
        "total_kv_heads": call.pairs,
        "section": section(call.pairs, 1, q),
        "seqlen": call.seqlen,
        "num_pivots": call.num_pivots,
        "room": call.room,
        **call.pattern,
        "ACC": call.acc,
    }
    if call.room:
        kind = {"splits": splits, "PIVOT": True, "SHAPE": call.shape(config, *tensors)}
        launch(grad_key_kernel, (programs, splits), config, **rows, **kind)
    config = call.config("grad_key")
    kind = {"splits": splits if call.room else 0, "PIVOT": False, "SHAPE": call.shape(config, *tensors)}
    launch(grad_key_kernel, (triton.cdiv(call.seqlen, config.n) * call.pairs, 1), config, **rows, **kind)
    return dq, dk, dv


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivots: Tensor,
    cache_seqlens: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
    cache_leftpad: Tensor | None = None,
) -> Tensor:
    if cache_leftpad is not None:
        raise NotImplementedError("cache_leftpad has no Triton kernel yet; impl='reference' can")
    numbers = block_size, window_blocks, pivot_bias, scale
    out = _registration.empty_decode(q)
    if not q.numel():
        return out
    call = _Call(q, k, v, pivots, *numbers)
    config = call.config("decode")
    steps = q.shape[2]
    row_tiles = triton.cdiv(steps * call.group, config.m)
    # the window of a tile's rows is at most that of one row and the steps between them
    window = call.window + min(steps, triton.cdiv(config.m, call.group) + 1)
    pivot_tiles = triton.cdiv(call.num_pivots, config.n)
    tiles = pivot_tiles + triton.cdiv(min(window, call.seqlen), config.n)
    # five fit a multiprocessor of an H100: 64.6 us with two shares of 320 heads' keys, 71.6 with one
    shares = configs.splits(call.pairs * row_tiles, tiles, 64, call.device, resident=5)
    share_size = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, share_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    part = torch.empty(shares, call.pairs, row_tiles * config.m, block_d(call.dim), dtype=dtype, device=call.device)
    part_lse = torch.empty(part.shape[:3], dtype=dtype, device=call.device)
    shared = {"part": part, "part_lse": part_lse, "kv_heads": call.kv_heads, "group": call.group, "steps": steps}
    shared |= {"row_tiles": row_tiles, "SHAPE": call.shape(config)}
    launch(
        decode_kernel,
        (call.pairs * row_tiles, shares),
        config,
        q=rows_of(q),
        keys=call.keys,
        pivots=call.pivots,
        lengths=cache_seqlens.contiguous(),
        **shared,
        num_pivots=call.num_pivots,
        capacity=call.seqlen,
        **call.pattern,
        pivot_tiles=pivot_tiles,
        tiles=tiles,
        share_size=share_size,
        scale=scale_of(abs(call.scale)),
        NEGATE=call.scale < 0,
        ACC=call.acc,
    )
    join = {"out": rows_of(out), "pitch": call.group, "shares": shares, "SHARES": power_of_4(shares)}
    launch(combine_kernel, (steps * call.group * call.pairs,), configs.SMALL, **shared, **join)
    return out


register("cogview_ops_triton")
_registration.implement("three_region_attention_fwd", forward, DEVICES)
_registration.implement("three_region_attention_bwd", backward, DEVICES)
_registration.implement("three_region_attention_decode", decode, DEVICES)
_registration.mix("three_region_attention_fwd", define_forward)
