"""In which order rounds draw the cells of a grid: the published one, and that of tiles of any sides."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from cogview import lopar
from cogview.models import recipe_of
from cogview.recipes.coglm import CogLM
from cogview.recipes.iterative import Iterative, IterativeConfig


def test_the_published_order():
    order = lopar.order(lopar.PUBLISHED, 60)
    tile = order[:6, :6]
    assert torch.equal(order.view(10, 6, 10, 6)[7, :, 3], tile)
    assert [int((tile >= m).sum()) for m in range(1, 7)] == [23, 19, 15, 10, 6, 2]
    assert int((tile < 1).sum()) == 13
    diagonal = torch.arange(6) + torch.arange(6)[:, None] - 1
    first = (tile >= 1) & (diagonal <= 6)
    assert torch.equal(tile[first], diagonal[first])
    assert sorted(tile[(tile >= 1) & ~first].tolist()) == [1, 1, 2, 3]


@pytest.mark.parametrize("rows", range(2, 10))
@pytest.mark.parametrize("columns", range(2, 10))
def test_diagonals(rows, columns):
    """Of neighbours that are drawn the upper and the left one come first, and about a third of all cells stays."""
    tile = torch.tensor(lopar.diagonals(rows, columns))
    assert tile.shape == (rows, columns)
    drawn = tile >= 1
    assert bool((tile.diff(dim=0) > 0)[drawn[1:]].all())
    assert bool((tile.diff(dim=1) > 0)[drawn[:, 1:]].all())
    assert sorted({int(n) for n in tile[drawn]}) == list(range(1, int(tile.max()) + 1))  # there is no empty round
    kept = (~drawn).float().mean()
    assert 0.25 <= kept <= 0.5
    if min(rows, columns) >= 4:
        assert abs(kept - 13 / 36) < 0.06


def test_drawn_cells_are_beside_some_that_stay():
    drawn = torch.tensor(lopar.diagonals(7, 7)) >= 1
    beside = sum(((~drawn).roll(by, dim) for dim in (0, 1) for by in (1, -1)), start=torch.zeros(7, 7).int())
    assert bool((beside[1:-1, 1:-1] == torch.where(drawn[1:-1, 1:-1], 2, 0)).all())


@pytest.mark.parametrize(
    ("side", "tile", "rounds"), [(4, 4, 5), (8, 4, 5), (15, 5, 7), (16, 4, 5), (21, 7, 11), (13, 13, 23), (2, 2, 1)]
)
def test_a_tile_that_fits(side, tile, rounds):
    """Of each grid every cell stays, or is drawn in one of the rounds."""
    order = lopar.order(lopar.fitting(side), side)
    times = sum((order == m).int() for m in range(1, rounds + 1))
    assert torch.equal(times, (order >= 1).int())
    assert torch.equal(order, order[:tile, :tile].repeat(side // tile, side // tile))
    assert int(order.max()) == rounds


def test_the_published_one_where_it_fits():
    for side in (6, 12, 24, 60):
        assert lopar.fitting(side) == lopar.PUBLISHED


def test_bad_tiles():
    with pytest.raises(ValueError, match=r"tile: expected sides that divide 8, got \[6, 6\]"):
        lopar.order(lopar.PUBLISHED, 8)
    with pytest.raises(ValueError, match="tile: expected a cell to be drawn"):
        lopar.order(((0, -1),), 8)
    with pytest.raises(ValueError, match=r"tile: expected sides of at least 2, got \[1, 4\]"):
        lopar.diagonals(1, 4)
    with pytest.raises(ValueError, match="grid: expected a side of at least 2, got 1"):
        lopar.fitting(1)


def test_top_k_of_any_rounds():
    assert lopar.top_k(6) == lopar.PUBLISHED_TOP_K
    assert lopar.top_k(5) == (40, 40, 20, 20, 10)
    assert lopar.top_k(7) == (40, 40, 40, 20, 20, 10, 10)
    assert lopar.top_k(1) == (10,)
    for rounds in range(1, 30):
        found = lopar.top_k(rounds)
        assert len(found) == rounds
        assert sorted(found, reverse=True) == list(found)


# of recipe iterative


def sizes(small: int, fine: int) -> dict[str, Any]:
    own = {"image_grid": fine, "small_grid": small, "max_text": 9}
    return own | {"image_vocab": 40, "text_vocab": 20, "chinese_from": 12}


@pytest.mark.parametrize(("small", "fine"), [(5, 15), (7, 21), (8, 16), (4, 8), (20, 60)])
def test_fit(small, fine):
    for name in Iterative.presets:
        config = Iterative.fit(Iterative.presets[name][0], **sizes(small, fine))
        assert config.tile == lopar.fitting(fine)
        again = Iterative.fit(config, **sizes(small, fine))
        assert again == config


def test_begun():
    """With the weights of a model of any grid."""
    own = sizes(5, 5)
    del own["small_grid"]
    base = CogLM.fit(CogLM.presets["tiny"][0], **own)
    config = Iterative.begun(base)
    assert (config.fine_grid, config.tile) == (15, lopar.diagonals(5, 5))


def test_a_tile_of_ones_own():
    own = ((0, 1), (2, 1))
    config = dataclasses.replace(Iterative.presets["tiny"][0], tile=own)
    assert Iterative.fit(config, **sizes(8, 16)).tile == own
    assert Iterative.fit(config, **sizes(5, 15)).tile == lopar.diagonals(5, 5)
    with pytest.raises(ValueError, match=r"tile: expected sides that divide 24, got \[5, 5\]"):
        dataclasses.replace(config, tile=lopar.diagonals(5, 5))


def test_a_checkpoint_says_its_tile(tmp_path):
    for config in (
        Iterative.presets["tiny"][0],
        Iterative.fit(Iterative.presets["tiny"][0], **sizes(5, 15)),
    ):
        saved = json.loads(json.dumps(dataclasses.asdict(config)))
        loaded = recipe_of(tmp_path, {"recipe": "iterative", "config": saved}).config
        assert isinstance(loaded, IterativeConfig)
        assert loaded == config
        assert tuple(map(tuple, saved["tile"])) == lopar.fitting(config.fine_grid)
