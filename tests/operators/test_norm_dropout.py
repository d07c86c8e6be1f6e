"""Dropout in sandwich_layer_norm: the mask of every implementation, and its seeds, in graphs too."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from common import DTYPES, device_of, each_impl, every_isa, skip_slow
from test_sandwich_layer_norm import DROPOUT, sandwich
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from cogview_ops import reference, sandwich_layer_norm


def kept(impl: str, rows: int, width: int, p: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask, read from the output: of a row of ones, LN keeps what is kept above what is not."""
    branch = torch.ones(rows, width, dtype=dtype, device=device_of(impl))
    weight, bias = torch.ones_like(branch[0]), torch.zeros_like(branch[0])
    out, _ = sandwich_layer_norm(
        branch, branch * 0, weight, bias, weight, bias, relax=None, dropout_p=p, seed=seed, impl=impl
    )
    return out > 0


@every_isa
@pytest.mark.parametrize("width", [2, 3, 31, 32, 67, 256])
def test_mask_of_every_instruction_set(isa: str, width: int) -> None:
    """Bit for bit the reference's mask; a row that lost all or nothing does not show it."""
    for dtype, seed in itertools.product(DTYPES, (0, 12345, 2**63 - 1)):
        truth = reference.dropout_mask((50, width), 0.4, seed, torch.device("cpu"))
        mixed = truth.any(-1) & ~truth.all(-1)
        assert torch.equal(kept("cpp", 50, width, 0.4, seed, dtype)[mixed], truth[mixed])


@each_impl("sandwich_layer_norm")
def test_mask_statistics(impl: str) -> None:
    """Frequency, and independence of neighbours, rows and seeds, within five standard deviations."""
    skip_slow(impl)
    for p in (0.1, 0.5, 0.9):
        a, b = kept(impl, 512, 512, p, 1).double() - (1 - p), kept(impl, 512, 512, p, 2).double() - (1 - p)
        variance, bound = p * (1 - p), 5 / 512
        assert abs(a.mean()) < bound * variance**0.5
        for other, some in ((a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a[:, 4:], a[:, :-4]), (a, b)):
            assert abs((other * some).mean()) < 1.1 * bound * variance


def test_philox_known_answers() -> None:
    """Vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    words = reference._philox4x32(torch.tensor([0]), 0)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@each_impl("sandwich_layer_norm")
def test_drop_all(impl: str) -> None:
    inputs = sandwich(40, "row").inputs(torch.float32, device_of(impl))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    h, _ = sandwich_layer_norm(**leaves, dropout_p=1.0, seed=0, impl=impl)
    torch.testing.assert_close(h, inputs["residual"] + inputs["post_bias"])
    h.sum().backward()
    grad = leaves["branch"].grad
    assert grad is not None
    assert not grad.any()


def test_new_seeds_do_not_recompile() -> None:
    case = sandwich(20, "row")
    inputs = case.inputs(torch.float32)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(seed: int) -> Tensor:
        return sandwich_layer_norm(**inputs, dropout_p=0.5, seed=seed)[0]

    step(11)
    step(2**40)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (3, 2**62):
            assert torch.equal(step(seed), sandwich_layer_norm(**inputs, dropout_p=0.5, seed=seed)[0])


@each_impl("sandwich_layer_norm")
def test_a_tensor_is_a_seed(impl: str) -> None:
    """The same mask as the number's, in the backward too, and another one when it has changed in place."""
    inputs = {name: x.requires_grad_() for name, x in DROPOUT.inputs(torch.float32, device_of(impl)).items()}
    seed = torch.tensor(2**62 + 5, device=device_of(impl))

    def gradients(seed: Tensor | int) -> tuple[Tensor, ...]:
        h, x = sandwich_layer_norm(**inputs, dropout_p=0.5, seed=seed, impl=impl)
        return h, x, *torch.autograd.grad(h.sum() + x.square().sum(), inputs["branch"])

    by_number, by_tensor = gradients(2**62 + 5), gradients(seed)
    assert all(map(torch.equal, by_number, by_tensor))
    seed += 1
    assert all(map(torch.equal, gradients(2**62 + 6), gradients(seed)))
    assert not torch.equal(by_tensor[0], gradients(seed)[0])


def test_numbers_of_64_bits_stay_out_of_generated_kernels() -> None:
    """Inductor's have 32 for a number that changes."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    inputs, seed = sandwich(20, "row").inputs(torch.float32), 2**62
    torch._dynamo.reset()
    step = torch.compile(
        partial(sandwich_layer_norm, **inputs, dropout_p=0.5), dynamic=True, backend=aot_autograd(fw_compiler=keep)
    )
    assert torch.equal(step(seed=seed)[0], sandwich_layer_norm(**inputs, dropout_p=0.5, seed=seed)[0])
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.cogview_ops.seed_on.default in called
    assert torch.ops.aten.full.default not in called


def test_compiled_seeds_are_read_at_run_time() -> None:
    """Of a graph that was compiled once."""
    inputs, seed = sandwich(20, "row").inputs(torch.float32), torch.tensor(3)
    torch._dynamo.reset()
    step = torch.compile(partial(sandwich_layer_norm, **inputs, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    for number in (3, 2**62):
        seed.fill_(number)
        assert torch.equal(step(seed=seed)[0], sandwich_layer_norm(**inputs, dropout_p=0.5, seed=number)[0])
