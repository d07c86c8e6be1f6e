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

from .. import _namespaces, _registration
from .._three_region_operators import define_forward, define_varlen_forward, empty_varlen, register
from . import configs
from ._three_region_backward import grad_key_kernel, grad_query_kernel
from ._three_region_call import Call, samples
from ._three_region_forward import decode_kernel, forward_kernel
from ._tiles import (
    DEVICES,
    Keys,
    block_d,
    combine_kernel,
    contiguous,
    launch,
    number,
    power_of_4,
    readable,
    rows_of,
    scale_of,
    section,
)


def forward(q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, *numbers: Any) -> tuple[Tensor, Tensor]:
    out, lse = _registration.empty_attention(q)
    if q.numel():
        _forward(Call(q, k, v, pivots, numbers), q, out, lse)
    return out, lse


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, pivots: Tensor, cu_seqlens: Tensor, max_seqlen: int, *numbers: Any
) -> tuple[Tensor, Tensor]:
    out, lse = empty_varlen(q)
    if q.numel() and len(pivots):
        rows = samples(q)
        _forward(Call(rows, samples(k), samples(v), pivots, numbers, cu_seqlens, max_seqlen), rows, samples(out), lse)
    return out, lse


def _forward(call: Call, q: Tensor, out: Tensor, lse: Tensor) -> None:
    config = call.config("forward")
    programs, shared = call.tiles(config)
    shared |= {"scale": scale_of(abs(call.scale)), "NEGATE": call.scale < 0}
    shared |= {"SHAPE": call.shape(config, q, call.keys.k.at, call.keys.v.at)}
    launch(forward_kernel, (programs,), config, q=rows_of(q), rank=call.rank(), out=rows_of(out), lse=lse, **shared)


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lse, pivots, *numbers = rest
    dq, dk, dv = (_registration.empty_rows(x) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    call = Call(q, k, v, pivots, tuple(numbers))
    _backward(call, q, out, readable(dout, out), lse, dlse, dq, dk, dv)
    return dq, dk, dv


def varlen_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lse, pivots, cu_seqlens, max_seqlen, *numbers = rest
    dq, dk, dv = (_registration.empty_rows(x) for x in (q, k, v))
    if not q.numel() or not len(pivots):
        return dq, dk.zero_(), dv.zero_()
    call = Call(samples(q), samples(k), samples(v), pivots, tuple(numbers), cu_seqlens, max_seqlen)
    rows = samples(q), samples(out), samples(readable(dout, out))
    _backward(call, *rows, lse, dlse, samples(dq), samples(dk), samples(dv))
    return dq, dk, dv


def _backward(
    call: Call,
    q: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    tensors, lse = (q, call.keys.k.at, call.keys.v.at, dout, out), lse.contiguous()
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
        dlse=contiguous(dlse),
        dq=rows_of(dq),
        SHAPE=call.shape(config, *tensors),
    )
    del shared  # the copies' memory is free for the parts
    config = call.config("grad_pivot")
    programs, splits = call.pivot_tiles(config)
    shape = (splits, call.pairs, call.rows, block_d(call.dim))
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
        **call.packed,
        **call.pattern,
        "ACC": call.acc,
    }
    if call.room:
        kind = {"splits": splits, "PIVOT": True, "SHAPE": call.shape(config, *tensors)}
        launch(grad_key_kernel, (programs, splits), config, **rows, **kind)
    config = call.config("grad_key")
    kind = {"splits": splits if call.room else 0, "PIVOT": False, "SHAPE": call.shape(config, *tensors)}
    launch(grad_key_kernel, (call.token_tiles(config.n) * call.pairs, 1), config, **rows, **kind)


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
) -> tuple[Tensor, Tensor]:
    out, lse = _registration.empty_attention(q)
    if not q.numel():
        return out, lse
    call = Call(q, k, v, pivots, (block_size, window_blocks, pivot_bias, scale))
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
        leftpad=contiguous(cache_leftpad),
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
    join = {"out": rows_of(out), "lse": lse, "pitch": call.group, "shares": shares, "SHARES": power_of_4(shares)}
    launch(combine_kernel, (steps * call.group * call.pairs,), configs.SMALL, **shared, **join)
    return out, lse


register(_namespaces.TRITON)
_registration.implement("three_region_attention_fwd", forward, DEVICES)
_registration.implement("three_region_attention_bwd", backward, DEVICES)
_registration.implement("three_region_attention_varlen_fwd", varlen_forward, DEVICES)
_registration.implement("three_region_attention_varlen_bwd", varlen_backward, DEVICES)
_registration.implement("three_region_attention_decode", decode, DEVICES)
_registration.mix("three_region_attention_fwd", define_forward)
_registration.mix("three_region_attention_varlen_fwd", define_varlen_forward)
