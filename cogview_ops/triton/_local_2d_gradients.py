"""Launches of the backward of 2D local attention."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._local_options import Pair
from . import configs
from ._local_2d_backward import grad_key_kernel, grad_query_kernel, sum_kernel
from ._local_2d_call import Call, log2, patch_rows, patches, plus, sizes, sub_image
from ._local_2d_pattern import Form
from ._local_2d_table import sum_table_kernel
from ._tiles import Keys, Number, block_d, launch, number, rows_of, section


class KeySet(NamedTuple):
    """Keys of one grid, whose gradients are to be computed: all seen by all queries (`dense`), or in windows."""

    keys: Keys
    grid: Pair
    kernel: Pair
    ratio: Pair  # rows and columns of queries to one of keys
    bias: Number = number(0.0)
    mask: Tensor | None = None
    table: Tensor | None = None
    dilation: Pair = (1, 1)
    causal: bool = False
    shift: bool = False
    dense: bool = False


def grad_query(call: Call, tensors: dict[str, Any], grad: Tensor) -> None:
    """Of queries, and of the table."""
    config = call.config("grad_query")
    programs, shared = call.patches(config)
    if call.table is None:
        launch(grad_query_kernel, (programs,), config, **tensors, **shared, slots=None, first_head=None)
        return
    tiles, window = shared["tiles"], [min(k, n) for k, n in zip(call.kernel, call.image, strict=True)]
    of_head = tiles * config.m * window[0] * window[1]
    heads = call.batch * call.heads
    slots = tensors["lse"].new_empty(min(heads, max(1, 2**23 // of_head)), of_head)
    (above, rows), (before, columns) = call.beside(0), call.beside(1)
    entries = 32
    programs = triton.cdiv(rows * columns, entries)
    splits = configs.splits(len(slots) * programs, tiles, 16, call.device)
    sums = slots.new_zeros(heads, splits, *(2 * k - 1 for k in call.kernel))
    names = "height", "width", "kernel_h", "kernel_w", "dilation_h", "dilation_w", "bits", "heads", "tiles", "key_mask"
    about = {"slots": slots, "sums": sums} | {name: shared[name] for name in (*names, "FORM", "ACC", "SHAPE")}
    about |= {"above": above, "before": before, "rows": rows, "columns": columns, "splits": splits}
    for first in range(0, heads, len(slots)):
        count = min(len(slots), heads - first)
        part = {"slots": slots, "first_head": first}
        launch(grad_query_kernel, (count * tiles,), config, **tensors, **{**shared, **part, "total_heads": count})
        launch(sum_table_kernel, (count * programs, splits), configs.SMALL, **{**about, **part}, ENTRIES=entries)
    torch.sum(sums.view(call.batch, call.heads, splits, *sums.shape[2:]), (0, 2), out=grad)


def grad_keys(call: Call, rows: dict[str, Any], keys: KeySet, dk: Tensor, dv: Tensor) -> None:
    """Gradients of keys and values, from q, dout, lse, delta."""
    config = call.config("grad_key")
    image, grid = sub_image(keys.grid, keys.dilation), sub_image(call.grid, keys.dilation)
    patch = 1 if keys.dense else patch_rows(image, keys.kernel, config.n, config.m, keys.causal, keys.ratio)
    columns = config.n // patch
    # shifted, a key may be seen from half a window further on both sides
    box = plus((patch, columns), (2 * keys.kernel[0] - 1, 2 * keys.kernel[1] - 1) if keys.shift else keys.kernel)
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
        table=keys.table,
        mask=keys.mask,
        bias=keys.bias,
        group=call.group,
        tiles=tiles,
        total_kv_heads=call.pairs,
        section=section(call.pairs, 1, rows["q"].at),
        **sizes("height", "width", call.grid),
        **sizes("key_height", "key_width", keys.grid),
        **sizes("kernel_h", "kernel_w", keys.kernel),
        **sizes("dilation_h", "dilation_w", keys.dilation),
        bits=log2(columns),
        DENSE=keys.dense,
        FORM=Form(keys.causal, keys.shift, keys.dilation != (1, 1), small),
        SHAPE=call.shape(config),
    )
    if splits > 1:
        shared |= {"step": rows["step"], "count": count, "ROWS": 16, "SHAPE": call.shape(configs.SMALL)}
        launch(sum_kernel, (triton.cdiv(count, 16) * call.pairs,), configs.SMALL, **shared)
