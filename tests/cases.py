"""The calls that the operator tests make: every axis of the arguments, chosen pairwise, each case small."""

import math
from typing import Any

import torch
from common import Case
from torch import Tensor


def some_pivots(kind: str, batch: int, seqlen: int) -> Tensor:
    """No pivots, all tokens, more room than tokens (long), or text and random image tokens, padded unevenly (text, and
    few: so few that gradients are summed up by several chunks of queries on CPU)."""
    if kind == "none":
        return torch.empty(batch, 0, dtype=torch.int64)
    if kind == "all":
        return torch.arange(seqlen).expand(batch, -1).clone()
    room = {"long": seqlen + 5, "text": seqlen // 3 + 2, "few": seqlen // 20}[kind]
    rows = torch.full((batch, room), -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(seqlen)
    for b in range(batch):
        text = min(3 + b, seqlen, room)
        count = min((room - text) // (b + 1), seqlen - text)
        image = text + torch.randperm(seqlen - text, generator=generator)[:count].sort().values
        rows[b, : text + count] = torch.cat([torch.arange(text), image]).int()
    return rows


def three_region(
    label: str,
    seqlen: int,
    head_dim: int,
    block_size: int,
    window_blocks: int,
    pivots: str = "text",
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    **options: Any,
) -> Case:
    q, kv = (batch, heads, seqlen, head_dim), (batch, kv_heads, seqlen, head_dim)
    options |= {"pivots": some_pivots(pivots, batch, seqlen), "block_size": block_size, "window_blocks": window_blocks}
    shapes = {"query": q, "key": kv, "value": kv}
    return Case("three_region_attention", label, shapes, {**options, "return_lse": True})


THREE_REGION = [
    three_region("one_token", 1, 64, 128, 6, "all"),
    three_region("two_tokens", 2, 16, 1, 1, "all", heads=3, kv_heads=1),
    three_region("no_pivots", 63, 64, 16, 2, "none", scale=0.3),
    three_region("all_pivots", 64, 33, 3, 1, "all", heads=4),
    three_region("long_pivots", 65, 8, 1, 6, "long"),
    three_region("text_pivots", 130, 64, 16, 1, pivot_bias=math.log(4)),
    three_region("few_pivots", 200, 20, 16, 1, "few", pivot_bias=0.3),
    three_region("block_of_one", 65, 16, 1, 1, "text", heads=6, kv_heads=2),
    three_region("block_of_three", 130, 20, 3, 2, "text", pivot_bias=-1.5),
    three_region("blocks_of_64", 200, 80, 64, 1, "text", heads=4, kv_heads=1, pivot_bias=0.7),
    three_region("blocks_of_64_all", 200, 64, 64, 2, "all", batch=1),
    three_region("blocks_of_128", 200, 128, 128, 1, "text", batch=3, heads=1, kv_heads=1),
    three_region("window_only", 130, 64, 128, 6, "text"),
    three_region("wide_heads", 65, 256, 16, 1, "text", heads=1, kv_heads=1, scale=0.05),
    three_region("narrow_heads", 200, 8, 16, 6, "long", pivot_bias=1.0),
    three_region("large_scale", 130, 16, 16, 2, "text", scale=3.0, pivot_bias=math.log(3)),
    three_region("head_dim_1", 20, 1, 4, 2, "text"),
    three_region("zero_scale", 20, 16, 4, 1, "text", scale=0.0, pivot_bias=-1.0),
    # for CUDA's tensor cores
    three_region("grouped_32", 41, 32, 3, 2, "text", heads=2, kv_heads=1, scale=-0.4, pivot_bias=0.7),
    # small enough for Triton's interpreter, with edges of all kinds in tiles of 16
    three_region("tiny", 12, 8, 4, 2, "text", heads=1, kv_heads=1),
    three_region("tiny_grouped", 41, 20, 3, 2, "text", batch=1, heads=2, kv_heads=1, scale=-0.4, pivot_bias=0.7),
    three_region("tiny_aligned", 64, 16, 16, 1, "all", batch=1, heads=1, kv_heads=1),
]


def pivots_of(lengths: tuple[int, ...], kind: str) -> Tensor:
    """Of packed sequences."""
    rows = torch.full((len(lengths), some_pivots(kind, 1, max(lengths, default=0)).shape[1]), -1)
    for row, length in zip(rows, lengths, strict=True):
        if length:
            some = some_pivots(kind, 1, length)[0, : len(row)]
            row[: len(some)] = some
    return rows


def varlen(
    label: str,
    lengths: tuple[int, ...],
    head_dim: int,
    block_size: int,
    window_blocks: int,
    pivots: str = "text",
    *,
    heads: int = 2,
    kv_heads: int = 2,
    wide: bool = False,
    **options: Any,
) -> Case:
    """Sequences of these lengths, packed; `wide`: indices are int64, else int32."""
    total, chosen = sum(lengths), pivots_of(lengths, pivots)
    ends = torch.tensor((0, *lengths)).cumsum(0)
    index = torch.int64 if wide else torch.int32
    options |= {"pivots": chosen.to(index), "cu_seqlens": ends.to(index)}
    options |= {"block_size": block_size, "window_blocks": window_blocks, "return_lse": True}
    q, kv = (total, heads, head_dim), (total, kv_heads, head_dim)
    return Case("three_region_attention_varlen", label, {"query": q, "key": kv, "value": kv}, options)


VARLEN = [
    varlen("packed", (70, 0, 130, 1), 64, 16, 1, heads=4, kv_heads=2, pivot_bias=math.log(4)),
    varlen("packed_one", (65,), 16, 1, 1, "all", wide=True),
    varlen("packed_two_tokens", (1, 1), 8, 128, 6, "none"),
    varlen("packed_empty_ends", (0, 0, 64, 64, 0), 32, 3, 2, "long", heads=2, kv_heads=1, scale=0.3, max_seqlen=64),
    varlen("packed_short", (20,) * 23, 20, 4, 2, wide=True, pivot_bias=-1.5),
    varlen("packed_uneven", (300, 5, 9, 2, 31), 64, 64, 1, "few", heads=6, kv_heads=2, max_seqlen=500),
    varlen("packed_window_only", (100, 70), 128, 128, 6, heads=1, kv_heads=1, wide=True),
    varlen("packed_wide_heads", (40, 33), 256, 16, 1, "all", heads=1, kv_heads=1, scale=0.05),
    varlen("packed_narrow_heads", (80, 3, 120), 8, 16, 2, "all", pivot_bias=1.0),
    varlen("packed_zero_scale", (9, 20), 1, 4, 1, scale=0.0),
    # for CUDA's tensor cores, in its emulator
    varlen("packed_32", (0, 41, 3, 17), 32, 3, 2, heads=2, kv_heads=1, scale=-0.4, pivot_bias=0.7),
    # for Triton's interpreter
    varlen("tiny_packed", (5, 0, 20), 8, 4, 2, heads=2, kv_heads=1, pivot_bias=0.7, max_seqlen=20),
    varlen("tiny_packed_all", (18, 33), 16, 16, 1, "all", heads=1, kv_heads=1, wide=True),
]


def local_2d(
    label: str,
    grid: tuple[int, int],
    kernel_size: tuple[int, int] | None,
    head_dim: int,
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    prefix: int | None = None,
    masked: bool = False,
    coarse: tuple[int, int] | None = None,
    biased: str = "",
    padded: bool = False,
    **options: Any,
) -> Case:
    """`prefix`: number of text keys; `masked`: sample 0 sees none of them, others some; `coarse`: the coarse grid;
    `biased`: with a bias table, "wide" in float32 where the others have 16 bits, else "same"; `padded`: with a key mask
    that hides the lower right corner, of which samples have more and more, and some keys besides."""

    def size(tokens: int, h: int = kv_heads) -> tuple[int, ...]:
        return batch, h, tokens, head_dim

    tokens = grid[0] * grid[1]
    shapes = {"query": size(tokens, heads)}
    if kernel_size is None:
        options |= {"key": None, "value": None}
    else:
        shapes |= {"key": size(tokens), "value": size(tokens)}
    if biased and kernel_size:
        shapes["bias"] = heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1
    if padded:
        y, x, b = torch.arange(grid[0])[:, None], torch.arange(grid[1]), torch.arange(batch)[:, None, None]
        here = (y < grid[0] - 2 * b) & (x < grid[1] - b) & ((3 * y + 5 * x) % 7 > 0)
        options["key_mask"] = here.flatten(1)
    if prefix is not None:
        shapes |= {"prefix_key": size(prefix), "prefix_value": size(prefix)}
    if masked and prefix is not None:
        options["prefix_mask"] = (torch.arange(prefix) * 7 + torch.arange(batch)[:, None]) % 3 < torch.arange(batch)[
            :, None
        ]
    if coarse is not None:
        cells = coarse[0] * coarse[1]
        shapes |= {"coarse_key": size(cells), "coarse_value": size(cells)}
        options["coarse_grid"] = coarse
    options |= {"grid": grid, "kernel_size": kernel_size}
    wide = ("bias",) if biased == "wide" else ()
    return Case("local_attention_2d", label, shapes, {**options, "return_lse": True}, wide)


LOCAL_2D = [
    local_2d("one_pixel", (1, 1), (1, 1), 64),
    local_2d("row", (1, 7), (1, 13), 16, raster_causal=True, heads=3, kv_heads=1),
    local_2d("column", (5, 1), (3, 1), 8),
    local_2d("itself_only", (4, 4), (1, 1), 33, raster_causal=True),
    local_2d("three_by_three", (4, 4), (3, 3), 64, heads=4),
    local_2d("cogview2", (9, 13), (9, 5), 64, raster_causal=True, prefix=17, prefix_bias=1.2),
    local_2d("strict_row", (6, 8), (1, 15), 20, raster_causal=True, prefix=5, masked=True),
    local_2d("strict_column", (6, 8), (11, 1), 80, raster_causal=True, prefix=5, masked=True, batch=3, heads=6),
    local_2d("whole_grid", (6, 8), (11, 15), 16, scale=0.2),
    local_2d("whole_causal", (4, 4), (7, 7), 128, raster_causal=True, scale=0.5),
    local_2d("sixteen", (16, 16), (9, 5), 64, batch=1, heads=1, kv_heads=1),
    local_2d("sixteen_causal", (16, 16), (3, 3), 32, batch=1, raster_causal=True, prefix=70, prefix_bias=-2.0),
    local_2d("no_prefix_tokens", (4, 4), (3, 3), 16, prefix=0),
    local_2d("coarse_ratio_1", (4, 4), (3, 1), 16, coarse=(4, 4), coarse_kernel_size=(3, 5)),
    local_2d("coarse_ratio_2", (6, 8), (3, 3), 64, coarse=(3, 4), coarse_kernel_size=(3, 3), coarse_bias=0.4),
    local_2d("coarse_unequal", (6, 8), (5, 3), 20, coarse=(2, 8), coarse_kernel_size=(3, 1), coarse_bias=-1.0, heads=4),
    local_2d("coarse_one_cell", (9, 13), (3, 3), 8, coarse=(1, 1), coarse_kernel_size=(1, 1), raster_causal=True),
    local_2d("all_sets", (6, 8), (5, 5), 64, raster_causal=True, prefix=9, masked=True, prefix_bias=0.8, coarse=(2, 2),
             coarse_kernel_size=(3, 3), coarse_bias=0.5, heads=4, batch=3),
    local_2d("all_sets_wide", (4, 6), (3, 11), 256, prefix=3, masked=True, coarse=(2, 3), coarse_kernel_size=(1, 5),
             heads=1, kv_heads=1, prefix_bias=-0.5, coarse_bias=2.0, scale=0.05),
    local_2d("dilated", (9, 13), (5, 3), 64, dilation=(2, 5), heads=4, scale=0.2),
    local_2d("dilated_causal", (7, 20), (7, 5), 16, dilation=(2, 3), raster_causal=True, prefix=5, masked=True),
    local_2d("dilated_strict_row", (5, 9), (1, 9), 8, dilation=(4, 2), raster_causal=True, heads=3, kv_heads=1),
    local_2d("shifted", (9, 13), (9, 5), 64, edge="shift", prefix=3, prefix_bias=0.5),
    local_2d("shifted_square", (6, 6), (3, 3), 20, edge="shift", heads=4),
    local_2d("shifted_sets", (12, 10), (5, 3), 64, dilation=(2, 3), edge="shift", prefix=9, masked=True, heads=4,
             batch=3, prefix_bias=0.8, coarse=(4, 5), coarse_kernel_size=(3, 3), coarse_bias=-0.5),
    # on CPU: gradients summed up by several work items, and in a window that moves down a long image
    local_2d("bands", (16, 8), (3, 5), 32, batch=1, heads=4, kv_heads=1, prefix=3, coarse=(4, 4),
             coarse_kernel_size=(3, 3), prefix_bias=0.8, coarse_bias=-0.5),
    local_2d("bands_causal", (16, 8), (5, 3), 40, batch=1, prefix=3, masked=True, coarse=(4, 2),
             coarse_kernel_size=(3, 3), raster_causal=True),
    local_2d("bands_dilated", (23, 9), (3, 3), 16, batch=1, heads=1, kv_heads=1, dilation=(2, 1), prefix=2),
    local_2d("long_image", (40, 6), (5, 3), 8, batch=4, heads=8, kv_heads=8, prefix=3),
    local_2d("biased", (9, 13), (9, 5), 64, biased="same"),
    local_2d("biased_shifted", (9, 11), (3, 5), 20, dilation=(2, 2), edge="shift", biased="wide", heads=4, scale=0.2),
    local_2d("biased_causal", (16, 8), (5, 3), 40, batch=1, raster_causal=True, biased="wide", prefix=3, masked=True,
             coarse=(4, 2), coarse_kernel_size=(3, 3), coarse_bias=0.5, heads=6),
    local_2d("biased_row", (1, 37), (1, 13), 16, heads=3, kv_heads=1, edge="shift", biased="same"),
    local_2d("padded", (9, 13), (3, 5), 64, padded=True, heads=4),
    local_2d("padded_sets", (12, 10), (5, 3), 32, batch=3, dilation=(2, 3), padded=True, prefix=9, masked=True,
             coarse=(4, 5), coarse_kernel_size=(3, 3)),
    local_2d("padded_biased", (10, 12), (5, 3), 64, batch=3, padded=True, biased="wide", raster_causal=True),
    local_2d("coarse_alone", (8, 12), None, 64, coarse=(4, 6), coarse_kernel_size=(3, 5), coarse_bias=0.4, heads=4),
    local_2d("prefix_alone", (5, 9), None, 20, prefix=17, masked=True, prefix_bias=0.3),
    local_2d("without_local", (16, 16), None, 32, prefix=5, coarse=(2, 4), coarse_kernel_size=(3, 5), heads=6),
    local_2d("even", (9, 13), (4, 6), 64, prefix=3, biased="same"),
    local_2d("even_shifted", (9, 14), (4, 2), 32, dilation=(2, 3), edge="shift", biased="same"),
    local_2d("even_causal", (7, 8), (6, 4), 16, raster_causal=True, coarse=(7, 4), coarse_kernel_size=(2, 4)),
    # for CUDA's tensor cores, in its emulator
    local_2d("sets_32", (4, 6), (3, 5), 32, heads=2, kv_heads=1, raster_causal=True, prefix=5, masked=True,
             prefix_bias=0.8, coarse=(2, 3), coarse_kernel_size=(3, 1), coarse_bias=-0.5, scale=-0.2),
    local_2d("strips_64", (5, 18), (5, 9), 64, batch=1, heads=1, kv_heads=1, prefix=3, prefix_bias=13.0),
    local_2d("shifted_64", (9, 10), (9, 5), 64, batch=1, heads=1, kv_heads=1, edge="shift", scale=0.0),
    local_2d("phases_32", (7, 11), (3, 5), 32, batch=1, heads=1, kv_heads=1, dilation=(2, 2), coarse=(7, 1),
             coarse_kernel_size=(1, 1)),
    local_2d("padded_32", (4, 6), (3, 5), 32, heads=2, kv_heads=1, padded=True, raster_causal=True, prefix=5,
             masked=True),
    local_2d("padded_shifted_64", (5, 9), (3, 5), 64, heads=1, kv_heads=1, padded=True, edge="shift"),
    local_2d("biased_32", (4, 6), (5, 3), 32, heads=2, kv_heads=1, biased="same", raster_causal=True, prefix=5,
             masked=True, prefix_bias=0.8, coarse=(2, 3), coarse_kernel_size=(3, 1), scale=-0.2),
    local_2d("biased_dilated_64", (5, 17), (3, 5), 64, batch=1, heads=1, kv_heads=1, dilation=(2, 1), biased="wide",
             padded=True),
    local_2d("biased_shifted_64", (7, 14), (7, 5), 64, batch=1, heads=1, kv_heads=1, biased="same", edge="shift"),
    local_2d("cross_32", (4, 6), None, 32, heads=2, kv_heads=1, prefix=5, masked=True, coarse=(2, 3),
             coarse_kernel_size=(3, 1), prefix_bias=0.8, scale=-0.2),
    local_2d("prefix_alone_64", (3, 5), None, 64, heads=2, kv_heads=1, prefix=40, masked=True),
    # small enough for Triton's interpreter, with boxes clipped at all edges and wider than tiles of 16
    local_2d("tiny_local", (3, 4), (3, 3), 8, batch=2, heads=1, kv_heads=1),
    local_2d("tiny_row", (1, 19), (1, 37), 16, batch=1, heads=2, kv_heads=1, prefix=17, scale=-0.4),
    local_2d("tiny_sets", (3, 6), (3, 5), 20, heads=1, kv_heads=1, raster_causal=True, prefix=5, masked=True,
             prefix_bias=0.8, coarse=(1, 3), coarse_kernel_size=(1, 3), coarse_bias=-0.5),
    local_2d("tiny_dilated", (5, 7), (3, 3), 8, dilation=(1, 3), heads=2, kv_heads=1, batch=1, raster_causal=True,
             prefix=3, coarse=(5, 1), coarse_kernel_size=(3, 1)),
    local_2d("tiny_shifted", (3, 13), (3, 5), 8, dilation=(1, 2), edge="shift", heads=1, kv_heads=1, batch=1),
    local_2d("tiny_biased", (3, 5), (3, 4), 16, heads=2, kv_heads=1, batch=2, edge="shift", padded=True, biased="wide"),
    local_2d("tiny_cross", (4, 6), None, 8, heads=1, kv_heads=1, coarse=(2, 3), coarse_kernel_size=(1, 2)),
]  # fmt: skip

STEP = {"branch": (2, 3, 37), "residual": (2, 3, 37)}
WEIGHTS = dict.fromkeys(("post_weight", "post_bias", "pre_weight", "pre_bias"), (37,))
SEEDS = torch.tensor([2**40 + 5, 7])  # of two samples
OTHERS = [
    Case("pb_relax_softmax", "softmax", {"scores": (2, 3, 5, 37)}, {"alpha": 8.0, "causal": True}),
    Case("layer_norm", "layer_norm", {"x": (2, 3, 37), "weight": (37,), "bias": (37,)}, {}),
    Case("sandwich_layer_norm", "sandwich", STEP | WEIGHTS, {"dropout_p": 0.25, "seed": 5}),
    Case("layer_norm", "layer_norm_bare", {"x": (2, 3, 37)}, {}),
    Case(
        "sandwich_layer_norm",
        "sandwich_wide",
        {"branch": (2, 3, 40), "residual": (2, 3, 40), "post_weight": (40,), "pre_weight": (40,)},
        {"relax": "tensor", "dropout_p": 0.25, "seed": 5},
        wide=("residual",),
    ),
    Case("rms_norm", "rms_norm", {"x": (2, 3, 37), "weight": (37,)}, {"weight_offset": 1.0}),
    Case(
        "sandwich_layer_norm",
        "layer_pre",
        {"branch": (2, 3, 40), "residual": (2, 3, 40), "branch_scale": (2, 1, 1), "pre_weight": (40,)},
        {"norms": "pre", "relax": None, "weight_offset": 0.5},
    ),
    Case(
        "sandwich_layer_norm",
        "layer_post",
        {**STEP, "post_weight": (37,), "post_bias": (37,), "branch_scale": (1, 3, 1)},
        {"norms": "post", "dropout_p": 0.25, "dropout_after_norm": True, "seed": 5},
        wide=("residual",),
    ),
    Case("sandwich_rms_norm", "rms_both", STEP | {"post_weight": (37,), "pre_weight": (37,)}, {"branch_scale": 0.5}),
    Case(
        "sandwich_rms_norm",
        "rms_pre",
        STEP | {"pre_weight": (37,)},
        {"norms": "pre", "round_before_weight": True},
    ),
    Case(
        "sandwich_rms_norm",
        "rms_post",
        STEP | {"post_weight": (37,), "branch_scale": (2, 3, 1)},
        {"norms": "post", "weight_offset": 1.0, "dropout_p": 0.25, "seed": 5},
        wide=("residual", "post_weight"),
    ),
    Case("sandwich_layer_norm", "layer_seeds", STEP | WEIGHTS, {"relax": "tensor", "dropout_p": 0.25, "seed": SEEDS}),
    Case(
        "sandwich_layer_norm",
        "layer_seeds_pre",
        {"branch": (2, 3, 40), "residual": (2, 3, 40), "branch_scale": (2, 3, 1), "pre_weight": (40,)},
        {"norms": "pre", "dropout_p": 0.25, "seed": SEEDS},
        wide=("residual",),
    ),
    Case(
        "sandwich_rms_norm",
        "rms_seeds",
        STEP | {"post_weight": (37,), "pre_weight": (37,), "branch_scale": (2, 1, 1)},
        {"dropout_p": 0.25, "dropout_after_norm": True, "seed": SEEDS},
    ),
    Case("sandwich_rms_norm", "rms_seeds_post", STEP | {"post_weight": (37,)},
         {"norms": "post", "dropout_p": 0.25, "seed": SEEDS}),
]  # fmt: skip

DECODE = [
    Case(
        "three_region_attention_decode",
        "three_region_decode",
        {"query": (2, 4, 3, 16), "key_cache": (2, 2, 70, 16), "value_cache": (2, 2, 70, 16)},
        {"pivots": some_pivots("text", 2, 70), "cache_seqlens": torch.tensor([70, 41]), "block_size": 8,
         "window_blocks": 2, "pivot_bias": 0.5, "return_lse": True},
    ),
    Case(
        "three_region_attention_decode",
        "three_region_decode_leftpad",
        {"query": (3, 4, 3, 16), "key_cache": (3, 2, 70, 16), "value_cache": (3, 2, 70, 16)},
        {"pivots": some_pivots("text", 3, 60), "cache_seqlens": torch.tensor([70, 41, 5]), "block_size": 8,
         "window_blocks": 2, "pivot_bias": 0.5, "cache_leftpad": torch.tensor([9, 0, 3]), "return_lse": True},
    ),
    Case(
        "local_attention_2d_decode",
        "local_2d_decode",
        {"query": (2, 2, 3, 16), "key_cache": (2, 1, 48, 16), "value_cache": (2, 1, 48, 16),
         "prefix_key": (2, 1, 5, 16), "prefix_value": (2, 1, 5, 16)},
        {"cache_seqlens": torch.tensor([48, 20]), "grid": (6, 8), "kernel_size": (5, 3), "prefix_bias": 0.5,
         "prefix_mask": torch.tensor([[True, False, True, True, False], [False] * 5])},
    ),
    Case(
        "local_attention_2d_decode",
        "local_2d_cells",
        {"query": (2, 4, 5, 16), "key_cache": (2, 2, 48, 16), "value_cache": (2, 2, 48, 16), "bias": (4, 5, 5),
         "coarse_key": (2, 2, 12, 16), "coarse_value": (2, 2, 12, 16)},
        {"cache_seqlens": torch.tensor([40, 13]), "grid": (6, 8), "kernel_size": (3, 3), "raster_causal": False,
         "query_index": torch.tensor([[47, 0, 13, 14, 39], [12, 22, 47, 3, 7]]), "edge": "shift", "dilation": (2, 1),
         "key_mask": torch.arange(96).view(2, 48) % 5 > 0, "coarse_grid": (3, 4), "coarse_kernel_size": (1, 3)},
        wide=("bias",),
    ),
]  # fmt: skip

PRODUCTS = [
    Case("linear_decode", "linear", {"x": (2, 6, 37), "weight": (21, 37), "bias": (21,)}, {}),
    Case(
        "linear_decode",
        "linear_int8",
        {"x": (3, 1, 70), "bias": (21,), "scale": (21,)},
        {"weight": torch.arange(-735, 735).remainder(256).sub(128).to(torch.int8).view(21, 70)},
        wide=("scale",),
    ),
]

BY_LABEL = {case.label: case for case in [*THREE_REGION, *VARLEN, *LOCAL_2D, *OTHERS, *DECODE, *PRODUCTS]}
# one of each operator, with everything in it that the operator can do
DIFFERENTIABLE = [
    *(BY_LABEL[x] for x in ("blocks_of_64", "grouped_32", "tiny", "all_sets", "sets_32", "tiny_local", "shifted_sets")),
    *(BY_LABEL[x] for x in ("packed", "packed_32", "tiny_packed")),
    *(BY_LABEL[x] for x in ("padded_biased", "tiny_biased", "coarse_alone", "tiny_cross")),
    *OTHERS,
]
ALL = [*DIFFERENTIABLE, *DECODE, *PRODUCTS]
