"""What the operators are compared with: plain formulas, SDPA, FlexAttention; packages.py has other packages. Masks are
bool, True = attend."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import patterns


def vanilla_attention(mask: Tensor | None) -> Callable[..., Tensor]:
    """softmax(q k' / sqrt(d)) v with the whole score matrix in memory."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ value

    return attention


def sdpa(mask: Tensor | None = None, causal: bool = False, backend: SDPBackend | None = None) -> Callable[..., Tensor]:
    """`backend`: the one to use, or to fail with; torch's choice by default."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )

    return attention


def gathered_sdpa(mask: Tensor) -> Callable[..., Tensor]:
    """SDPA over the keys of `mask` `[B, 1, 1, Sk]` alone, copied side by side: CogView's way to decode."""
    visible = mask[:, 0, 0]
    count = int(visible.sum(-1).max())
    index = visible.int().argsort(descending=True, stable=True)[:, None, :count, None]
    padding = None if bool((visible.sum(-1) == count).all()) else mask.gather(-1, index.mT)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
        return sdpa(padding)(query, key, value)

    return attention


def of_packed(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention of one long sequence, `[1, H, total, D]`, on packed ones, `[total, H, D]`."""
    return lambda *tensors: attention(*(x.transpose(0, 1)[None] for x in tensors))[0].transpose(0, 1)


def of_padded(attention: Callable[..., Tensor], lengths: Sequence[int]) -> Callable[..., Tensor]:
    """An attention of a batch on packed sequences: put into a batch as long as the longest, and taken out again."""
    ends = torch.tensor(lengths).cumsum(0)
    place = torch.arange(int(ends[-1]))
    row = torch.searchsorted(ends, place, right=True)
    index = row * max(lengths) + place - (ends - torch.tensor(lengths))[row]
    equal = len(set(lengths)) == 1  # then a batch is but another shape

    def batch(x: Tensor) -> Tensor:
        rows = x if equal else x.new_zeros(len(lengths) * max(lengths), *x.shape[1:]).index_copy(0, index, x)
        return rows.unflatten(0, (len(lengths), -1)).transpose(1, 2)

    def call(*tensors: Tensor) -> Tensor:
        out = attention(*map(batch, tensors)).transpose(1, 2).flatten(0, 1)
        return out if equal else out[index]

    return call


def published_three_region(
    pivots: Tensor, block_size: int, window_blocks: int, pivot_bias: float = 0.0
) -> Callable[..., Tensor]:
    """CogView's own training formula: pivots gathered, a window of padded keys for each block, all scores side by side
    in one softmax. Sequences must be a multiple of the block."""

    def windows(x: Tensor) -> Tensor:
        """`[B, H, S / block, window, D]`, overlapping."""
        return (
            F.pad(x, (0, 0, (window_blocks - 1) * block_size, 0)).unfold(2, window_blocks * block_size, block_size).mT
        )

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, seqlen, dim = query.shape
        if seqlen % block_size:
            raise ValueError(f"{seqlen} tokens are no multiple of the block of {block_size}")
        position = torch.arange(seqlen, device=query.device)
        index = pivots.clamp(min=0).long()[:, None, :, None].expand(-1, heads, -1, dim)
        seen = patterns.three_region_pivot(position[:, None], pivots[:, None, :], block_size, window_blocks)
        far = query @ key.gather(2, index).mT * dim**-0.5 + pivot_bias
        far = far.masked_fill(~seen[:, None], float("-inf"))
        keys = windows(position[None, None, :, None] + 1)[0, 0, :, :, 0] - 1  # positions; -1 is padding
        seen = (keys[:, None] >= 0) & (keys[:, None] <= position.view(-1, block_size, 1))
        near = query.unflatten(2, (-1, block_size)) @ windows(key).mT * dim**-0.5
        near = near.masked_fill(~seen, float("-inf")).flatten(2, 3)
        p_far, p_near = torch.cat([far, near], -1).softmax(-1).split([far.shape[-1], near.shape[-1]], -1)
        out = p_far @ value.gather(2, index)
        return out + (p_near.unflatten(2, (-1, block_size)) @ windows(value)).flatten(2, 3)

    return attention


def joined(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention over the keys and values of a coarse image behind those of the image."""
    return lambda query, key, value, *coarse: attention(
        query, *(torch.cat(both, 2) for both in zip((key, value), coarse, strict=True))
    )


def _neighbours(
    grid: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int], raster_causal: bool
) -> tuple[Tensor, list[Any], tuple[int, int]]:
    """Which neighbours exist, bool `[H, W, K]`, and where each lies in an image padded by so many rows and columns."""
    (kh, kw), (dy, dx) = kernel_size, dilation
    places = [(slice(y * dy, y * dy + grid[0]), slice(x * dx, x * dx + grid[1])) for y in range(kh) for x in range(kw)]
    if raster_causal:
        places = places[: kh * kw // 2 + 1]
    padding = kh // 2 * dy, kw // 2 * dx
    inside = F.pad(torch.ones(grid, dtype=torch.bool), (padding[1], padding[1], padding[0], padding[0]))
    return torch.stack([inside[place] for place in places], -1), places, padding


def unfolded_local(
    grid: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1), raster_causal: bool = False
) -> Callable[..., Tensor]:
    """Local attention as it is written without an operator: F.unfold copies every key and value to each neighbour."""
    inside, _, padding = _neighbours(grid, kernel_size, dilation, raster_causal)
    inside = inside.flatten(0, 1)

    def unfold(x: Tensor) -> Tensor:
        """`[heads, D, K, S]`"""
        image = x.flatten(0, 1).mT.unflatten(2, grid)
        keys = F.unfold(image, kernel_size, dilation, padding).unflatten(1, (x.shape[3], -1))
        return keys[:, :, : inside.shape[1]]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query.flatten(0, 1).mT[:, :, None] * query.shape[-1] ** -0.5
        scores = (q * unfold(key)).sum(1)
        p = scores.masked_fill(~inside.mT.to(query.device), float("-inf")).softmax(1)
        return (p[:, None] * unfold(value)).sum(2).mT.view_as(query)

    return attention


def shifted_local(
    grid: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1), raster_causal: bool = False
) -> Callable[..., Tensor]:
    """Local attention by one shifted image for each neighbour: slow, little memory; the truth of large images."""
    inside, places, (py, px) = _neighbours(grid, kernel_size, dilation, raster_causal)

    def shifts(x: Tensor) -> list[Tensor]:
        image = F.pad(x.unflatten(2, grid), (0, 0, px, px, py, py))
        return [image[(..., *place, slice(None))] for place in places]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = query.unflatten(2, grid) * query.shape[-1] ** -0.5
        scores = torch.stack([(q * k).sum(-1) for k in shifts(key)], -1)
        p = scores.masked_fill(~inside.to(query.device), float("-inf")).softmax(-1).unbind(-1)
        out = torch.zeros_like(q)
        for weight, v in zip(p, shifts(value), strict=True):
            out = out + weight[..., None] * v
        return out.flatten(2, 3)

    return attention


