"""pb_relax_softmax: truth, masks, causality, extremes, arguments. What all operators share is in test_operators.py."""

import math
from typing import Any

import pytest
import torch
from common import (
    DTYPES,
    Case,
    assert_same,
    assert_true,
    device_of,
    each_impl,
    every_isa,
    gaps,
    interpreted,
    refused,
    run,
    runnable,
    skip_slow,
    skip_uncomputable,
)

from cogview_ops import patterns, pb_relax_softmax

OP = "pb_relax_softmax"


def softmax(label: str, *shape: int, mask: tuple[int, ...] | None = None, **options: Any) -> Case:
    """`mask`: its shape; one element in three is hidden, and the first row of the result sees nothing."""
    if mask is not None:
        visible = torch.rand(mask, generator=torch.Generator().manual_seed(1)) > 1 / 3
        if len(mask) > 1 and mask[-2] > 1:
            visible[(0,) * (len(mask) - 1)] = False
        options["mask"] = visible
    return Case(OP, label, {"scores": shape}, {"alpha": 2.0, **options})


MASKED = [
    softmax("mask", 2, 3, 5, 37, mask=(2, 3, 5, 37)),
    softmax("aligned_mask", 2, 5, 48, mask=(2, 5, 48)),
    softmax("key_mask", 2, 3, 5, 37, mask=(2, 1, 1, 37)),
    softmax("row_mask", 2, 3, 5, 37, mask=(5, 1)),
    softmax("head_mask", 2, 3, 5, 70, mask=(3, 1, 70)),
    softmax("causal", 2, 3, 33, 33, causal=True),
    softmax("causal_wide", 2, 5, 40, causal=True),
    softmax("causal_tall", 2, 40, 5, causal=True),  # the first rows see nothing
    softmax("causal_mask", 2, 3, 8, 23, causal=True, mask=(8, 23)),
]
CASES = [
    *(softmax(f"width_{n}", 3, n) for n in (1, 3, 16, 17, 63, 64, 100, 2560)),
    softmax("long_rows", 2, 5000),
    softmax("vector", 40),
    softmax("large_alpha", 4, 70, alpha=32.0),
    *MASKED,
]
LONGEST = softmax("longest_row", 1, 20512)  # no GPU kernel keeps it in registers


@each_impl(OP, [*CASES, LONGEST])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for case in CASES:
        assert_true(case, dtype, "cpp")


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_many_rows_are_their_parts(isa: str, dtype: torch.dtype, causal: bool) -> None:
    """Results beyond the caches are written around them, in lines that rows of this width begin and end within."""
    scores = torch.randn(6, 900, 901).to(dtype)

    def results(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = scores.detach().requires_grad_()
        out = pb_relax_softmax(scores, causal=causal, impl="cpp")
        return out, *torch.autograd.grad(out, scores, scores.detach())

    whole = results(scores)
    assert whole[0].nbytes > 2**23
    for i, matrix in enumerate(scores):
        for got, expected in zip(whole, results(matrix), strict=True):
            assert torch.equal(got[i], expected)


def test_below_the_normal_range() -> None:
    """What cannot be told from 0 is 0, and the caller's arithmetic is left as it was."""
    scores = torch.tensor([[0.0, -88.0, -200.0, -80.0]])
    p = pb_relax_softmax(scores, alpha=1.0, impl="cpp")
    assert p[0, 1] == p[0, 2] == 0
    assert p[0, 3] > 0
    assert torch.tensor(2.0**-100) * torch.tensor(2.0**-40) > 0


@each_impl(OP)
def test_gradcheck(impl: str) -> None:
    skip_slow(impl)
    for case in (softmax("width_17", 3, 17), *MASKED):
        scores = case.inputs(torch.float64, device_of(impl))["scores"].requires_grad_()
        assert torch.autograd.gradcheck(lambda x, case=case: case({"scores": x}, impl), scores, fast_mode=True)


@each_impl(OP)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (4, 4), (3, 7), (7, 3), (1, 20)])
def test_causal_is_the_pattern(impl: str, rows: int, cols: int) -> None:
    p = pb_relax_softmax(torch.zeros(rows, cols, device=device_of(impl)), causal=True, impl=impl)
    seen = patterns.causal(torch.arange(rows)[:, None], torch.arange(cols), rows, cols)
    expected = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(p.cpu(), expected.float())


