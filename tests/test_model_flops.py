"""Floating-point operations by formula are those that torch counts of a real step."""

from typing import Any

import pytest
import torch
from test_toy_recipe import CONFIG as PICTURE
from test_toy_recipe import Picture
from test_transformer import SIZES, recipe_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cogview.flops import forward_flops, model_flops
from cogview.recipes.caption import Caption, CaptionConfig
from cogview.recipes.cogview import CogView
from cogview.recipes.recipe import Recipe
from cogview.recipes.superresolution import SuperResolution, SuperResolutionConfig

# torch has no formulas for the CPU's kernels of SDPA: those that it has for a GPU's
SDPA: Any = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
PIVOTS: dict[str, Any] = {"attention": "three_region", "block_size": 4, "window_blocks": 2, "num_pivots": 21}
RECIPES: dict[str, Recipe] = {
    **{name: recipe_of(name, num_layers=3) for name in ("dense", "dense_pb_relax", "three_region", "dalle")},
    "caption": Caption(CaptionConfig(**SIZES | PIVOTS)),
    "superresolution": SuperResolution(SuperResolutionConfig(**SIZES | PIVOTS)),
}


def counted(recipe: Recipe, batch: int = 2) -> int:
    """By torch, of one sample."""
    c, model = recipe.config, recipe.model()
    text, codes = torch.randint(c.text_vocab, (batch, c.max_text)), [(batch, grid**2) for grid in recipe.grids]
    inputs = recipe.batch(text, *(torch.randint(c.image_vocab, size) for size in codes))
    with FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
        model(inputs.inputs, inputs.context, targets=inputs.targets).sum().backward()
    return counter.get_total_flops() // batch


def products(recipe: Recipe) -> int:
    """Operations of one product over all pairs, of all layers: what torch counts for causal attention too."""
    return 2 * recipe.config.hidden_size * recipe.length**2 * recipe.config.num_layers


@pytest.mark.parametrize("name", ["three_region", "dalle", "caption", "superresolution"])
def test_equals_what_torch_counts(name):
    assert model_flops(RECIPES[name]) == counted(RECIPES[name])


@pytest.mark.parametrize(("name", "times"), [("dense", 7), ("dense_pb_relax", 6)])
def test_but_for_the_pairs_of_dense_attention(name, times):
    """Torch counts masked pairs too, and of weights that are kept only four products backwards."""
    recipe = RECIPES[name]
    ours = forward_flops(recipe)
    assert ours.attention == 2 * products(recipe) * (recipe.length + 1) // (2 * recipe.length)
    assert ours.total - ours.attention * 7 // 2 == counted(recipe) - times * products(recipe)


def test_three_region_needs_less_than_dense():
    assert forward_flops(RECIPES["three_region"]).attention < forward_flops(RECIPES["dense"]).attention


def test_a_recipe_of_ones_own_counts_as_causal():
    recipe = Picture(PICTURE)
    assert forward_flops(recipe).attention == 2 * 2 * 32 * 2 * (19 * 20 // 2)


def test_published_size_is_near_six_times_parameters_times_tokens():
    """Kaplan et al., arXiv 2001.08361: 6 N D without attention; attention over 1,088 tokens adds a few percent."""
    recipe = CogView(CogView.presets["cogview-4b"][0])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in recipe.model().parameters())
    assert 1.0 < model_flops(recipe) / (6 * parameters * recipe.length) < 1.06
