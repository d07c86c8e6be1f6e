"""What holds for every operator alike: autocast, checkpointing, torch.func, and derivatives that do not exist."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import ALL, DECODE, DIFFERENTIABLE
from common import (
    Case,
    Inputs,
    assert_bitwise,
    device_of,
    each,
    results,
    run,
    skip_slow,
    skip_uncomputable,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@each(ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(impl: str, case: Case, dtype: torch.dtype) -> None:
    """Attention of any mix of dtypes is computed in the user's, as if cast by hand, but for a bias table; gradients
    come back in the inputs' own; float64 stays. Softmax and the step keep their inputs' dtype; a norm alone and a
    product give the user's."""
    skip_uncomputable(dtype, impl)
    skip_slow(impl, unless=case.differentiable)
    inputs = case.inputs(torch.float32, device_of(impl))
    cast = {k: x if k in case.wide else x.to(dtype) for k, x in inputs.items()}
    with torch.autocast(device_of(impl), dtype):
        assert case({k: x.double() for k, x in inputs.items()}, impl)[0].dtype == torch.float64
        if case.of_rows:
            assert case(inputs, impl)[0].dtype == (
                torch.float32 if "sandwich" in case.op or "softmax" in case.op else dtype
            )
            if case.differentiable:
                assert all(x.dtype == torch.float32 for x in run(case, inputs, impl)[1].values())
            return
    expected = results(case, cast, impl)
    names = list(inputs)
    for wide in (names, names[::2], names[1:2]):
        given = {name: inputs[name] if name in wide else x for name, x in cast.items()}
        if wide != names:
            with pytest.raises(TypeError, match="dtype"):
                case(given, impl)
        with torch.autocast(device_of(impl), dtype):
            mine = results(case, given, impl)
        assert_bitwise([x.to(y.dtype) for x, y in zip(mine, expected, strict=True)], expected)
        if case.differentiable:
            grads = dict(zip(given, mine[-len(given) :], strict=True))
            assert all(grads[name].dtype == x.dtype for name, x in given.items())


@each(DIFFERENTIABLE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(impl: str, case: Case, reentrant: bool) -> None:
    skip_slow(impl)
    inputs = case.inputs(torch.float32, device_of(impl))
    names = list(inputs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case(dict(zip(names, tensors, strict=True)), impl)

    grads = []
    for wrap in (call, lambda *x: checkpoint(call, *x, use_reentrant=reentrant)):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        torch.autograd.backward([out.square().sum() for out in wrap(*leaves)])
        grads.append([x.grad for x in leaves if x.grad is not None])
    assert_bitwise(*grads)


@each(ALL)
def test_vmap_is_a_loop(impl: str, case: Case) -> None:
    skip_slow(impl)
    inputs = case.inputs(torch.float32, device_of(impl))
    stacked = {k: torch.stack([x, x.flip(0), 2 * x]) for k, x in inputs.items()}
    outputs = torch.vmap(lambda x: case(x, impl))(stacked)
    loop = [case({k: x[n] for k, x in stacked.items()}, impl) for n in range(3)]
    assert_bitwise(list(outputs), [torch.stack(parts) for parts in zip(*loop, strict=True)])


@each(ALL)
def test_vmap_over_nothing(impl: str, case: Case) -> None:
    """The shapes of a loop that has no steps, and zero gradients."""
    inputs = case.inputs(torch.float32, device_of(impl))
    shared = next(iter(inputs)) if len(inputs) > 1 else ""  # without the dimension, so it gets a gradient
    stacked = {k: x if k == shared else x.new_empty(*x.shape[:1], 0, *x.shape[1:]) for k, x in inputs.items()}
    differentiated = stacked[shared or next(iter(inputs))].requires_grad_(case.differentiable)
    dims = {k: None if k == shared else 1 for k in inputs}
    outputs = torch.vmap(lambda x: case(x, impl), (dims,))(stacked)
    assert [(x.shape, x.dtype) for x in outputs] == [((0, *x.shape), x.dtype) for x in case(inputs, impl)]
    if case.differentiable:
        (grad,) = torch.autograd.grad(outputs[0].sum(), differentiated)
        assert not grad.any()


def loss_of(case: Case, impl: str) -> Any:
    return lambda inputs: sum(x.square().sum() for x in case(inputs, impl) if x.is_floating_point())


@each(DIFFERENTIABLE)
def test_func_grad(impl: str, case: Case) -> None:
    """torch.func's gradients are autograd's, also of each sample, and of a mean over samples."""
    skip_slow(impl, unless=case.label == "tiny_local")
    loss = loss_of(case, impl)
    inputs = case.inputs(torch.float32, device_of(impl))
    stacked = {k: torch.stack([x, x.flip(0)]) for k, x in inputs.items()}

    def expected(inputs: Inputs) -> Inputs:
        leaves = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))

    mine = torch.func.grad(loss)(inputs)
    assert_bitwise(list(mine.values()), list(expected(inputs).values()))
    loop = [expected({k: x[n] for k, x in stacked.items()}) for n in range(2)]
    whole = [torch.stack([grads[k] for grads in loop]) for k in inputs]
    assert_bitwise(list(torch.vmap(torch.func.grad(loss))(stacked).values()), whole)
    assert_bitwise(list(torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(stacked).values()), whole)
    leaves = {k: x.clone().requires_grad_() for k, x in stacked.items()}
    outside = torch.autograd.grad(torch.vmap(loss)(leaves).sum(), list(leaves.values()))
    assert_bitwise(list(outside), whole)


