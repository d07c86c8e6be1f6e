"""The nn.Module front ends: parameters, options and modes reach the operators."""

import pytest
import torch
from torch import nn

from cogview_ops import layer_norm, pb_relax_softmax, sandwich_layer_norm
from cogview_ops.modules import PBRelaxLayerNorm, PBRelaxSoftmax, SandwichLayerNorm


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_softmax() -> None:
    scores, mask = torch.randn(2, 5, 7), torch.rand(5, 7) > 0.5
    module = PBRelaxSoftmax(3.0, causal=True)
    assert torch.equal(module(scores), pb_relax_softmax(scores, alpha=3.0, causal=True))
    assert torch.equal(module(scores, mask), pb_relax_softmax(scores, alpha=3.0, causal=True, mask=mask))
    assert repr(module) == "PBRelaxSoftmax(alpha=3.0, causal=True)"


@pytest.mark.parametrize("relax", ["row", "tensor", None])
def test_layer_norm(relax: str | None) -> None:
    x = torch.randn(4, 20, dtype=torch.float64)
    module = randomised(PBRelaxLayerNorm(20, 0.1, relax=relax, dtype=torch.float64))
    assert torch.equal(module(x), layer_norm(x, module.weight, module.bias, eps=0.1, relax=relax))
    plain = nn.LayerNorm(20, 0.1, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    assert torch.allclose(plain(x), module(x)) == (relax is None)
    assert repr(module).endswith(f", relax={relax!r})")


def test_sandwich() -> None:
    branch, residual = torch.randn(2, 4, 20)
    module = randomised(SandwichLayerNorm(20, 0.1, relax="tensor", dropout_p=0.5))
    weights = (module.post.weight, module.post.bias, module.pre.weight, module.pre.bias)
    options = {"eps": 0.1, "relax": "tensor"}
    expected = sandwich_layer_norm(branch, residual, *weights, **options, dropout_p=0.5, seed=3)
    assert all(map(torch.equal, module(branch, residual, seed=3), expected))
    expected = sandwich_layer_norm(branch, residual, *weights, **options)
    assert all(map(torch.equal, module.eval()(branch, residual), expected))
    assert sorted(module.state_dict()) == ["post.bias", "post.weight", "pre.bias", "pre.weight"]


def test_sandwich_draws_a_seed() -> None:
    """A new mask each time, repeated by torch.manual_seed and so by activation checkpointing."""
    branch, residual = torch.randn(2, 4, 20)
    module = SandwichLayerNorm(20, dropout_p=0.5)
    torch.manual_seed(0)
    a, b = module(branch, residual)[0], module(branch, residual)[0]
    torch.manual_seed(0)
    assert torch.equal(a, module(branch, residual)[0])
    assert not torch.equal(a, b)
