"""Plain-torch truth of every operator: differentiable any number of times, any device, any float dtype.

Run it on float64 inputs for the truth; on lower dtypes it is the plain formula in that dtype (float32
inside, where a fused kernel accumulates in float32, only where the formula itself says so). This is
`impl="reference"`; it materialises scores and is not fast.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import patterns
from ._local_options import Options


def pb_relax_softmax(scores: Tensor, *, alpha: float, mask: Tensor | None, causal: bool) -> Tensor:
    visible = _softmax_visible(scores, mask, causal)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    shift = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(())
    if visible is not None:
        shift = shift.masked_fill(~visible.any(-1, keepdim=True), 0)
    p = (alpha * (scores - shift)).exp()
    total = p.sum(-1, keepdim=True)
    return p / (total if visible is None else total.masked_fill(~visible.any(-1, keepdim=True), 1))


def _softmax_visible(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if causal:
        rows, cols = scores.shape[-2:]
        i = torch.arange(rows, device=scores.device)[:, None]
        j = torch.arange(cols, device=scores.device)
        triangle = patterns.causal(i, j, rows, cols)
        mask = triangle if mask is None else mask & triangle
    return None if mask is None else mask.expand(scores.shape)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, relax: str | None, weight_offset: float = 0.0
) -> Tensor:
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if relax is not None and x.numel():
        peak = x.detach().abs()
        c = peak.amax(-1, keepdim=True) if relax == "row" else peak.amax() / 8
        x = x / torch.where(c == 0, 1, c)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd * (weight + weight_offset) + bias


def linear_decode(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    if scale is not None:
        weight = (weight * scale[:, None]).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0, round_before_weight: bool = False
) -> Tensor:
    wide = x.to(_wide(x))
    out = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if round_before_weight:
        out = out.to(x.dtype)
    return (out * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def norm_step(
    branch: Tensor,
    residual: Tensor,
    post: Callable[[Tensor], Tensor] | None,
    pre: Callable[[Tensor], Tensor] | None,
    branch_scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    dropout_after_norm: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = residual + branch_scale * post(dropout(branch))`, `x = pre(h)`; without `pre` h twice."""

    def drop(x: Tensor) -> Tensor:
        if dropout_p == 0:
            return x
        assert seed is not None
        kept = dropout_mask(tuple(x.shape), dropout_p, seed, x.device)
        return x * kept / (1 - dropout_p) if dropout_p < 1 else x * 0

    y = branch if dropout_after_norm else drop(branch)
    y = y if post is None else post(y)
    y = drop(y) if dropout_after_norm else y
    h = (residual + branch_scale * y).to(residual.dtype)
    return h, h if pre is None else pre(h).to(branch.dtype)


