"""Presets, their sizes, and what a config refuses."""

import dataclasses

import pytest
import torch

from cogview.config import PRESETS, TRAINING, TrainConfig, preset
from cogview.model import GPT


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(PRESETS[name]).parameters())


def test_parameter_counts():
    assert parameters("cogview-4b") == 3_928_849_920
    assert round(parameters("cogview-large") / 1e9, 1) == 8.3
    assert abs(parameters("fashion-3b") / 3e9 - 1) < 0.03


def test_published_shapes():
    c = PRESETS["cogview-4b"]
    assert (c.max_text, c.image_tokens, c.head_dim, c.pivot_bias) == (61, 1024, 64, 0.0)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in GPT(c).named_parameters()}
    layer = "transformer.layers.47."
    assert shapes["word_embeddings.weight"] == [58240, 2560]
    assert shapes["transformer.position_embeddings.weight"] == [1089, 2560]
    assert shapes[layer + "attention.query_key_value.weight"] == [7680, 2560]
    assert shapes[layer + "mlp.dense_h_to_4h.bias"] == [10240]
    for norm in ("input", "post_attention", "third", "fourth"):
        assert shapes[f"{layer}{norm}_layernorm.weight"] == [2560]
    assert len(shapes) == 48 * 16 + 4
    assert PRESETS["fashion-3b"].image_tokens == 2500


def test_every_preset_has_training_settings():
    assert PRESETS.keys() == TRAINING.keys()
    assert preset("tiny") == (PRESETS["tiny"], TRAINING["tiny"])
    with pytest.raises(ValueError, match="unknown preset 'huge': expected one of tiny, cogview-4b"):
        preset("huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads, got 256 and 3"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"max_positions": 68}, "max_positions must be at least 69 for 64 image tokens, got 68"),
        ({"attention": "sparse"}, "attention must be one of .*, got 'sparse'"),
        ({"num_pivots": 32}, r"num_pivots must hold all text and command tokens \(33\), got 32"),
        ({"relax": "head"}, "relax must be row, tensor or None, got 'head'"),
        ({"attention": "dalle", "relax": "tensor"}, "relax must be row or None with attention dalle"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"embedding_grad_scale": 2}, r"embedding_grad_scale must be in \[0, 1\], got 2"),
    ],
)
def test_bad_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give exactly one of steps and seconds"),
        ({"steps": 1, "seconds": 1.0}, "give exactly one of steps and seconds"),
        ({"seconds": float("nan")}, "seconds must be positive and finite"),
        ({"steps": 1, "accumulate": 3}, "accumulate must divide batch_size, got 3 and 32"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate must be positive"),
        ({"steps": 1, "text_weight": 0.0, "image_weight": 0.0}, "must not both be 0"),
        ({"steps": 1, "dtype": "float64"}, "dtype must be one of .*, got 'float64'"),
    ],
)
def test_bad_training_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)
