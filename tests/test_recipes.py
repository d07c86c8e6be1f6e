"""Presets, their sizes, and what a config refuses."""

import dataclasses

import pytest
import torch

from cogview.config import TrainConfig
from cogview.parts.published import published_names
from cogview.recipes import RECIPES, named, preset
from cogview.recipes.cogview import CogView
from cogview.recipes.dalle import Dalle

PRESETS = {name: config for name, (config, _) in CogView.presets.items()}


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in CogView(PRESETS[name]).model().parameters())


def test_parameter_counts():
    assert parameters("cogview-4b") == 3_928_849_920
    assert round(parameters("cogview-large") / 1e9, 1) == 8.3
    assert abs(parameters("fashion-3b") / 3e9 - 1) < 0.03


def test_published_shapes():
    c = PRESETS["cogview-4b"]
    assert (c.max_text, c.image_tokens, c.head_dim) == (61, 1024, 64)
    with torch.device("meta"):
        names = published_names(c.num_layers)
        shapes = {names[name]: list(p.shape) for name, p in CogView(c).model().named_parameters()}
        sparse = CogView(dataclasses.replace(c, attention="three_region")).attention(0)
    assert sparse.pattern["pivot_bias"] == 0.0
    layer = "transformer.layers.47."
    assert shapes["word_embeddings.weight"] == [58240, 2560]
    assert shapes["transformer.position_embeddings.weight"] == [1089, 2560]
    assert shapes[layer + "attention.query_key_value.weight"] == [7680, 2560]
    assert shapes[layer + "mlp.dense_h_to_4h.bias"] == [10240]
    for norm in ("input", "post_attention", "third", "fourth"):
        assert shapes[f"{layer}{norm}_layernorm.weight"] == [2560]
    assert len(shapes) == 48 * 16 + 4
    assert PRESETS["fashion-3b"].image_tokens == 2500


def test_every_recipe_has_presets():
    of_cogview = ["cogview", "dalle", "caption", "superresolution", "style"]
    assert list(RECIPES) == [*of_cogview, "coglm", "direct", "iterative"]
    for recipe in RECIPES.values():
        assert all(isinstance(shape, recipe.Config) for shape, _ in recipe.presets.values())
    assert preset("tiny") == CogView.presets["tiny"]
    assert preset("tiny", "dalle")[0].image_grid == 8
    assert named("dalle") is Dalle
    with pytest.raises(ValueError, match=r"preset: expected one of tiny, cogview-4b, .*, got 'huge'"):
        preset("huge")
    with pytest.raises(
        ValueError, match=r"recipe: expected one of cogview, dalle, caption, .*, iterative, got 'imagen'"
    ):
        preset("tiny", "imagen")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"hidden_size: expected a multiple of num_heads \(3\), got 256"),
        ({"num_layers": 0}, "num_layers: expected at least 1, got 0"),
        ({"max_positions": 68}, "max_positions: expected at least 69 for 64 image tokens, got 68"),
        ({"attention": "sparse"}, "attention: expected one of .*, got 'sparse'"),
        ({"num_pivots": 32}, r"num_pivots: expected at least all that always are pivots \(33\), got 32"),
        ({"relax": "head"}, "relax: expected row, tensor or None, got 'head'"),
        ({"image_positions": "random"}, "image_positions: expected following or fixed, got 'random'"),
        ({"init_std": 0.0}, "init_std: expected a positive and finite number, got 0.0"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"embedding_grad_scale": 2}, r"embedding_grad_scale: expected a number in \[0, 1\], got 2"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


def test_padding_would_count_in_dalle():
    with pytest.raises(ValueError, match="relax: expected row or None, since padding would count, got 'tensor'"):
        dataclasses.replace(preset("tiny", "dalle")[0], relax="tensor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "steps, seconds: expected at least one of them"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"seconds": float("nan")}, "seconds: expected a positive and finite number"),
        ({"steps": 1, "accumulate": 3}, r"accumulate: expected a divisor of batch_size \(32\), got 3"),
        ({"steps": 1, "scale_patience": 0}, "scale_patience: expected at least 1, got 0"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate: expected a positive and finite number"),
        (
            {"steps": 1, "text_weight": 0.0, "image_weight": 0.0},
            "text_weight, image_weight: expected one that is not 0",
        ),
        ({"steps": 1, "dtype": "float64"}, "dtype: expected one of .*, got 'float64'"),
    ],
)
def test_bad_training_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)
