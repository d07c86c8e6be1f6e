"""Dropout in sandwich_layer_norm: the mask of every implementation, and its seeds, in graphs too."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from common import DTYPES, assert_same, device_of, each_impl, every_isa, skip_slow
from test_norm_steps import step
from test_sandwich_layer_norm import DROPOUT, sandwich
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from cogview_ops import reference, sandwich_layer_norm, sandwich_rms_norm


def kept(impl: str, shape: tuple[int, ...], p: float, seed: int | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask, read from the output: of a row of ones, LN keeps what is kept above what is not."""
    branch = torch.ones(shape, dtype=dtype, device=device_of(impl))
    weight, bias = branch.new_ones(shape[-1]), branch.new_zeros(shape[-1])
    out, _ = sandwich_layer_norm(
        branch, branch * 0, weight, bias, weight, bias, relax=None, dropout_p=p, seed=seed, impl=impl
    )
    return out > 0


@every_isa
@pytest.mark.parametrize("width", [2, 3, 31, 32, 67, 256])
def test_mask_of_every_instruction_set(isa: str, width: int) -> None:
    """Bit for bit the reference's mask; a row that lost all or nothing does not show it."""
    seeds: list[tuple[tuple[int, ...], int | Tensor]] = [((50, width), seed) for seed in (0, 12345, 2**63 - 1)]
    seeds.append(((3, 17, width), torch.tensor([12345, 2**63 - 1, 0])))
    for dtype, (shape, seed) in itertools.product(DTYPES, seeds):
        truth = reference.dropout_mask(shape, 0.4, seed, torch.device("cpu"))
        mixed = truth.any(-1) & ~truth.all(-1)
        assert torch.equal(kept("cpp", shape, 0.4, seed, dtype)[mixed], truth[mixed])


@each_impl("sandwich_layer_norm")
def test_mask_statistics(impl: str) -> None:
    """Frequency, and independence of neighbours, rows and seeds, within five standard deviations."""
    skip_slow(impl)
    for p in (0.1, 0.5, 0.9):
        a, b = (kept(impl, (512, 512), p, seed).double() - (1 - p) for seed in (1, 2))
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


def test_masks_of_samples_are_stacked() -> None:
    """Each that of its seed alone; of one sample both meanings of a tensor of one are the same."""
    seeds, cpu = torch.tensor([2**40 + 3, 0, 2**63 - 1]), torch.device("cpu")
    masks = [reference.dropout_mask((5, 7), 0.4, seed, cpu) for seed in seeds.tolist()]
    assert torch.equal(reference.dropout_mask((3, 5, 7), 0.4, seeds, cpu), torch.stack(masks))
    for seed in (seeds[0], seeds[:1]):
        assert torch.equal(reference.dropout_mask((1, 5, 7), 0.4, seed, cpu)[0], masks[0])


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("dropout", ["before", "after"])
@pytest.mark.parametrize("norms", ["both", "pre", "post"])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_a_sample_does_not_depend_on_its_batch(impl: str, kind: str, norms: str, dropout: str) -> None:
    """What comes out, and the gradients of what goes in, to the bit: with seeds of samples, of one, and a number."""
    seeds = torch.tensor([[7, 0], [2**62 + 5, 0], [9, 0]], device=device_of(impl))[:, 0]  # in any layout
    for width in (37, 40):
        case = step(kind, width, norms, scale=(2, 3, 1), dropout=dropout)
        case = case._replace(shapes={k: (3, 3, s[2]) if len(s) > 1 else s for k, s in case.shapes.items()})
        inputs = case.inputs(torch.float32, device_of(impl))

        def of(some: slice, seed: Any, case: Any = case, inputs: dict[str, Tensor] = inputs) -> list[Tensor]:
            given = {k: x[some].requires_grad_() if x.dim() > 1 else x for k, x in inputs.items()}
            outputs = case._replace(options=case.options | {"seed": seed})(given, impl)
            leaves = [given[name] for name in ("branch", "residual", "branch_scale")]
            return [*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]

        whole = of(slice(None), seeds)
        for b in range(3):
            some = slice(b, b + 1)
            for seed in (seeds[some], seeds[b], int(seeds[b])):
                assert_same([x[some] for x in whole], of(some, seed), impl)
        assert_same([x[1:] for x in whole], of(slice(1, 3), seeds[1:]), impl)


def test_new_seeds_of_samples_do_not_recompile() -> None:
    """Nor does the backward, which drops the same elements."""
    inputs = {name: x.requires_grad_() for name, x in step("rms_norm", 20, "both").inputs(torch.float32).items()}

    def gradients(op: Any, seeds: Tensor) -> tuple[Tensor, ...]:
        h, x = op(**inputs, dropout_p=0.5, seed=seeds)
        return h, x, *torch.autograd.grad(h.sum() + x.square().sum(), inputs["branch"])

    torch._dynamo.reset()
    compiled = torch.compile(sandwich_rms_norm, fullgraph=True, backend="aot_eager")
    gradients(compiled, torch.tensor([1, 2]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seeds in (torch.tensor([3, 2**62]), torch.tensor([0, 0])):
            assert all(map(torch.equal, gradients(compiled, seeds), gradients(sandwich_rms_norm, seeds)))


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
