"""The patterns against their definition in words, token by token."""

import itertools
from typing import Any

import pytest
import torch

from cogview_ops import patterns


@pytest.mark.parametrize(("block_size", "window_blocks"), [(1, 1), (1, 3), (3, 1), (4, 2), (5, 6), (30, 1)])
def test_three_region(block_size: int, window_blocks: int) -> None:
    seqlen = 23
    pivots = torch.tensor([[0, 1, 2, 9, 14, 22, -1], [3, 4, 11, -1, -1, -1, -1]])
    window, pivot = patterns.three_region_masks(torch.arange(seqlen)[None], seqlen, pivots, block_size, window_blocks)
    assert window.shape == pivot.shape == (2, seqlen, seqlen)
    for b, i, j in itertools.product(range(2), range(seqlen), range(seqlen)):
        blocks_back = i // block_size - j // block_size
        assert window[b, i, j] == (j <= i and blocks_back < window_blocks)
        assert pivot[b, i, j] == (j in pivots[b].tolist() and blocks_back >= window_blocks)
    assert not (window & pivot).any()


@pytest.mark.parametrize(("block_size", "window_blocks"), [(1, 1), (3, 2), (7, 1), (64, 6)])
def test_all_pivots_tile_the_causal_triangle(block_size: int, window_blocks: int) -> None:
    seqlen = 40
    everything = torch.arange(seqlen)[None]
    window, pivot = patterns.three_region_masks(everything, seqlen, everything, block_size, window_blocks)
    triangle = torch.ones(seqlen, seqlen).tril()
    assert torch.equal(window[0].float() + pivot[0].float(), triangle)


def test_three_region_of_placed_queries_are_rows_of_the_whole() -> None:
    """Decoding uses the training pattern: the rows of queries standing anywhere."""
    pivots = torch.tensor([[0, 1, 5, 9], [0, 3, -1, -1]])
    whole = patterns.three_region_masks(torch.arange(20)[None], 20, pivots, 3, 2)
    position = torch.tensor([[4, 5, 6], [17, 18, 19]])
    placed = patterns.three_region_masks(position, 20, pivots, 3, 2)
    for mask, full in zip(placed, whole, strict=True):
        for b in range(2):
            assert torch.equal(mask[b], full[b if len(full) > 1 else 0, position[b]])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_sequences_are_blocks_on_the_diagonal(index: torch.dtype) -> None:
    lengths = (0, 5, 0, 0, 23, 1, 0)
    ends = torch.tensor((0, *lengths)).cumsum(0).to(index)
    pivots = torch.tensor([[-1, -1, -1], [0, 1, 4], [-1, -1, -1], [-1, -1, -1], [2, 9, 20], [0, -1, -1], [-1] * 3])
    sequence, position = patterns.packed(ends, 29)
    assert sequence.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert position.tolist() == [i for length in lengths for i in range(length)]
    alone = [
        patterns.three_region_masks(torch.arange(length)[None], length, row[None].to(index), 3, 2)
        for length, row in zip(lengths, pivots, strict=True)
    ]
    packed = patterns.three_region_packed_masks(pivots.to(index), ends, 29, 3, 2)
    for mask, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(mask, torch.block_diag(*(x[0] for x in parts)).bool())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 1), (1, 11), (7, 11)])
def test_local_2d(kernel: tuple[int, int], causal: bool) -> None:
    height, width = 4, 6
    i = torch.arange(height * width)
    mask = patterns.local_2d(i[:, None], i, grid=(height, width), kernel_size=kernel, raster_causal=causal)
    for (y, x), (v, u) in itertools.product(itertools.product(range(height), range(width)), repeat=2):
        near = abs(v - y) <= kernel[0] // 2 and abs(u - x) <= kernel[1] // 2
        assert mask[y * width + x, v * width + u] == (near and (not causal or (v, u) <= (y, x)))