Pair = tuple[int, int]
Windows = Callable[[Tensor], Tensor]  # of cells [N, H * W, D], the neighbours of each, [N, H * W, D, K]


def unfolded_windows(grid: Pair, kernel_size: Pair) -> Windows:
    """As Image-Local-Attention's own Python has them where its CUDA kernels are absent: F.unfold, channels first, then
    a copy cell by cell."""
    padding = kernel_size[0] // 2, kernel_size[1] // 2

    def windows(x: Tensor) -> Tensor:
        copies = F.unfold(x.mT.unflatten(2, grid), kernel_size, padding=padding)
        return copies.unflatten(1, (x.shape[2], -1)).permute(0, 3, 1, 2).contiguous()

    return windows


def gathered_windows(grid: Pair, kernel_size: Pair) -> Windows:
    """By index_select of whole cells: on CPU the fastest of the copies in torch that we tried."""
    cells = torch.arange(grid[0] * grid[1])[None, :, None]
    index = unfolded_windows(grid, kernel_size)(cells.float())[0, :, 0].long()  # of what lies outside, the first cell
    return lambda x: x.index_select(1, index.flatten()).unflatten(1, index.shape).mT


def _similar_and_weighting(
    copies: Callable[[Pair, Pair], Windows], grid: Pair, cells: Pair, kernel_size: Pair
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Image-Local-Attention's two functions, of queries of `grid` and windows in an image of `cells`: scores
    `[N, H * W, K]`, -10000 outside, and from their softmax the sum of values."""
    windows, (inside, *_) = copies(cells, kernel_size), _neighbours(cells, kernel_size, (1, 1), False)
    rows, columns = grid[0] // cells[0], grid[1] // cells[1]

    def by_cell(x: Tensor) -> Tensor:
        """Queries of a cell together: `[N, H * W, X]` -> `[N, cells, rows * columns, X]`."""
        return x.unflatten(1, (cells[0], rows, cells[1], columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def raster(x: Tensor) -> Tensor:
        return x.unflatten(2, (rows, columns)).unflatten(1, cells).transpose(2, 3).flatten(1, 4)

    def similar(query: Tensor, key: Tensor) -> Tensor:
        scores = by_cell(query) @ windows(key)
        return raster(scores.masked_fill(~inside.flatten(0, 1)[:, None], -10000.0))

    def weighting(p: Tensor, value: Tensor) -> Tensor:
        return raster(by_cell(p) @ windows(value).mT)

    return similar, weighting


def published_cogview2(
    copies: Callable[[Pair, Pair], Windows],
    text_len: int,
    grid: Pair,
    kernel_size: Pair,
    coarse_grid: Pair | None = None,
    coarse_kernel_size: Pair = (5, 5),
) -> Callable[..., Tensor]:
    """CogView2's own formula, unfused: dense attention among text and coarse image; for the image the scores of its
    window and of the coarse window, or of text, side by side in one softmax."""
    similar, weighting = _similar_and_weighting(copies, grid, grid, kernel_size)
    if coarse_grid is None:
        first, begin, similar_far, weighting_far = text_len, 0, lambda query, key: query @ key.mT, torch.matmul
    else:
        first, begin = text_len + coarse_grid[0] * coarse_grid[1], text_len
        similar_far, weighting_far = _similar_and_weighting(copies, grid, coarse_grid, coarse_kernel_size)
    position = torch.arange(first)
    hidden = (position[:, None] < text_len) & (position >= text_len)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (x.flatten(0, 1).tensor_split([first], 1) for x in (query * query.shape[-1] ** -0.5, key, value))
        (q0, q1), (k0, k1), (v0, v1) = heads
        out = (q0 @ k0.mT).masked_fill(hidden, -10000.0).softmax(-1) @ v0
        far, near = similar_far(q1, k0[:, begin:]), similar(q1, k1)
        p_far, p_near = torch.cat([far, near], -1).softmax(-1).tensor_split([far.shape[-1]], -1)
        image = weighting_far(p_far, v0[:, begin:]) + weighting(p_near, v1)
        return torch.cat([out, image], 1).view_as(query)

    return attention


def flex_attention(mask_mod: Callable[..., Tensor], seqlen: int, num_keys: int | None = None) -> Callable[..., Tensor]:
    """FlexAttention over the pairs of `mask_mod(b, h, i, j)`, compiled at the first call; on CPU forward only."""
    num_keys = seqlen if num_keys is None else num_keys

    @cache
    def compiled(device: torch.device) -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # compiled, it takes seconds; in eager mode the memory of all pairs
        make = create_block_mask if seqlen * num_keys < 2**27 else torch.compile(create_block_mask, dynamic=False)
        blocks = make(mask_mod, None, None, seqlen, num_keys, device=device)
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks)

    return lambda query, key, value, **options: compiled(query.device)(query, key, value, **options)


def compile_formula(formula: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of it, at its first call (making the object alone imports the compiler)."""
    compiled = cache(lambda: torch.compile(formula, dynamic=False))
    return lambda *inputs, **options: compiled()(*inputs, **options)


def relaxed_softmax(alpha: float, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """CogView's PB-relax formula, eq. 4."""

    def softmax(scores: Tensor) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return ((scores - scores.detach().amax(-1, keepdim=True)) * alpha).softmax(-1)

    return softmax


def torch_softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.layer_norm, without PB-relax."""
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _relaxed(x: Tensor) -> Tensor:
    peak = x.detach().abs().amax(-1, keepdim=True)
    return x / torch.where(peak == 0, 1, peak)


def relaxed_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(_relaxed(x), weight, bias)


def float32_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as autocast runs it: the norm in float32."""
    return layer_norm(_relaxed(x).float(), weight.float(), bias.float()).to(x.dtype)


def gemma_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Of Gemma 2 and 3 in transformers: the weight is a difference from 1, all in float32."""
    wide = x.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (out * (1.0 + weight.float())).type_as(x)


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Of Llama and Qwen there: rounded before the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """F.rms_norm, whose weight is what it is."""
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def sandwich(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One step with the given norm: h = residual + norm(branch), x = norm(h)."""

    def step(branch: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        of_one = len(weights) // 2
        h = residual + norm(branch, *weights[:of_one])
        return h, norm(h, *weights[of_one:])

    return step


def add_norm(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step with a pre-norm alone."""

    def step(branch: Tensor, residual: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + branch
        return h, norm(h, *weights)

    return step


def norm_add(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The step with a post-norm alone."""
    return lambda branch, residual, *weights: residual + norm(branch, *weights)