@each_impl(OP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cannot_overflow(impl: str, dtype: torch.dtype) -> None:
    """Scores at the end of float16's range, times alpha: the largest entry wins, nothing is lost."""
    skip_uncomputable(dtype, impl)
    scores = torch.tensor([[60000.0, -60000.0, 59000.0]], dtype=dtype, device=device_of(impl))
    assert pb_relax_softmax(scores, alpha=32.0, impl=impl).tolist() == [[1.0, 0.0, 0.0]]


@each_impl(OP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("width", [5, 40])
def test_not_finite(impl: str, dtype: torch.dtype, bad: float, everywhere: bool, width: int) -> None:
    """What the formula gives: NaN for a row that sees NaN, +inf or nothing but -inf; one -inf is just 0."""
    skip_uncomputable(dtype, impl)
    scores = torch.randn(6, width, dtype=dtype, device=device_of(impl))
    scores[2, slice(None) if everywhere else 2] = bad
    mask = torch.ones(width, dtype=torch.bool, device=scores.device)
    mask[1] = False
    for options in ({}, {"causal": True}, {"mask": mask}):
        out, formula = (pb_relax_softmax(scores, impl=x, **options) for x in (impl, "reference"))
        torch.testing.assert_close(out, formula, equal_nan=True)


@each_impl(OP)
def test_hidden_entries_are_not_read(impl: str) -> None:
    for case in runnable(MASKED, impl):
        scores = case.inputs(torch.float32, device_of(impl))["scores"]
        seen = case({"scores": torch.zeros_like(scores)}, impl)[0] > 0
        assert torch.equal(*(case({"scores": scores.masked_fill(~seen, x)}, impl)[0] for x in (0.0, math.inf)))


@each_impl(OP)
def test_any_strides(impl: str, poisoned: None) -> None:
    for case in [x for x in MASKED if x.label == "causal_mask" or not interpreted(impl)]:
        inputs = case.inputs(torch.float32, device_of(impl))
        scores = inputs["scores"]
        (expected,), grads = run(case, inputs, impl)
        for other in (gaps(inputs)["scores"], scores.transpose(0, -2).contiguous().transpose(0, -2)):
            (out,), other_grads = run(case, {"scores": other}, impl)
            assert_same([out, other_grads["scores"]], [expected, grads["scores"]], impl)
        leaf = scores.clone().requires_grad_()
        (out,) = case({"scores": leaf}, impl)
        wide = torch.randn(*out.shape[:-1], 2 * out.shape[-1], device=out.device)[..., ::2]
        for dout in (wide, wide[..., :1].expand_as(out), wide[:1].expand_as(out)):
            strange, plain = (torch.autograd.grad(out, leaf, x, retain_graph=True) for x in (dout, dout.contiguous()))
            assert_same(strange, plain, impl)


@each_impl(OP)
def test_overlapping_rows(impl: str) -> None:
    windows = torch.randn(60, device=device_of(impl)).unfold(0, 40, 1)
    assert torch.equal(pb_relax_softmax(windows, impl=impl), pb_relax_softmax(windows.contiguous(), impl=impl))


@each_impl(OP)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(impl: str, shape: tuple[int, ...]) -> None:
    scores = torch.empty(shape, device=device_of(impl), requires_grad=True)
    out = pb_relax_softmax(scores, causal=True, impl=impl)
    assert out.shape == shape
    out.sum().backward()
    assert scores.grad is not None
    assert scores.grad.shape == shape


def test_opcheck_backward() -> None:
    dout, out = torch.randn(2, 5, 37), torch.softmax(torch.randn(2, 5, 37), -1)
    for causal in (False, True):
        args = (dout, out.tril(32) if causal else out, 4.0, causal)
        torch.library.opcheck(torch.ops.cogview_ops.pb_relax_softmax_bwd.default, args)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scores", None, TypeError),
        ("scores", torch.ones(3, 4, dtype=torch.int64), TypeError),
        ("scores", torch.ones(()), ValueError),
        ("scores", torch.ones(4), ValueError),  # causal needs rows
        ("scores", torch.ones(3, 0), ValueError),
        ("scores", torch.ones(4, 3).T, ValueError),
        ("alpha", 0.0, ValueError),
        ("alpha", math.inf, ValueError),
        ("alpha", "32", TypeError),
        ("alpha", True, TypeError),
        ("mask", [True], TypeError),
        ("mask", torch.ones(3, 4), TypeError),
        ("mask", torch.ones(2, 3, 4, dtype=torch.bool), ValueError),
        ("mask", torch.ones(3, 3, dtype=torch.bool), ValueError),
        ("mask", torch.ones(3, 4, dtype=torch.bool, device="meta"), ValueError),
        ("impl", "fast", ValueError),
    ],
)
def test_arguments(name: str, value: Any, error: type[Exception]) -> None:
    refused(pb_relax_softmax, {"scores": torch.ones(3, 4), "causal": True}, name, value, error)