def natten_window(index: int, length: int, kernel: int, dilation: int) -> range:
    """The keys of one axis as NATTEN's code has them (get_window_start, arXiv 2209.15001), in its own words."""
    reach = kernel // 2 * dilation
    if index - reach < 0:
        start = index % dilation
    elif index + reach >= length:
        offset, whole = index % dilation, length // dilation * dilation
        rest = length - whole
        start = length - rest + offset - 2 * reach if offset < rest else whole + offset - kernel * dilation
    else:
        start = index - reach
    return range(start, start + kernel * dilation, dilation)


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_local_1d_at_edges(kernel: int, dilation: int) -> None:
    for length in range(1, 18):
        i = torch.arange(length)
        clipped = patterns.local_1d(i[:, None], i, length, kernel, dilation, "clip")
        for x in range(length):
            window = range(x - kernel // 2 * dilation, x + kernel // 2 * dilation + 1, dilation)
            assert clipped[x].nonzero().flatten().tolist() == [u for u in window if 0 <= u < length]
        if kernel * dilation <= length:
            shifted = patterns.local_1d(i[:, None], i, length, kernel, dilation, "shift")
            for x in range(length):
                assert shifted[x].nonzero().flatten().tolist() == list(natten_window(x, length, kernel, dilation))


@pytest.mark.parametrize("edge", ["clip", "shift"])
def test_axes_of_local_2d(edge: str) -> None:
    """Kernel and dilation of rows, then of columns."""
    i = torch.arange(7 * 9)
    how: dict[str, Any] = {"kernel_size": (3, 5), "dilation": (2, 1), "edge": edge}
    mask = patterns.local_2d(i[:, None], i, grid=(7, 9), **how, raster_causal=False)
    y, x = torch.arange(7), torch.arange(9)
    rows = patterns.local_1d(y[:, None], y, 7, 3, 2, edge)
    columns = patterns.local_1d(x[:, None], x, 9, 5, 1, edge)
    assert torch.equal(mask.view(7, 9, 7, 9), rows[:, None, :, None] & columns[:, None, :])


def test_raster_causal_keeps_the_right_of_rows_above() -> None:
    mask = patterns.local_2d(torch.tensor(12), torch.arange(25), grid=(5, 5), kernel_size=(3, 3), raster_causal=True)
    assert mask.nonzero().flatten().tolist() == [6, 7, 8, 11, 12]


def test_dall_e_row_and_column() -> None:
    """(1, 2W-1) is the query's row, (2H-1, 1) its column."""
    i = torch.arange(12)
    row = patterns.local_2d(i[:, None], i, grid=(3, 4), kernel_size=(1, 7), raster_causal=False)
    column = patterns.local_2d(i[:, None], i, grid=(3, 4), kernel_size=(5, 1), raster_causal=False)
    assert torch.equal(row, i[:, None] // 4 == i // 4)
    assert torch.equal(column, i[:, None] % 4 == i % 4)


@pytest.mark.parametrize("coarse", [(1, 1), (2, 3), (4, 2), (4, 6)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_coarse_2d(coarse: tuple[int, int], kernel: tuple[int, int]) -> None:
    height, width = 4, 6
    i, j = torch.arange(height * width), torch.arange(coarse[0] * coarse[1])
    mask = patterns.coarse_2d(i[:, None], j, grid=(height, width), coarse_grid=coarse, kernel_size=kernel)
    pixels, cells = ((itertools.product(range(h), range(w))) for h, w in ((height, width), coarse))
    for (y, x), (v, u) in itertools.product(pixels, cells):
        home = y // (height // coarse[0]), x // (width // coarse[1])
        near = abs(v - home[0]) <= kernel[0] // 2 and abs(u - home[1]) <= kernel[1] // 2
        assert mask[y * width + x, v * coarse[1] + u] == near


def test_causal_is_aligned_bottom_right() -> None:
    i, j = torch.arange(3)[:, None], torch.arange(5)
    assert torch.equal(patterns.causal(i, j, 3, 5), torch.ones(3, 5).tril(2).bool())
    assert torch.equal(patterns.causal(j[:, None], torch.arange(3), 5, 3), torch.ones(5, 3).tril(-2).bool())
