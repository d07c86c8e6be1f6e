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

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _registration
from ..local_attention_2d import register
from . import configs
from ._local_2d_backward import grad_key_kernel, grad_query_kernel, sum_kernel
from ._local_2d_forward import decode_kernel, forward_kernel
from ._three_region_forward import combine_kernel
from ._tiles import DEVICES, accumulator, block_d, check_interpreter, launch, power_of_4, section, strides, two_parts

Pair = tuple[int, int]


def patch_rows(grid: Pair, kernel: Pair, cells: int, tile: int, causal: bool, ratio: Pair = (1, 1)) -> int:
    """Rows of the patch of `cells` cells whose boxes take the fewest tiles over the whole grid, itself counted as one.

    A box is `ratio` times the patch and its halo. Row kernels get patches of one row, column kernels of one column.
    """

    def cost(rows: int) -> int:
        columns = cells // rows
        halo = kernel[0] // 2 if causal else kernel[0] - 1
        box = min(grid[0], rows + halo) * min(grid[1], columns + kernel[1] - 1) * ratio[0] * ratio[1]
        return triton.cdiv(grid[0], rows) * triton.cdiv(grid[1], columns) * (triton.cdiv(box, tile) + 1)

    return min((1 << n for n in range(cells.bit_length())), key=cost)


def log2(power: int) -> int:
    return power.bit_length() - 1


def sub_image(grid: Pair, dilation: Pair) -> Pair:
    """Rows and columns of the largest of the parts into which dilation splits an image."""
    return triton.cdiv(grid[0], dilation[0]), triton.cdiv(grid[1], dilation[1])


def patches(image: Pair, patch: Pair, dilation: Pair) -> int:
    """How many there are in all sub-images."""
    return triton.cdiv(image[0], patch[0]) * triton.cdiv(image[1], patch[1]) * dilation[0] * dilation[1]


