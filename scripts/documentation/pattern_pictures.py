"""Who sees whom, by `cogview_ops.patterns`."""

from typing import Any

import torch
from torch import Tensor

from cogview_ops import patterns, sample_pivots

from .drawing import CELL, Drawing
from .pictures import picture


def matrix(d: Drawing, x: float, y: float, masks: dict[str, Tensor], cell: float = CELL) -> None:
    """A mask, `[queries, keys]`, of each colour; rows of queries, columns of keys."""
    rows, columns = next(iter(masks.values())).shape
    d.box(x, y, columns * cell, rows * cell)
    for colour, mask in masks.items():
        for i, j in mask.nonzero().tolist():
            d.cell(x + j * cell, y + i * cell, cell, colour)
    d.text(x + columns * cell / 2, y - 8, "keys")
    d.text(x - 10, y + rows * cell / 2, "queries", turn=-90)


def grid(d: Drawing, x: float, y: float, shape: tuple[int, int], seen: Tensor, colour: str, query: int | None) -> None:
    """Cells of an image that one query sees, in raster order."""
    for n in range(shape[0] * shape[1]):
        left, top = x + n % shape[1] * CELL, y + n // shape[1] * CELL
        d.cell(left, top, CELL, "query" if n == query else colour if seen[n] else "nothing")


def text_row(d: Drawing, x: float, y: float, seen: Tensor, cell: float = CELL) -> None:
    for n, one in enumerate(seen.tolist()):
        d.cell(x + n * cell, y, cell, "text" if one else "nothing")


@picture("three-region", "Queries down, keys across: windows of blocks along the diagonal, before them pivots")
def three_region(d: Drawing) -> None:
    tokens, text, block, window = 48, 5, 6, 2
    position = torch.arange(tokens)[None]
    generator = torch.Generator().manual_seed(4)
    pivots = sample_pivots(position < text, position >= text, 12, generator=generator)
    near, far = (mask[0] for mask in patterns.three_region_masks(position, tokens, pivots, block, window))
    matrix(d, 40, 28, {"window": near, "pivot": far}, 8)
    for b in range(block, tokens, block):
        d.line(40, 28 + 8 * b, 40 + 8 * tokens, 28 + 8 * b)
        d.line(40 + 8 * b, 28, 40 + 8 * b, 28 + 8 * tokens)
    d.legend(40, 428, {"window": "window, causal", "pivot": "pivots: text, some image"}, across=True)
    d.text(40, 466, f"{tokens} tokens, {text} of text; block_size={block}, window_blocks={window}", align="start")


