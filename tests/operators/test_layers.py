"""Layers in the place of the modules that they are for: the same results, and no state, as `kernels` asks of layers."""

import inspect
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cogview_ops import layers

DTYPES = [torch.float32, torch.bfloat16]


class Llama(nn.Module):
    """RMSNorm as models write it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(dim)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normalised(x).to(x.dtype)

    def normalised(self, x: Tensor) -> Tensor:
        y = x.float()
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Olmo2(Llama):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.normalised(x)).to(x.dtype)


class Gemma(Llama):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.eps = self.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return ((1 + self.weight.float()) * self.normalised(x)).to(x.dtype)


def layer_norm(dim: int) -> nn.Module:
    module = nn.LayerNorm(dim, eps=1e-3)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


MODULES: dict[str, Any] = {
    "LlamaRMSNorm": Llama,
    "Olmo2RMSNorm": Olmo2,
    "GemmaRMSNorm": Gemma,
    "LayerNorm": layer_norm,
    "plain LayerNorm": lambda dim: nn.LayerNorm(dim, elementwise_affine=False),
}


def replaced(module: nn.Module, name: str) -> Any:
    """The module's forward with a layer's in its place, as `kernelize` binds it."""
    return MethodType(getattr(layers, name.removeprefix("plain ")).forward, module)


def results(module: nn.Module, forward: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = forward(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_a_layer_gives_what_its_module_gives(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    module = MODULES[name](96).to(dtype)
    x, grad = torch.randn(2, 5, 7, 96, dtype=dtype).unbind()
    ours, theirs = (results(module, f, x, grad) for f in (replaced(module, name), module.forward))
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, atol=2e-5 if dtype == torch.float32 else 0.13, rtol=2e-2)
    if dtype == torch.bfloat16 and name != "LayerNorm":  # they round at the same places: few results differ, by one bit
        assert (ours[0] != theirs[0]).float().mean() < 0.02


def test_their_roundings_and_weights_differ() -> None:
    """So that a test of one with another's formula would fail."""
    torch.manual_seed(1)
    module = Gemma(96).bfloat16()
    x = torch.randn(5, 7, 96, dtype=torch.bfloat16)
    llama, olmo, gemma = (replaced(module, name)(x) for name in ("LlamaRMSNorm", "Olmo2RMSNorm", "GemmaRMSNorm"))
    assert 0.1 < (llama != olmo).float().mean() < 0.9
    assert (gemma != olmo).float().mean() > 0.9


@pytest.mark.parametrize("name", layers.__all__)
def test_a_layer_has_no_state(name: str) -> None:
    layer = getattr(layers, name)
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members <= {"can_torch_compile", "has_backward"}
    assert {name for name in vars(layer) if not name.startswith("__")} == {"forward", "can_torch_compile"}
    assert list(layer.__annotations__)  # what the adopting module must have


@pytest.mark.parametrize("name", MODULES)
def test_a_layer_compiles_without_a_break(name: str) -> None:
    module = MODULES[name](32)
    module.forward = replaced(module, name)
    x, grad = torch.randn(2, 3, 32).unbind()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mine, yours in zip(results(module, compiled, x, grad), results(module, module.forward, x, grad), strict=True):
        torch.testing.assert_close(mine, yours)


def test_two_dimensions_are_refused() -> None:
    module = nn.LayerNorm((3, 8), elementwise_affine=False)
    with pytest.raises(ValueError, match=r"normalized_shape: expected one dimension, got \(3, 8\)"):
        replaced(module, "LayerNorm")(torch.randn(2, 3, 8))
