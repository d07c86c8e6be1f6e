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
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import _registration
from .._local_options import TENSORS, WITH_GRADIENT, Arguments, Options, Pair, unflatten
from ..local_attention_2d import register
from . import configs
from ._local_2d_backward import grad_key_kernel, grad_query_kernel, sum_kernel
from ._local_2d_forward import decode_kernel, forward_kernel
from ._local_2d_pattern import Coarse, Form, Keys, Prefix
from ._tiles import (
    DEVICES,
    Number,
    Shape,
    accumulator,
    block_d,
    check_interpreter,
    combine_kernel,
    launch,
    number,
    power_of_4,
    rows_of,
    section,
)


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


class _KeySet(NamedTuple):
    """Keys of one grid, whose gradients are to be computed: all seen by all queries (`dense`), or in windows."""

    keys: Keys
    grid: Pair
    kernel: Pair
    ratio: Pair  # rows and columns of queries to one of keys
    bias: Number = number(0.0)
    mask: Tensor | None = None
    dilation: Pair = (1, 1)
    causal: bool = False
    shift: bool = False
    dense: bool = False


class _Call:
    """What the kernels of one call share: shapes, and options as the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        check_interpreter(q)
        self.device, self.element_size = q.device, q.element_size()
        self.batch, self.heads, _, self.dim = q.shape
        self.kv_heads = k.shape[1]
        self.group, self.pairs = self.heads // self.kv_heads, self.batch * self.kv_heads
        window, prefix, coarse, self.scale = options
        self.grid, self.kernel, self.causal = window.grid, window.kernel_size, window.raster_causal
        self.shift = window.edge == "shift"
        # of an axis on which only itself is seen it does not matter
        dilation = window.dilation
        self.dilation = dilation[0] if self.kernel[0] > 1 else 1, dilation[1] if self.kernel[1] > 1 else 1
        self.image = sub_image(self.grid, self.dilation)
        self.local = Keys(rows_of(k), rows_of(v))
        self.section = section(self.batch * self.heads, self.group, k)
        self.prefix, self.prefix_len = None, 0 if prefix is None else prefix.key.shape[2]
        if prefix is not None and self.prefix_len:
            # not of bytes: Triton 3.6 lays float64 keys out for products as if they were as narrow, and fails
            mask = None if prefix.mask is None else prefix.mask.to(torch.int32).contiguous()
            self.prefix = Prefix(Keys(rows_of(prefix.key), rows_of(prefix.value)), mask, _logit(prefix.bias))
        self.coarse, self.coarse_grid, self.coarse_kernel = None, (1, 1), (1, 1)
        if coarse is not None:
            self.coarse = Coarse(Keys(rows_of(coarse.key), rows_of(coarse.value)), _logit(coarse.bias))
            self.coarse_grid, self.coarse_kernel = coarse.grid, coarse.kernel_size
        self.acc = accumulator(q.dtype)

    def config(self, kernel: str) -> configs.Config:
        return configs.lookup(f"local_{kernel}", configs.chip(self.device), self.element_size, block_d(self.dim))

    def shape(self, config: configs.Config) -> Shape:
        return Shape(self.dim, block_d(self.dim), config.m, config.n)

    def small(self, grid: Pair, size: Pair, tile: int) -> bool:
        """Whether cells * columns of a box of this size stays below 2**31: see `box_cells`."""
        rows, columns = min(grid[0], size[0]), min(grid[1], size[1])
        return (rows * columns + tile) * columns < 2**31

    def query_side(self, patch: Pair, config: configs.Config) -> dict[str, Any]:
        """Arguments of the kernels that own queries."""
        spread = (patch[0] - 1) * self.dilation[0] + 1, (patch[1] - 1) * self.dilation[1] + 1
        small = self.small(self.image, _plus(patch, self.kernel), config.n)
        small = small and self.small(self.coarse_grid, _plus(spread, self.coarse_kernel), config.n)
        return {
            "local": self.local,
            "prefix": self.prefix,
            "coarse": self.coarse,
            "group": self.group,
            **_sizes("height", "width", self.grid),
            **_sizes("kernel_h", "kernel_w", self.kernel),
            **_sizes("dilation_h", "dilation_w", self.dilation),
            "prefix_len": self.prefix_len,
            **_sizes("coarse_height", "coarse_width", self.coarse_grid),
            **_sizes("coarse_kernel_h", "coarse_kernel_w", self.coarse_kernel),
            "FORM": Form(self.causal, self.shift, self.dilation != (1, 1), small),
            "ACC": self.acc,
            "SHAPE": self.shape(config),
        }

    def patches(self, config: configs.Config) -> tuple[int, dict[str, Any]]:
        """Programs, and arguments, of the kernels that own a patch of queries each."""
        rows = patch_rows(self.image, self.kernel, config.m, config.n, self.causal)
        columns, total = config.m // rows, self.batch * self.heads
        count = patches(self.image, (rows, columns), self.dilation)
        launched = {"heads": self.heads, "total_heads": total, "section": self.section, "tiles": count}
        return count * total, {**self.query_side((rows, columns), config), **launched, "bits": log2(columns)}


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _registration.empty_attention(q)
    if not q.numel():
        return out, lse
    call = _Call(q, k, v, _options(arguments[:TENSORS], *arguments[TENSORS:]))
    config = call.config("forward")
    programs, shared = call.patches(config)
    scale = {"scale": _scale(abs(call.scale)), "NEGATE": call.scale < 0}
    launch(forward_kernel, (programs,), config, q=rows_of(q), out=rows_of(out), lse=lse, **shared, **scale)
    return out, lse


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    tensors, (out, lse, *numbers) = arguments[:TENSORS], arguments[TENSORS:]
    sets = tensors[:WITH_GRADIENT]
    grads = [q.new_empty(0) if x is None else _registration.empty_rows(x) for x in (q, k, v, *sets)]
    if not q.numel():
        return tuple(x.zero_() for x in grads)
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    call = _Call(q, k, v, _options(tensors, *numbers))
    config = call.config("grad_query")
    programs, shared = call.patches(config)
    rows = {"q": rows_of(q), "dout": rows_of(dout), "lse": lse, "delta": torch.empty_like(lse)}
    rows |= {"scale": _scale(call.scale), "step": number(call.scale)}
    launch(
        grad_query_kernel,
        (programs,),
        config,
        **rows,
        **shared,
        out=rows_of(out),
        dlse=None if dlse is None else dlse.contiguous(),
        dq=rows_of(grads[0]),
    )
    local = _KeySet(
        call.local, call.grid, call.kernel, (1, 1), dilation=call.dilation, causal=call.causal, shift=call.shift
    )
    owners = [(local, grads[1:3])]
    if call.coarse is not None:
        ratio = call.grid[0] // call.coarse_grid[0], call.grid[1] // call.coarse_grid[1]
        coarse = _KeySet(call.coarse.keys, call.coarse_grid, call.coarse_kernel, ratio, call.coarse.bias)
        owners.insert(0, (coarse, grads[5:]))
    if call.prefix is not None:  # longest first: every query sees it
        size = 1, call.prefix_len
        prefix = _KeySet(call.prefix.keys, size, (1, 1), call.grid, call.prefix.bias, call.prefix.mask, dense=True)
        owners.insert(0, (prefix, grads[3:5]))
    for keys, (dk, dv) in owners:
        _grad_keys(call, rows, keys, dk, dv)
    return tuple(grads)


def _grad_keys(call: _Call, rows: dict[str, Any], keys: _KeySet, dk: Tensor, dv: Tensor) -> None:
    """Gradients of keys and values, from q, dout, lse, delta."""
    config = call.config("grad_key")
    image, grid = sub_image(keys.grid, keys.dilation), sub_image(call.grid, keys.dilation)
    patch = 1 if keys.dense else patch_rows(image, keys.kernel, config.n, config.m, keys.causal, keys.ratio)
    columns = config.n // patch
    # shifted, a key may be seen from half a window further on both sides
    box = _plus((patch, columns), (2 * keys.kernel[0] - 1, 2 * keys.kernel[1] - 1) if keys.shift else keys.kernel)
    size = grid if keys.dense else (box[0] * keys.ratio[0], box[1] * keys.ratio[1])
    seen = min(grid[0], size[0]) * min(grid[1], size[1])
    tiles = patches(image, (patch, columns), keys.dilation)
    programs = tiles * call.pairs
    # few programs with much to do: several share the queries of a patch
    splits = configs.splits(programs, triton.cdiv(seen, config.m) * call.group, 32, call.device)
    count = keys.grid[0] * keys.grid[1]
    parts = None
    if splits > 1:
        parts = Keys(*(rows["lse"].new_empty(splits, call.pairs, count, block_d(call.dim)) for _ in "kv"))
    shared = {"parts": parts, "grads": Keys(rows_of(dk), rows_of(dv)), "ACC": call.acc}
    shared |= {"kv_heads": call.kv_heads, "splits": splits}
    small = call.small(grid, size, config.m)
    launch(
        grad_key_kernel,
        (programs, splits),
        config,
        **rows,
        **shared,
        keys=keys.keys,
        mask=keys.mask,
        bias=keys.bias,
        group=call.group,
        tiles=tiles,
        total_kv_heads=call.pairs,
        section=section(call.pairs, 1, rows["q"].at),
        **_sizes("height", "width", call.grid),
        **_sizes("key_height", "key_width", keys.grid),
        **_sizes("kernel_h", "kernel_w", keys.kernel),
        **_sizes("dilation_h", "dilation_w", keys.dilation),
        bits=log2(columns),
        DENSE=keys.dense,
        FORM=Form(keys.causal, keys.shift, keys.dilation != (1, 1), small),
        SHAPE=call.shape(config),
    )
    if splits > 1:
        sizes = {"keys": count, "D": call.dim, "BLOCK_D": block_d(call.dim), "ROWS": 16}
        launch(sum_kernel, (triton.cdiv(count, 16) * call.pairs,), configs.SMALL, **shared, step=rows["step"], **sizes)


def decode(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    out = _registration.empty_decode(q)
    if not q.numel():
        return out
    tensors, (lengths, grid, kernel_size, dilation, *rest) = arguments[:TENSORS], arguments[TENSORS:]
    call = _Call(q, k, v, _options(tensors, grid, kernel_size, dilation, True, False, *rest))
    config = call.config("decode")
    steps = q.shape[2]
    # dilated, steps are apart: a tile of rows is of one
    dilated = call.dilation != (1, 1)
    pitch = triton.cdiv(call.group, config.m) * config.m if dilated else call.group
    row_tiles = triton.cdiv(steps * pitch, config.m)
    span = 1 if dilated else min(steps, triton.cdiv(config.m, pitch) + 1)  # steps of a tile; several may cross rows
    patch = (1, 1) if span == 1 else (1 + triton.cdiv(span - 1, call.grid[1]), call.grid[1])
    tiles = triton.cdiv(call.prefix_len, config.n)
    tiles += _box_tiles(call.image, (patch[0] + call.kernel[0] // 2, patch[1] + call.kernel[1] - 1), config.n)
    tiles += 0 if call.coarse is None else _box_tiles(call.coarse_grid, _plus(patch, call.coarse_kernel), config.n)
    shares = configs.splits(call.pairs * row_tiles, tiles, 64, call.device)
    share_size = triton.cdiv(tiles, shares)
    shares = triton.cdiv(tiles, share_size)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    part = torch.empty(shares, call.pairs, row_tiles * config.m, block_d(call.dim), dtype=dtype, device=call.device)
    parts = {"part": part, "part_lse": part.new_empty(part.shape[:3])}
    rows = {"kv_heads": call.kv_heads, "pitch": pitch, "steps": steps, "row_tiles": row_tiles}
    launch(
        decode_kernel,
        (call.pairs * row_tiles, shares),
        config,
        q=rows_of(q),
        lengths=lengths.contiguous(),
        **parts,
        **call.query_side(patch, config),
        **rows,
        share_size=share_size,
        scale=_scale(abs(call.scale)),
        NEGATE=call.scale < 0,
    )
    launch(
        combine_kernel,
        (steps * call.group * call.pairs,),
        configs.SMALL,
        out=rows_of(out),
        **parts,
        group=call.group,
        **rows,
        shares=shares,
        D=call.dim,
        BLOCK_D=block_d(call.dim),
        SHARES=power_of_4(shares),
        M=config.m,
    )
    return out


def _options(tensors: tuple[Any, ...], *numbers: Any) -> Options:
    return unflatten(Arguments(tensors, numbers[:3], numbers[3:5], numbers[5:]))


def _sizes(rows: str, columns: str, pair: Pair) -> dict[str, int]:
    """Two arguments. Not one pair: in tuples Triton compiles anew for 1 and for multiples of 16."""
    return {rows: pair[0], columns: pair[1]}


def _plus(patch: Pair, kernel: Pair) -> Pair:
    """Rows and columns of the windows of a patch."""
    return patch[0] + kernel[0] - 1, patch[1] + kernel[1] - 1


def _box_tiles(grid: Pair, size: Pair, tile: int) -> int:
    return triton.cdiv(min(grid[0], size[0]) * min(grid[1], size[1]), tile)


def _logit(value: float) -> Number:
    """In base 2."""
    return number(value / math.log(2))


def _scale(scale: float) -> Number:
    """Not quite 0: masked scores, -inf, must stay below all others."""
    return number(scale / math.log(2) or 1e-30)


register("cogview_ops_triton")
_registration.implement("local_attention_2d_fwd", forward, DEVICES)
_registration.implement("local_attention_2d_bwd", backward, DEVICES)
_registration.implement("local_attention_2d_decode", decode, DEVICES)