def dropout_mask(shape: tuple[int, ...], p: float, seed: int | Tensor, device: torch.device) -> Tensor:
    """True = kept. Element i of the raster order uses word i % 4 of Philox4x32-10(key=seed, counter=i // 4); with a
    seed for each sample i counts within the sample."""
    one = not isinstance(seed, Tensor) or seed.numel() == 1
    total = math.prod(shape if one else shape[1:])
    counter = torch.arange((total + 3) // 4, dtype=torch.int64, device=device)
    words = torch.stack(_philox4x32(counter, seed.reshape(-1, 1) if isinstance(seed, Tensor) else seed), -1)
    return (words.flatten(-2)[..., :total] >= round(p * 2**32)).reshape(shape)


def _philox4x32(counter: Tensor, seed: int | Tensor) -> list[Tensor]:
    low = 0xFFFFFFFF
    c = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        h0, l0 = _mul_hi_lo(c[0], 0xD2511F53)
        h1, l1 = _mul_hi_lo(c[2], 0xCD9E8D57)
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    part = (a & 0xFFFF) * m
    rest = (a >> 16) * m + (part >> 16)
    return rest >> 16, ((rest & 0xFFFF) << 16) | (part & 0xFFFF)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | float, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over `mask` (True = attend), `bias` added to the scaled scores; rows without keys give 0.

    query `[B, H, Sq, D]`, key and value `[B, Hkv, Sk, D]`; mask and bias broadcast to `[B, H, Sq, Sk]`.
    Returns out `[B, H, Sq, D]` and lse `[B, H, Sq]` (float32, or float64 for float64).
    """
    group = query.shape[1] // max(key.shape[1], 1)
    if group != 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    # keys that no query sees may be what is left in a cache: NaN times zero is NaN
    unseen = ~mask.any(-2)[..., None]
    key, value = key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
    scores = (query * scale) @ key.transpose(-1, -2) + bias
    scores = scores.masked_fill(~mask, -math.inf)
    alive = mask.any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    if scores.shape[-1] == 0:
        return torch.zeros_like(query), query.sum(-1, dtype=_wide(query)) * 0 - math.inf
    wide = scores.to(_wide(query))
    lse = torch.logsumexp(wide.masked_fill(~alive, 0), -1).masked_fill(~alive[..., 0], -math.inf)
    p = torch.softmax(wide.masked_fill(~alive, 0), -1).masked_fill(~alive, 0)
    return p.to(value.dtype) @ value, lse


def _wide(x: Tensor) -> torch.dtype:
    """What kernels accumulate in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def three_region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
    query_pos: Tensor | None = None,
    begins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`query_pos` `[B, Sq]` places the queries among the keys; default: one query per key, in order. `begins` `[B]` is
    where position 0 is."""
    if query_pos is None:
        query_pos = torch.arange(query.shape[2], device=query.device)[None]
    if begins is not None:
        query_pos = query_pos - begins[:, None]
    masks = patterns.three_region_masks(query_pos, key.shape[2], pivots, block_size, window_blocks)
    window, pivot = (x if begins is None else _moved(x, begins) for x in masks)
    mask = (window | pivot)[:, None]
    return masked_attention(query, key, value, mask, pivot[:, None].to(query.dtype) * pivot_bias, scale)


def _moved(mask: Tensor, begins: Tensor) -> Tensor:
    """`mask` `[B, Sq, K]` of keys from `begins` `[B]` on as one of keys from 0 on."""
    position = (torch.arange(mask.shape[2], device=mask.device) - begins[:, None])[:, None]
    return mask.gather(2, position.clamp(min=0).expand_as(mask)) & (position >= 0)


def three_region_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pivots: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    window_blocks: int,
    pivot_bias: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Of packed sequences: out `[total, H, D]`, lse `[H, total]`."""
    window, pivot = patterns.three_region_packed_masks(pivots, cu_seqlens, query.shape[0], block_size, window_blocks)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    bias = pivot.to(query.dtype) * pivot_bias
    out, lse = masked_attention(query, key, value, window | pivot, bias, scale)
    return out[0].transpose(0, 1), lse[0]


def local_attention_2d(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    options: Options,
    query_pos: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`query_pos` `[B, Sq]` are the raster indices of the queries, default: the whole grid; `cache_seqlens` `[B]`: how
    many cells there are to see, default: all."""
    window, prefix, coarse, scale, table, key_mask = options
    if query_pos is None:
        query_pos = torch.arange(query.shape[2], device=query.device)[None]
    batch, num_queries = query.shape[0], query.shape[2]
    i = query_pos[:, :, None]

    def indices(x: Tensor) -> Tensor:
        return torch.arange(x.shape[2], device=x.device)

    def equal(x: Tensor, bias: float) -> Tensor:
        return query.new_full((1, 1, 1, x.shape[2]), bias)

    keys, values, masks, biases = [], [], [], []
    if key is not None and value is not None:
        j = indices(key)
        local = patterns.local_2d(i, j, **window._asdict())
        if key_mask is not None:
            local = local & key_mask[:, None]
        if cache_seqlens is not None:
            local = local & (j < cache_seqlens[:, None, None])
        keys, values, masks, biases = [key], [value], [local], [equal(key, 0.0)]
        if table is not None:
            row, column = patterns.relative_2d(i, j, **_only(window, "grid", "kernel_size", "dilation"))
            biases = [table[:, row, column].transpose(0, 1)]
    if prefix is not None:
        visible = torch.ones(1, prefix.key.shape[2], dtype=torch.bool, device=query.device)
        keys.insert(0, prefix.key)
        values.insert(0, prefix.value)
        masks.insert(0, (visible if prefix.mask is None else prefix.mask)[:, None])
        biases.insert(0, equal(prefix.key, prefix.bias))
    if coarse is not None:
        near = patterns.coarse_2d(
            i, indices(coarse.key), grid=window.grid, coarse_grid=coarse.grid, kernel_size=coarse.kernel_size
        )
        keys.append(coarse.key)
        values.append(coarse.value)
        masks.append(near)
        biases.append(equal(coarse.key, coarse.bias))
    mask = torch.cat([m.expand(batch, num_queries, -1) for m in masks], -1)[:, None]
    size = torch.broadcast_shapes(*(x.shape[:3] for x in biases))
    bias = torch.cat([x.expand(*size, -1) for x in biases], -1)
    return masked_attention(query, torch.cat(keys, 2), torch.cat(values, 2), mask, bias, scale)


def _only(options: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def dalle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_mask: Tensor | None,
    scale: float,
    query_pos: Tensor | None = None,
    **pattern: Any,
) -> Tensor:
    """`query_pos` `[B, Sq]` places the queries in the sequence; default: one query per key, in order."""
    i = torch.arange(query.shape[2], device=query.device)[None] if query_pos is None else query_pos
    mask = patterns.dalle(i[..., None], torch.arange(key.shape[2], device=key.device), **pattern)
    return masked_attention(query, key, value, _hide_padding(mask, i, text_mask), 0.0, scale)[0]


def cogview2_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_mask: Tensor | None,
    biases: tuple[float, float],
    scale: float,
    **pattern: Any,
) -> Tensor:
    """biases: of image and text, and of image and coarse image."""
    i = torch.arange(query.shape[2], device=query.device)
    mask = patterns.cogview2(i[:, None], i, **pattern)[None]
    level = patterns.cogview2_level(i, pattern["text_len"], pattern["coarse_grid"])
    to_text = (level[:, None] > 0) & (level == 0)
    to_coarse = (level[:, None] == 2) & (level == 1)
    bias = to_text.to(query.dtype) * biases[0] + to_coarse.to(query.dtype) * biases[1]
    return masked_attention(query, key, value, _hide_padding(mask, i[None], text_mask), bias, scale)[0]


def _hide_padding(mask: Tensor, query_pos: Tensor, text_mask: Tensor | None) -> Tensor:
    """`mask` `[1 or B, Sq, Sk]` without the text tokens that only themselves may see; `[B, 1, Sq, Sk]`."""
    if text_mask is not None:
        seen = torch.nn.functional.pad(text_mask, (0, mask.shape[-1] - text_mask.shape[1]), value=True)[:, None]
        mask = mask & (seen | (query_pos[..., None] == torch.arange(mask.shape[-1], device=mask.device)))
    return mask[:, None]
