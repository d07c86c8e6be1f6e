"""2D local attention in Triton: see cogview_ops/local_attention_2d.py for what it computes.

A program owns a patch of queries; the keys they see are the prefix, then a box of the coarse grid, then a box of the
image (_local_2d_pattern.py), in three loops that share one online softmax. Backward likewise owns patches of queries
for dq, and patches of keys for dk and dv: no atomics, the same bits each time.

Per head, with 9 x 9 windows on 64 x 64, D = 64, 16 bits: 64 queries (8 x 8) and a box of 16 x 16 keys, so 4 tiles of
64 keys hold the 81 that a query sees. Memory: q, k, v, out once, 2.1 MB (halos come from the L2 cache: 4 times k and v,
4.2 MB). Products: 4 * 4096 * 256 * 64 = 0.27 GFLOP. On an H200 (4.4 TB/s copied, 600 TFLOP/s with wgmma,
3.6 T exponentials/s) 0.5, 0.45 and 0.29 us: all three near one another, and masks (4 integer comparisons per score,
0.2 us) are not free. Backward reads q, k, v, out, dout and writes dq, dk, dv: 4.2 MB, 1 us, and seven products,
0.94 GFLOP, 1.6 us.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from .. import _namespaces, _registration
from .._local_options import TENSORS, WITH_GRADIENT, unflatten
from ..local_attention_2d import define_forward, register
from . import configs
from ._local_2d_call import Call, box_tiles, plus
from ._local_2d_forward import decode_kernel, forward_kernel
from ._local_2d_gradients import KeySet, grad_keys, grad_query
from ._tiles import (
    DEVICES,
    block_d,
    combine_kernel,
    contiguous,
    launch,
    number,
    power_of_4,
    readable,
    rows_of,
    scale_of,
)


def forward(q: Tensor, k: Tensor | None, v: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _registration.empty_attention(q)
    if not q.numel():
        return out, lse
    call = Call(q, k, v, unflatten(arguments[:TENSORS], arguments[TENSORS:]))
    config = call.config("forward")
    programs, shared = call.patches(config)
    scale = {"scale": scale_of(abs(call.scale)), "NEGATE": call.scale < 0}
    launch(forward_kernel, (programs,), config, q=rows_of(q), out=rows_of(out), lse=lse, **shared, **scale)
    return out, lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor | None, v: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    tensors, (out, lse, *numbers) = arguments[:TENSORS], arguments[TENSORS:]
    inputs = (q, k, v, *tensors[:WITH_GRADIENT])
    grads = [q.new_empty(0) if x is None else _registration.empty_rows(x) for x in inputs]
    if inputs[7] is not None:  # the table's is contiguous
        grads[7] = grads[7].new_empty(grads[7].shape)
    if not q.numel():
        return tuple(x.zero_() for x in grads)
    dout = readable(dout, out)
    call = Call(q, k, v, unflatten(tensors, tuple(numbers)))
    lse = lse.contiguous()
    rows = {"q": rows_of(q), "dout": rows_of(dout), "lse": lse, "delta": torch.empty_like(lse)}
    rows |= {"scale": scale_of(call.scale), "step": number(call.scale)}
    own = {"out": rows_of(out), "dlse": contiguous(dlse), "dq": rows_of(grads[0])}
    grad_query(call, rows | own, grads[7])
    if call.prefix is not None:  # longest first: every query sees it
        size = 1, call.prefix_len
        prefix = KeySet(call.prefix.keys, size, (1, 1), call.grid, call.prefix.bias, call.mask, dense=True)
        grad_keys(call, rows, prefix, *grads[3:5])
    if call.coarse is not None:
        coarse = KeySet(call.coarse.keys, call.coarse_grid, call.coarse_kernel, call.ratio, call.coarse.bias)
        grad_keys(call, rows, coarse, *grads[5:7])
    if call.local is not None:
        local = KeySet(call.local, call.grid, call.kernel, (1, 1), mask=call.key_mask, table=call.table)
        local = local._replace(dilation=call.dilation, causal=call.causal, shift=call.shift)
        grad_keys(call, rows, local, *grads[1:3])
    return tuple(grads)


def decode(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    out = _registration.empty_decode(q)
    if not q.numel():
        return out
    lengths, query_index, *numbers = arguments[TENSORS:]
    call = Call(q, k, v, unflatten(arguments[:TENSORS], tuple(numbers)))
    config = call.config("decode")
    steps = q.shape[2]
    # dilated or anywhere, steps are apart: a tile of rows is of one
    apart = call.dilation != (1, 1) or query_index is not None
    pitch = triton.cdiv(call.group, config.m) * config.m if apart else call.group
    row_tiles = triton.cdiv(steps * pitch, config.m)
    span = 1 if apart else min(steps, triton.cdiv(config.m, pitch) + 1)  # steps of a tile; several may cross rows
    patch = (1, 1) if span == 1 else (1 + triton.cdiv(span - 1, call.grid[1]), call.grid[1])
    above = call.kernel[0] // 2 if call.causal else call.kernel[0] - 1
    box = patch[0] + above, patch[1] + call.kernel[1] - 1
    tiles = triton.cdiv(call.prefix_len, config.n) + box_tiles(call.image, box, config.n)
    tiles += 0 if call.coarse is None else box_tiles(call.coarse_grid, plus(patch, call.coarse_kernel), config.n)
    shares = configs.splits(call.pairs * row_tiles, tiles, 64, call.device)
    share_size = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, share_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    part = torch.empty(shares, call.pairs, row_tiles * config.m, block_d(call.dim), dtype=dtype, device=call.device)
    shared: dict[str, Any] = {"part": part, "part_lse": part.new_empty(part.shape[:3])}
    shared |= {"kv_heads": call.kv_heads, "pitch": pitch, "steps": steps, "row_tiles": row_tiles}
    launch(
        decode_kernel,
        (call.pairs * row_tiles, shares),
        config,
        q=rows_of(q),
        lengths=lengths.contiguous(),
        query_index=contiguous(query_index),
        **shared,
        **call.query_side(patch, config, partial=query_index is not None or not call.causal),
        share_size=share_size,
        scale=scale_of(abs(call.scale)),
        NEGATE=call.scale < 0,
    )
    shared |= {"out": rows_of(out), "lse": None, "group": call.group, "shares": shares, "SHARES": power_of_4(shares)}
    launch(combine_kernel, (steps * call.group * call.pairs,), configs.SMALL, **shared, SHAPE=call.shape(config))
    return out


register(_namespaces.TRITON)
_registration.implement("local_attention_2d_fwd", forward, DEVICES)
_registration.implement("local_attention_2d_bwd", backward, DEVICES)
_registration.implement("local_attention_2d_decode", decode, DEVICES)
_registration.mix("local_attention_2d_fwd", define_forward)
