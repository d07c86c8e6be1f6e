"""torch.export and AOTInductor: one program of every operator for any batch, length, grid and text."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compile import FUNCTIONS
from torch import Tensor
from torch.utils._pytree import tree_map

import cogview_ops

EVERYTHING = os.environ.get("COGVIEW_TESTS") == "all"


class Call(torch.nn.Module):
    """An operator whose tensors are inputs, and whose sizes are those of inputs, as they are in a model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        first, other = FUNCTIONS[name](0), FUNCTIONS[name](2)
        tensors = {key for key, x in first.items() if isinstance(x, (Tensor, list))}
        self.sizes = {key for key, x in first.items() if key not in tensors | {"seed"} and x != other[key]}
        self.constants = {key: x for key, x in first.items() if key not in tensors | self.sizes}

    def inputs(self, k: int) -> dict[str, Any]:
        """Of size k; for a number an empty tensor of that many rows, for a grid one of its shape."""
        arguments = FUNCTIONS[self.name](k)
        inputs = {key: x for key, x in arguments.items() if key not in self.constants}
        return inputs | {key: torch.empty(arguments[key]) for key in self.sizes}

    def forward(self, inputs: dict[str, Any]) -> Any:
        sizes = {key: tuple(inputs[key].shape) for key in self.sizes}
        return getattr(cogview_ops, self.name)(
            **inputs | {key: x if len(x) > 1 else x[0] for key, x in sizes.items()}, **self.constants
        )


def exported(call: Call) -> torch.export.ExportedProgram:
    """Every size that differs between two calls is dynamic."""
    one, other = call.inputs(0), call.inputs(2)
    dims = tree_map(
        lambda x, y: {i: torch.export.Dim.DYNAMIC for i in range(x.dim()) if x.shape[i] != y.shape[i]}, one, other
    )
    return torch.export.export(call, (one,), dynamic_shapes=(dims,), strict=True)


def same(program: Any, call: Call, k: int) -> None:
    inputs, results = call.inputs(k), []
    for f in (program, call):
        torch.manual_seed(k)
        results.append(f(inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_export(name: str) -> None:
    call = Call(name)
    module = exported(call).module()
    for k in (0, 2, 5):
        same(module, call, k)


@pytest.mark.skipif(not EVERYTHING, reason="compiles two minutes: COGVIEW_TESTS=all")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    call = Call(name)
    with torch.no_grad(), torch._inductor.config.patch(fallback_random=True):  # draws as without compilation
        path = torch._inductor.aoti_compile_and_package(exported(call), package_path=str(tmp_path / "call.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for k in (0, 2, 5):
            same(loaded, call, k)
