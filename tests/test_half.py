"""Products of float16, on CPUs that multiply it and on others."""

import pytest
import torch
import torch.nn.functional as F

from cogview import half
from cogview.loss import token_nll, weighted_nll
from cogview.parts import linear


@pytest.mark.parametrize("bias", [torch.float16, torch.float32])
@pytest.mark.parametrize("native", [False, True])
def test_float16_projections_are_rounded_once(monkeypatch, native, bias):
    """Forward and gradients, on CPUs that multiply float16 and others, beside a bias that may be float32."""
    monkeypatch.setattr(half, "multiplies_float16", lambda: native)
    torch.manual_seed(0)
    layer, x = linear.Linear(48, 24).half(), torch.randn(3, 5, 48).half().requires_grad_()
    layer.bias.data = layer.bias.data.to(bias)
    found = layer(x)
    grad = torch.randn_like(found)
    found.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = F.linear(*exact)
    expected.backward(grad.double())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1e-3 if native else 5e-4, atol=1e-3 if native else 1e-6)
    for ours, theirs in zip((x, layer.weight, layer.bias), exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=2e-3 if native else 1e-5)


def test_float16_losses_are_the_same_whichever_way_they_are_multiplied(monkeypatch):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 9, 48).half(), (0.3 * torch.randn(60, 48)).half()
    labels, weights, found = torch.randint(60, (2, 9)), torch.rand(2, 9), []
    for native in (False, True):
        monkeypatch.setattr(half, "multiplies_float16", lambda native=native: native)
        leaves = [t.clone().requires_grad_() for t in (hidden, head)]
        total, nll = weighted_nll(*leaves, labels, weights)
        total.backward()
        found.append([nll, token_nll(*leaves, labels).detach(), *(t.grad.float() for t in leaves)])
    exact = F.cross_entropy((hidden.double() @ head.double().T).flatten(0, 1), labels.flatten(), reduction="none")
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found[0][0].double(), exact.view(2, 9), rtol=2e-3, atol=2e-3)