# --- derivatives that do not exist -----------------------------------------------------------------------------------


@each(DIFFERENTIABLE)
def test_second_derivative_raises(impl: str, case: Case) -> None:
    """Silently wrong would be worse; the reference has it."""
    for name, expected in (
        (impl, pytest.raises(NotImplementedError, match="impl='reference' can")),
        ("reference", nullcontext()),
    ):
        leaves = [x.requires_grad_() for x in case.inputs(torch.float64, device_of(impl)).values()]
        outputs = case(dict(zip(case.shapes, leaves, strict=True)), name)
        (grad,) = torch.autograd.grad([out.square().sum() for out in outputs], leaves[0], create_graph=True)
        with expected:
            second = torch.autograd.grad(grad.square().sum(), leaves[0])[0]
            assert second.abs().max() > 0


@each(ALL)
def test_forward_mode_raises(impl: str, case: Case) -> None:
    inputs = case.inputs(torch.float64, device_of(impl))
    for name in inputs:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
            with pytest.raises(NotImplementedError, match=f"{case.op} has no forward-mode derivative"):
                case({**inputs, name: dual}, impl)
            outputs = case({**inputs, name: dual}, "reference")
            assert any(torch.autograd.forward_ad.unpack_dual(out).tangent is not None for out in outputs)
    with pytest.raises(NotImplementedError, match=f"{case.op}.* has no forward-mode derivative"):
        torch.func.jvp(lambda x: case({**inputs, name: x}, impl)[0], (inputs[name],), (inputs[name],))


@each(DIFFERENTIABLE)
def test_second_derivative_of_func_raises(impl: str, case: Case) -> None:
    skip_slow(impl, unless=case.label == "tiny_local")
    inputs = case.inputs(torch.float64, device_of(impl))

    def grad_size(inputs: Inputs) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(loss_of(case, impl))(inputs).values())  # type: ignore

    with pytest.raises(NotImplementedError, match="impl='reference' can"):
        torch.func.grad(grad_size)(inputs)


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.label)
def test_decode_cannot_be_differentiated_by_func(case: Case) -> None:
    with pytest.raises(NotImplementedError, match=f"{case.op} cannot be differentiated; impl='reference' can"):
        torch.func.grad(loss_of(case, "cpp"))(case.inputs(torch.float32))


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.label)
def test_decode_cannot_be_differentiated(case: Case) -> None:
    inputs = {k: x.requires_grad_() for k, x in case.inputs(torch.float32).items()}
    with pytest.raises(NotImplementedError, match=f"{case.op} cannot be differentiated"):
        case(inputs, "cpp")[0].sum().backward()
