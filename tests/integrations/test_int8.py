"""Drawing with 8-bit weights, by torchao."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_transformer import make

from cogview.generate import generate
from cogview.parts import linear
from cogview.parts.quantized import int8_weights
from cogview_ops import linear_decode

pytest.importorskip("torchao")


def test_logits_are_near_and_weights_a_quarter(monkeypatch):
    recipe, model = make("dense", num_layers=2)
    model.eval().requires_grad_(False)
    small = copy.deepcopy(model)
    int8_weights(small)
    text, codes = torch.randint(10, (3, 5)), torch.randint(20, (3, 16))
    batch = recipe.batch(text, codes)
    wanted, got = (m(batch.inputs, batch.context) for m in (model, small))
    assert 0 < (got - wanted).std() < 0.05 * wanted.std()
    for name, weight in small.stack.named_parameters():
        if weight.ndim == 2:
            assert weight.qdata.dtype == torch.int8, name
    layer, x = small.stack.layers[0].mlp.dense_h_to_4h, torch.randn(40, 32)
    seen: list[int] = []
    monkeypatch.setattr(
        linear, "linear_decode", lambda x, *rest, **how: seen.append(len(x)) or linear_decode(x, *rest, **how)
    )
    with torch.no_grad():
        assert torch.allclose(layer(x[:3]), layer(x)[:3], atol=1e-5)  # by the operator of few rows, and by torchao
    assert seen == [3]
    monkeypatch.undo()
    assert generate(recipe, small, [[1, 2], []]).shape == (2, 4, 4)
    small.compile_step()
    assert torch.equal(generate(recipe, small, [[1], [2]], top_k=1), generate(recipe, small, [[1], [2]], top_k=1))