class _Call:
    """What the kernels of one call share: shapes, tensors, options in the units of the kernels."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, sets: tuple[Tensor | None, ...], prefix_mask: Tensor | None,
        grid: list[int], kernel: list[int], dilation: list[int], prefix_bias: float, coarse_grid: list[int],
        coarse_kernel: list[int], coarse_bias: float, scale: float,
    ) -> None:  # fmt: skip
        check_interpreter(q)
        prefix_k, prefix_v, coarse_k, coarse_v = sets
        self.arch = configs.chip(q.device)
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads = k.shape[1]
        self.group, self.pairs = self.heads // self.kv_heads, self.batch * self.kv_heads
        self.grid, self.kernel = (grid[0], grid[1]), (kernel[0], kernel[1])
        # of an axis on which only itself is seen it does not matter
        self.dilation = (dilation[0] if kernel[0] > 1 else 1, dilation[1] if kernel[1] > 1 else 1)
        self.image = sub_image(self.grid, self.dilation)
        self.prefix_len = 0 if prefix_k is None else prefix_k.shape[2]
        self.has_coarse = coarse_k is not None
        self.coarse_grid = (coarse_grid[0], coarse_grid[1]) if self.has_coarse else (1, 1)
        self.coarse_kernel = (coarse_kernel[0], coarse_kernel[1]) if self.has_coarse else (1, 1)
        self.ratio = (self.grid[0] // self.coarse_grid[0], self.grid[1] // self.coarse_grid[1])
        self.scale, self.prefix_bias, self.coarse_bias = scale, prefix_bias, coarse_bias
        self.shape = {"D": self.dim, "BLOCK_D": block_d(self.dim), "ACC": accumulator(q.dtype)}
        self.keys = {
            "k": k, "v": v,
            "prefix_k": k if prefix_k is None else prefix_k, "prefix_v": v if prefix_v is None else prefix_v,
            "coarse_k": k if coarse_k is None else coarse_k, "coarse_v": v if coarse_v is None else coarse_v,
        }  # fmt: skip
        # not of bytes: Triton 3.6 lays float64 keys out for products as if they were as narrow, and fails
        self.prefix_mask = q if prefix_mask is None else prefix_mask.to(torch.int32).contiguous()
        self.masked = prefix_mask is not None

    def config(self, kernel: str, q: Tensor) -> configs.Config:
        return configs.lookup(f"local_{kernel}", self.arch, q.element_size(), block_d(self.dim))

    def small(self, grid: Pair, size: Pair, tile: int) -> bool:
        """Whether cells * columns of a box of this size stays below 2**31: see `box_cells`."""
        rows, columns = min(grid[0], size[0]), min(grid[1], size[1])
        return (rows * columns + tile) * columns < 2**31

    def query_side(self, patch: Pair, tile: int) -> dict[str, Any]:
        """Arguments of the kernels that own queries."""
        spread = (patch[0] - 1) * self.dilation[0] + 1, (patch[1] - 1) * self.dilation[1] + 1
        small = self.small(self.image, _plus(patch, self.kernel), tile)
        small = small and self.small(self.coarse_grid, _plus(spread, self.coarse_kernel), tile)
        return {
            **self.keys, **strides(**self.keys), "prefix_mask": self.prefix_mask, "prefix_len": self.prefix_len,
            "group": self.group, "height": self.grid[0], "width": self.grid[1], "kernel_h": self.kernel[0],
            "kernel_w": self.kernel[1], "dilation_h": self.dilation[0], "dilation_w": self.dilation[1],
            "coarse_height": self.coarse_grid[0], "coarse_width": self.coarse_grid[1],
            "coarse_kernel_h": self.coarse_kernel[0], "coarse_kernel_w": self.coarse_kernel[1],
            **_logits(prefix_bias=self.prefix_bias, coarse_bias=self.coarse_bias),
            "PREFIX": self.prefix_len > 0, "MASKED": self.masked, "COARSE": self.has_coarse, "SMALL": small,
            "DILATED": self.dilation != (1, 1), **self.shape, "N": tile,
        }  # fmt: skip

    def patches(self, config: configs.Config, causal: bool, shift: bool) -> tuple[int, dict[str, Any]]:
        """Programs, and arguments, of the kernels that own a patch of queries each."""
        rows = patch_rows(self.image, self.kernel, config.m, config.n, causal)
        columns, total = config.m // rows, self.batch * self.heads
        shared = self.query_side((rows, columns), config.n)
        shared |= {"heads": self.heads, "total_heads": total, "section": section(total, self.group, self.keys["k"])}
        count = patches(self.image, (rows, columns), self.dilation)
        shared |= {"tiles": count, "CAUSAL": causal, "SHIFT": shift, "bits": log2(columns), "M": config.m}
        return count * total, shared


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, coarse_k: Tensor | None,
    coarse_v: Tensor | None, prefix_mask: Tensor | None, grid: list[int], kernel: list[int],
    dilation: list[int], causal: bool, shift: bool, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _registration.attention_fake(q)
    if not q.numel():
        return out, lse
    call = _Call(q, k, v, (prefix_k, prefix_v, coarse_k, coarse_v), prefix_mask, grid, kernel, dilation, *options)
    config = call.config("forward", q)
    programs, shared = call.patches(config, causal, shift)
    launch(
        forward_kernel, (programs,), config, q=q, out=out, lse=lse, **strides(q=q, out=out),
        **shared, **_scale(abs(call.scale)), NEGATE=call.scale < 0,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None,
    prefix_v: Tensor | None, coarse_k: Tensor | None, coarse_v: Tensor | None, prefix_mask: Tensor | None, out: Tensor,
    lse: Tensor, grid: list[int], kernel: list[int], dilation: list[int], causal: bool, shift: bool, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sets = (prefix_k, prefix_v, coarse_k, coarse_v)
    grads = [q.new_empty(0) if x is None else _registration.empty_rows(x) for x in (q, k, v, *sets)]
    if not q.numel():
        return tuple(x.zero_() for x in grads)
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    call = _Call(q, k, v, sets, prefix_mask, grid, kernel, dilation, *options)
    config = call.config("grad_query", q)
    delta = torch.empty_like(lse)
    programs, shared = call.patches(config, causal, shift)
    launch(
        grad_query_kernel, (programs,), config,
        q=q, out=out, lse=lse, dout=dout, dlse=lse if dlse is None else dlse.contiguous(), delta=delta, dq=grads[0],
        **strides(q=q, out=out, dout=dout, dq=grads[0]), **shared, **_scale(call.scale), **two_parts(step=call.scale),
        HAS_DLSE=dlse is not None,
    )  # fmt: skip
    rows = {"q": q, "dout": dout, "lse": lse, "delta": delta}
    # longest first: every query sees the prefix
    if prefix_k is not None and prefix_v is not None and call.prefix_len:
        _grad_keys(call, rows, prefix_k, prefix_v, grads[3], grads[4], "prefix")
    if coarse_k is not None and coarse_v is not None:
        _grad_keys(call, rows, coarse_k, coarse_v, grads[5], grads[6], "coarse")
    _grad_keys(call, rows, k, v, grads[1], grads[2], "local", causal, shift)
    return tuple(grads)


def _grad_keys(
    call: _Call, rows: dict[str, Tensor], k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, kind: str,
    causal: bool = False, shift: bool = False,
) -> None:  # fmt: skip
    """Gradients of the keys of one set, from q, dout, lse, delta."""
    q = rows["q"]
    config = call.config("grad_key", q)
    keys, kernel, bias, ratio = {
        "prefix": ((1, call.prefix_len), (1, 1), call.prefix_bias, call.grid),
        "coarse": (call.coarse_grid, call.coarse_kernel, call.coarse_bias, call.ratio),
        "local": (call.grid, call.kernel, 0.0, (1, 1)),
    }[kind]
    dense = kind == "prefix"
    dilation = call.dilation if kind == "local" else (1, 1)
    image, grid = sub_image(keys, dilation), sub_image(call.grid, dilation)
    patch = 1 if dense else patch_rows(image, kernel, config.n, config.m, causal, ratio)
    columns = config.n // patch
    # shifted, a key may be seen from half a window further on both sides
    box = _plus((patch, columns), (2 * kernel[0] - 1, 2 * kernel[1] - 1) if shift else kernel)
    size = grid if dense else (box[0] * ratio[0], box[1] * ratio[1])
    seen = min(grid[0], size[0]) * min(grid[1], size[1])
    tiles = patches(image, (patch, columns), dilation)
    programs = tiles * call.pairs
    # few programs with much to do: several share the queries of a patch
    splits = configs.splits(programs, triton.cdiv(seen, config.m) * call.group, 32, q.device)
    number = keys[0] * keys[1]
    parts = [rows["lse"].new_empty(splits if splits > 1 else 0, call.pairs, number, block_d(call.dim)) for _ in "kv"]
    shared: dict[str, Any] = {
        "part_k": parts[0], "part_v": parts[1], "dk": dk, "dv": dv, **strides(dk=dk, dv=dv),
        "kv_heads": call.kv_heads, "splits": splits, **two_parts(step=call.scale), **call.shape,
    }  # fmt: skip
    launch(
        grad_key_kernel, (programs, splits), config, **rows, k=k, v=v, mask=call.prefix_mask, **shared,
        **strides(q=q, k=k, v=v, dout=rows["dout"]), tiles=tiles, total_kv_heads=call.pairs,
        section=section(call.pairs, 1, q), height=call.grid[0], width=call.grid[1], key_height=keys[0],
        key_width=keys[1], kernel_h=kernel[0], kernel_w=kernel[1], dilation_h=dilation[0], dilation_w=dilation[1],
        bits=log2(columns), group=call.group, **_scale(call.scale), **_logits(bias=bias), DENSE=dense,
        MASKED=dense and call.masked, DILATED=dilation != (1, 1), CAUSAL=causal, SHIFT=shift, SPLIT=splits > 1,
        SMALL=call.small(grid, size, config.m), M=config.m, N=config.n,
    )  # fmt: skip
    if splits > 1:
        launch(sum_kernel, (triton.cdiv(number, 16) * call.pairs,), configs.SMALL, **shared, keys=number, ROWS=16)


def decode(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, coarse_k: Tensor | None,
    coarse_v: Tensor | None, prefix_mask: Tensor | None, cache_seqlens: Tensor, *options: Any,
) -> Tensor:  # fmt: skip
    out = _registration.decode_fake(q)
    if not q.numel():
        return out
    call = _Call(q, k, v, (prefix_k, prefix_v, coarse_k, coarse_v), prefix_mask, *options)
    config = call.config("decode", q)
    steps = q.shape[2]
    # dilated, steps are apart: a tile of rows is of one
    dilated = call.dilation != (1, 1)
    pitch = triton.cdiv(call.group, config.m) * config.m if dilated else call.group
    row_tiles = triton.cdiv(steps * pitch, config.m)
    span = 1 if dilated else min(steps, triton.cdiv(config.m, pitch) + 1)  # steps of a tile; several may cross rows
    patch = (1, 1) if span == 1 else (1 + triton.cdiv(span - 1, call.grid[1]), call.grid[1])
    tiles = triton.cdiv(call.prefix_len, config.n)
    tiles += _box_tiles(call.image, (patch[0] + call.kernel[0] // 2, patch[1] + call.kernel[1] - 1), config.n)
    tiles += _box_tiles(call.coarse_grid, _plus(patch, call.coarse_kernel), config.n) if call.has_coarse else 0
    shares = configs.splits(call.pairs * row_tiles, tiles, 64, q.device)
    share_size = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, share_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    part = torch.empty(shares, call.pairs, row_tiles * config.m, block_d(call.dim), dtype=dtype, device=q.device)
    part_lse = torch.empty(part.shape[:3], dtype=dtype, device=q.device)
    rows = {"kv_heads": call.kv_heads, "pitch": pitch, "steps": steps, "row_tiles": row_tiles, "M": config.m}
    launch(
        decode_kernel, (call.pairs * row_tiles, shares), config,
        q=q, lengths=cache_seqlens.contiguous(), part=part, part_lse=part_lse, **strides(q=q),
        **call.query_side(patch, config.n), **rows, share_size=share_size, **_scale(abs(call.scale)),
        NEGATE=call.scale < 0,
    )  # fmt: skip
    launch(
        combine_kernel, (steps * call.group * call.pairs,), configs.SMALL,
        part=part, part_lse=part_lse, out=out, **strides(out=out), group=call.group, **rows, shares=shares, D=call.dim,
        BLOCK_D=block_d(call.dim), SHARES=power_of_4(shares),
    )  # fmt: skip
    return out


def _plus(patch: Pair, kernel: Pair) -> Pair:
    """Rows and columns of the windows of a patch."""
    return patch[0] + kernel[0] - 1, patch[1] + kernel[1] - 1


def _box_tiles(grid: Pair, size: Pair, tile: int) -> int:
    return triton.cdiv(min(grid[0], size[0]) * min(grid[1], size[1]), tile)


def _logits(**values: float) -> dict[str, float]:
    """Arguments in base 2."""
    return two_parts(**{name: value / math.log(2) for name, value in values.items()})


def _scale(scale: float) -> dict[str, float]:
    """Not quite 0: masked scores, -inf, must stay below all others."""
    return two_parts(scale=scale / math.log(2) or 1e-30)


register("cogview_ops_triton")
_registration.implement("local_attention_2d_fwd", forward, DEVICES)
_registration.implement("local_attention_2d_bwd", backward, DEVICES)
_registration.implement("local_attention_2d_decode", decode, DEVICES)
