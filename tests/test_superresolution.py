"""The recipe: what stands where, at which positions, and what is seen."""

import dataclasses

import pytest
import torch
from test_transformer import SIZES

from cogview.recipes import preset
from cogview.recipes.cogview import CogViewConfig
from cogview.recipes.superresolution import SuperResolution, SuperResolutionConfig

TEXT = torch.tensor([[5, 6, 7], [1, -1, -1]])
SMALL, LARGE = torch.arange(8).view(2, 4), torch.arange(32).view(2, 16) % 20


def recipe_of(attention="dense", **change):
    pattern = {"block_size": 4, "window_blocks": 2, "num_pivots": 25}
    return SuperResolution(SuperResolutionConfig(**SIZES | pattern | {"attention": attention} | change))


def test_the_small_picture_comes_before_the_large_one():
    recipe = recipe_of()
    batch, v = recipe.batch(TEXT, SMALL, LARGE), recipe.vocab
    for row, (text, padding) in enumerate([([5, 6, 7], 6), ([1], 8)]):
        small, large = SMALL[row].tolist(), LARGE[row].tolist()
        expected = [v["ROI1"], *(20 + t for t in text), v["BASE"], v["BOI1"], *small, v["EOI1"]]
        expected += [v["ROI2"], v["POS0"], v["BASE"], v["BOI2"], *large, v["EOI2"]] + padding * [v["PAD"]]
        assert batch.inputs[row].tolist() == expected[:-1]
        assert batch.targets[row].tolist() == expected[1:]
    assert recipe.length == batch.inputs.shape[1] == 9 + 8 + 4 + 16
    assert batch.weights[0].sum() == 31
    assert batch.weights[1].sum() == 29
    weighted = recipe.batch(TEXT, SMALL, LARGE, text_weight=0.5, image_weight=0.25)
    assert weighted.weights[0].sum() == 11 * 0.5 + 20 * 0.25
    kinds = recipe.kinds(batch.targets)
    assert {name: kind[0].sum().item() for name, kind in kinds.items()} == {"text": 11, "small": 4, "image": 16}
    assert recipe.hideable(batch.inputs)[1].nonzero().flatten().tolist() == list(range(13, 29))


def test_positions_begin_anew():
    """One text token: [ROI1] text [BASE] [BOI1] 4 codes [EOI1] are 0 to 8, [ROI2] is 9. The table has 29 rows, of which
    0 to 10 are of the longest text."""
    wanted = {
        ("following", "on"): [*range(9), *range(20)],
        ("following", "behind"): [*range(10), *range(1, 20)],
        ("fixed", "on"): [0, 1, 2, *range(11, 17), 0, 1, 2, *range(11, 28)],
        ("fixed", "behind"): [0, 1, 2, *range(11, 18), 1, 2, *range(11, 28)],
    }
    for (images, restart), expected in wanted.items():
        recipe = recipe_of(image_positions=images, restart=restart)
        assert recipe.batch(TEXT, SMALL, LARGE).context.positions[1, :29].tolist() == expected, (images, restart)


def test_the_published_sequence_is_longer_than_its_table():
    config, training = preset("cogview-4b", "superresolution")
    recipe = SuperResolution(config)
    assert (config.max_positions, recipe.grids, recipe.length) == (1089, (16, 32), 1349)
    text, codes = torch.zeros(1, 56, dtype=torch.int64), torch.zeros(1, 1280, dtype=torch.int64)
    inputs, targets = recipe.layout(text, codes)
    assert int((targets != recipe.vocab["PAD"]).sum()) + 1 == 1345
    positions = recipe.context(inputs).positions
    assert int((inputs[0] == recipe.vocab["ROI2"]).nonzero()) == 316
    assert positions[0, 316] == 0
    assert positions.max() < 1089
    assert training.image_weight == training.text_weight == 1  # the whole sequence


@pytest.mark.parametrize("attention", ["dense", "dense_pb_relax", "three_region"])
def test_the_large_picture_depends_on_the_small_one(attention):
    torch.manual_seed(0)
    recipe = recipe_of(attention)
    model = recipe.model().eval()
    draws = [[torch.Generator().manual_seed(n) for n in range(2)] for _ in range(2)]
    one = recipe.batch(TEXT, SMALL, LARGE, draws=draws[0])
    other = recipe.batch(TEXT, (SMALL + 1) % 20, LARGE, draws=draws[1])
    changed = (model(one.inputs, one.context) - model(other.inputs, other.context)).abs().amax(-1)
    first = int((one.inputs[0] == recipe.vocab["BOI1"]).nonzero()) + 1
    assert changed[0, :first].max() == 0
    last = int((one.inputs[0] == recipe.vocab["BOI2"]).nonzero()) + 16
    assert changed[0, first : last + 1].min() > 0
    if attention == "three_region":
        always = (~recipe.is_large(one.inputs)[0]).nonzero().flatten()[: recipe.config.always_pivots]
        for pivots in one.context.attention["pivots"][0]:
            assert set(always.tolist()) - {int(p) for p in (one.inputs[0] == recipe.vocab["PAD"]).nonzero()} <= set(
                pivots.tolist()
            )


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="image_grid: expected a multiple of 4, for windows to lie on the picture's grid, got 5"
    ):
        recipe_of(image_grid=5, max_positions=38)
    with pytest.raises(ValueError, match="restart: expected on or behind, got 'before'"):
        recipe_of(restart="before")
    with pytest.raises(ValueError, match=r"num_pivots: expected at least all that always are pivots \(21\), got 20"):
        recipe_of("three_region", num_pivots=20)
    recipe = recipe_of()
    with pytest.raises(ValueError, match="codes: expected 4 and 16 of each image, got 16"):
        recipe.batch(TEXT, LARGE)
    with pytest.raises(ValueError, match="text: expected at most 9 tokens beside 20 image tokens in 38, got 10"):
        recipe.batch(torch.zeros(2, 10, dtype=torch.int64), SMALL, LARGE)
    model, tokens = recipe.model(), torch.zeros(1, 38, dtype=torch.int64)
    with pytest.raises(ValueError, match="inputs: expected at most 37 tokens, got 38"):
        model(tokens, recipe.context(tokens))
    with pytest.raises(ValueError, match="recipe: expected one that draws behind text alone, got superresolution"):
        recipe.prompt(TEXT)


def test_it_begins_with_a_model_that_draws():
    """Of the same sizes and attention, with pivots for the small picture, too."""
    base = CogViewConfig(**SIZES | {"attention": "three_region", "num_pivots": 14})
    begun = SuperResolution.begun(base)
    assert dataclasses.asdict(begun) == dataclasses.asdict(base) | {"num_pivots": 25, "restart": "on"}
    assert SuperResolution.fit(begun, image_grid=8, max_text=9, image_vocab=20, text_vocab=10).max_positions == 77
