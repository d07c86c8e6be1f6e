"""Floating-point operations, as torch counts them."""

import pytest
import torch
from cases import DECODE, LOCAL_2D, OTHERS, PRODUCTS, THREE_REGION
from common import (
    Case,
    python,
    run,
)
from torch.utils.flop_counter import FlopCounterMode


def counted(case: Case, impl: str, differentiate: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        if differentiate:
            run(case, case.inputs(torch.float32), impl)
        else:
            case(case.inputs(torch.float32), impl)
    return counter.get_total_flops()


def pairs(case: Case) -> int:
    """Of query and key, seen, of all samples and heads: the weights that equal values on one-hot keys show."""
    inputs = {k: torch.zeros_like(x) for k, x in case.inputs(torch.float64).items()}
    keys = [k for k in inputs if k.endswith("value") or k == "value_cache"]
    total = sum(inputs[k].shape[2] for k in keys)
    begin = 0
    for k in keys:
        batch, heads, tokens, _ = inputs[k].shape
        inputs[k] = torch.eye(total, dtype=torch.float64)[begin : begin + tokens].expand(batch, heads, -1, -1)
        begin += tokens
    for k in inputs:
        if k not in keys and k != "bias":
            inputs[k] = inputs[k].new_zeros(*inputs[k].shape[:-1], total)
    return int((case(inputs, "reference")[0] > 0).sum())


@pytest.mark.parametrize("case", [*THREE_REGION, *LOCAL_2D], ids=lambda case: case.label)
def test_flops(case: Case) -> None:
    """Of every pair that the pattern shows two products forward and five backward; more where masks hide some."""
    dim, seen = case.shapes["query"][-1], pairs(case)
    forward, both = (counted(case, "cpp", differentiate) for differentiate in (False, True))
    assert both == forward + forward * 5 // 2
    pivots = case.options.get("pivots", torch.empty(0, 0))
    hidden = any(case.options.get(name) is not None for name in ("prefix_mask", "key_mask"))
    first = (pivots == torch.arange(pivots.shape[1])).all()
    if hidden or not first:
        assert forward >= 4 * dim * seen
    else:
        assert forward == 4 * dim * seen


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.label)
def test_flops_of_decodes(case: Case) -> None:
    counted_flops, dim = counted(case, "cpp", False), case.shapes["query"][-1]
    batch, heads, tokens, _ = case.shapes["query"]
    assert 4 * dim * pairs(case) <= counted_flops <= 4 * dim * batch * heads * tokens * 75


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.label)
def test_flops_of_products(case: Case) -> None:
    rows = torch.Size(case.shapes["x"][:-1]).numel()
    assert counted(case, "cpp", False) == 2 * rows * 21 * case.shapes["x"][-1]


def test_flops_of_norms_are_not_counted_as_torch_does() -> None:
    for case in OTHERS:
        assert counted(case, "cpp", True) == 0


@pytest.mark.parametrize("first", ["cogview_ops", "torch.utils.flop_counter"])
def test_flops_whatever_is_imported_first(first: str) -> None:
    """Without importing Triton, which the counter does."""
    code = f"""
import sys, torch, {first}
if {first!r} == "cogview_ops": assert "triton" not in sys.modules
import cogview_ops, torch.utils.flop_counter
x = torch.randn(1, 1, 4, 8)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    cogview_ops.local_attention_2d(x, x, x, grid=(2, 2), kernel_size=(3, 3))
assert counter.get_total_flops() == 4 * 16 * 8, counter.get_total_flops()
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