@picture("overview", "What tokens see in three-region attention, in 2D local attention and in a layer of DALL-E")
def overview(d: Drawing) -> None:
    """README's picture too: docs/overview.png."""
    position, generator = torch.arange(32)[None], torch.Generator().manual_seed(4)
    pivots = sample_pivots(position < 4, position >= 4, 9, generator=generator)
    near, far = (mask[0] for mask in patterns.three_region_masks(position, 32, pivots, 4, 2))
    d.text(10, 16, "three_region_attention", align="start", code=True)
    for colour, mask in (("window", near), ("pivot", far)):
        for i, j in mask.nonzero().tolist():
            d.cell(10 + j * 6.75, 30 + i * 6.75, 6.75, colour)
    shape, query = (12, 12), 7 * 12 + 5
    how: dict[str, Any] = {"grid": shape, "kernel_size": (5, 5), "raster_causal": False, "coarse_kernel_size": (3, 3)}
    seen = patterns.cogview2(torch.tensor(20 + query), torch.arange(164), text_len=4, coarse_grid=(4, 4), **how)
    d.text(270, 16, "local_attention_2d", align="start", code=True)
    for n, one in enumerate(seen[4:20].tolist()):
        d.cell(270 + n % 4 * 18, 30 + n // 4 * 18, 18, "coarse" if one else "nothing")
    text_row(d, 270, 228, torch.ones(16, dtype=torch.bool))
    grid(d, 352, 30, (10, 10), seen[20:].view(shape)[1:11, 1:11].flatten(), "window", (7 - 1) * 10 + 5 - 1)
    d.text(576, 16, "dalle_attention", align="start", code=True)
    for n, kind in enumerate(("row", "column")):
        one = patterns.dalle(
            torch.tensor(4 + 4 * 6 + 3), torch.arange(40), kind=kind, text_len=4, grid=(6, 6), kernel_size=5, wrap=False
        )
        text_row(d, 576 + n * 120, 30, one[:4])
        grid(d, 576 + n * 120, 56, (6, 6), one[4:], "window", 4 * 6 + 3)
    d.text(576, 196, "one softmax over all that is seen,", align="start")
    d.text(576, 216, "no score matrix in memory,", align="start")
    d.text(576, 236, "forward and backward", align="start")
    entries = {"query": "the query", "window": "window", "pivot": "pivots", "text": "text", "coarse": "coarser image"}
    d.legend(10, 270, entries, across=True)


@picture("three-region-packed", "Packed sequences on the diagonal, each with its own window and pivots")
def three_region_packed(d: Drawing) -> None:
    lengths, text = (20, 9, 19), 3
    ends = torch.tensor((0, *lengths)).cumsum(0)
    position = torch.cat([torch.arange(n) for n in lengths])
    generator = torch.Generator().manual_seed(1)
    pivots = sample_pivots(position < text, position >= text, 5, cu_seqlens=ends, generator=generator)
    near, far = patterns.three_region_packed_masks(pivots, ends, sum(lengths), 4, 2)
    matrix(d, 40, 28, {"window": near, "pivot": far}, 8)
    for end in ends[1:-1].tolist():
        d.line(40, 28 + 8 * end, 40 + 8 * sum(lengths), 28 + 8 * end)
        d.line(40 + 8 * end, 28, 40 + 8 * end, 28 + 8 * sum(lengths))
    d.legend(40, 428, {"window": "window", "pivot": "pivots"}, across=True)
    d.text(40, 466, "three sequences, packed: none sees another", align="start")


@picture("sample-pivots", "A row of tokens, text first: all text and some image tokens are pivots")
def pivots(d: Drawing) -> None:
    tokens, text = 36, 6
    position = torch.arange(tokens).expand(3, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    chosen = sample_pivots(position < text, position >= text, 14, generator=generators)
    for row, places in enumerate(chosen.tolist()):
        for n in range(tokens):
            colour = "text" if n < text else "pivot" if n in places else "nothing"
            d.cell(10 + n * 14, 30 + row * 26, 14, colour)
    d.text(10 + text * 7, 20, "text")
    d.text(10 + (text + tokens) * 7, 20, "image")
    d.legend(10, 124, {"text": "text: always", "pivot": "drawn", "nothing": "not a pivot"}, across=True)


WINDOWS: dict[str, dict[str, Any]] = {
    "a window": {"query": (4, 4)},
    'edge="clip"': {"query": (0, 8)},
    'edge="shift"': {"query": (0, 8), "edge": "shift"},
    "dilation=2": {"query": (4, 4), "dilation": (2, 2)},
    "raster_causal=True": {"query": (4, 4), "raster_causal": True},
    "kernel_size=(3, 9)": {"query": (4, 4), "kernel_size": (3, 9)},
}


@picture("local-2d", "A query's window: cut or moved at the edge, dilated, causal, of another shape")
def local_2d(d: Drawing) -> None:
    shape, keys = (9, 9), torch.arange(81)
    for n, (label, how) in enumerate(WINDOWS.items()):
        how = {"kernel_size": (5, 5), "raster_causal": False} | how
        y, x = how.pop("query")
        query = y * shape[1] + x
        left, top = 10 + n % 3 * 190, 30 + n // 3 * 200
        d.text(left + 9 * CELL / 2, top - 10, label, code=True)
        grid(d, left, top, shape, patterns.local_2d(torch.tensor(query), keys, grid=shape, **how), "window", query)
    d.legend(10, 428, {"query": "the query", "window": "keys it sees"}, across=True)


@picture("dalle", "What an image token sees: all text, and its row, column or square")
def dalle(d: Drawing) -> None:
    text, shape = 7, (7, 7)
    kinds = {"row": ("row", False), "row, wrap=True": ("row", True), "column": ("column", False)}
    kinds["convolutional"] = "convolutional", False
    keys = torch.arange(text + 49)
    for n, (label, (kind, wrap)) in enumerate(kinds.items()):
        query = text + 4 * 7 + 3
        seen = patterns.dalle(torch.tensor(query), keys, kind=kind, text_len=text, grid=shape, kernel_size=5, wrap=wrap)
        left, top = 10 + n * 140, 30
        d.text(left + 7 * CELL / 2, top - 10, label, code=True)
        text_row(d, left, top, seen[:text])
        grid(d, left, top + CELL + 8, shape, seen[text:], "window", query - text)
    d.legend(10, 206, {"query": "the query", "text": "text", "window": "image tokens before it"}, across=True)


@picture("cogview2", "What an image token sees: its window and coarse cells, or its window and text")
def cogview2(d: Drawing) -> None:
    text, shape, coarse = 8, (12, 12), (4, 4)
    how: dict[str, Any] = {"grid": shape, "kernel_size": (5, 5), "raster_causal": False, "coarse_kernel_size": (3, 3)}
    for n, cells in enumerate((coarse, None)):
        start, left = text + (16 if cells else 0), 10 + n * 330
        query = start + 6 * 12 + 7
        keys = torch.arange(start + 144)
        seen = patterns.cogview2(torch.tensor(query), keys, text_len=text, coarse_grid=cells, **how)
        d.text(left, 20, "direct: with a coarse image" if cells else "iterative: without", align="start")
        text_row(d, left, 34, seen[:text], 11)
        if cells:
            for c, one in enumerate(seen[text:start].tolist()):
                d.cell(left + c % 4 * 22, 58 + c // 4 * 22, 22, "coarse" if one else "nothing")
        grid(d, left + (102 if cells else 0), 58, shape, seen[start:], "window", query - start)
    entries = {"query": "the query", "window": "its window", "coarse": "coarse cells", "text": "text"}
    d.legend(10, 292, entries, across=True)


@picture("causal", "Causal, the queries being the last of the keys' tokens")
def causal(d: Drawing) -> None:
    queries, keys = 10, 16
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    matrix(d, 40, 28, {"window": patterns.causal(i, j, queries, keys)}, 12)
    d.text(260, 60, "causal=True: query i of Sq", align="start")
    d.text(260, 78, "sees keys j <= i + Sk - Sq", align="start")


@picture("merge", "Keys in disjoint sets, each with an attention of its own, joined into one softmax")
def merge(d: Drawing) -> None:
    shape, query = (7, 7), 3 * 7 + 3
    seen = patterns.local_2d(torch.tensor(query), torch.arange(49), grid=shape, kernel_size=(3, 3), raster_causal=False)
    text_row(d, 10, 60, torch.ones(6, dtype=torch.bool))
    grid(d, 10, 96, shape, seen, "window", query)
    d.flow(166, 52, "attention over text", "out, lse")
    d.flow(166, 130, "attention over a window", "out, lse")
    d.arrow(366, 72, 410, 100)
    d.arrow(366, 150, 410, 122)
    d.flow(410, 91, "merge_attentions", "one softmax over all")
