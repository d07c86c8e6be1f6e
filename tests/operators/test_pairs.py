"""Counts of pairs are those of the patterns, summed."""

import itertools

import pytest
import torch

from cogview_ops import pairs, patterns


def places(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    i = torch.arange(tokens)
    return i[:, None], i


@pytest.mark.parametrize(("tokens", "pivots", "block", "blocks"), [(37, 9, 4, 2), (24, 30, 8, 1), (5, 0, 8, 2)])
def test_three_region(tokens: int, pivots: int, block: int, blocks: int) -> None:
    first = torch.arange(min(pivots, tokens))[None]
    masks = patterns.three_region_masks(torch.arange(tokens)[None], tokens, first, block, blocks)
    assert pairs.three_region(tokens, pivots, block, blocks) == sum(int(mask.sum()) for mask in masks)


def test_three_region_of_one_block_is_causal() -> None:
    assert pairs.three_region(37, 0, 37, 1) == pairs.causal(37) == 703


@pytest.mark.parametrize(
    ("kernel", "dilation", "edge", "raster_causal"),
    [
        ((3, 5), (1, 1), "clip", False),
        ((3, 5), (1, 1), "clip", True),
        ((3, 3), (2, 1), "clip", False),
        ((3, 3), (2, 1), "clip", True),
        ((3, 5), (1, 1), "shift", False),
    ],
)
def test_local_2d(kernel: tuple[int, int], dilation: tuple[int, int], edge: str, raster_causal: bool) -> None:
    grid = (6, 7)
    how = {"grid": grid, "kernel_size": kernel, "dilation": dilation, "edge": edge, "raster_causal": raster_causal}
    seen = patterns.local_2d(*places(42), **how)
    assert pairs.local_2d(grid, kernel, dilation, edge, raster_causal=raster_causal) == int(seen.sum())


def test_coarse_2d() -> None:
    query, key = torch.arange(8 * 6)[:, None], torch.arange(4 * 3)
    seen = patterns.coarse_2d(query, key, grid=(8, 6), coarse_grid=(4, 3), kernel_size=(3, 3))
    assert pairs.coarse_2d((8, 6), (4, 3), (3, 3)) == int(seen.sum())


@pytest.mark.parametrize(
    ("kind", "wrap"), [*itertools.product(["row", "column", "convolutional"], [False]), ("row", True)]
)
def test_dalle(kind: str, wrap: bool) -> None:
    how = {"kind": kind, "wrap": wrap, "text_len": 5, "grid": (6, 7), "kernel_size": 5}
    assert pairs.dalle(**how) == int(patterns.dalle(*places(47), **how).sum())
