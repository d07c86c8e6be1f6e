"""layer_norm and sandwich_layer_norm: truth, relaxation, extremes, arguments. What all operators share is in
test_operators.py."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    Case,
    assert_as_good_as,
    assert_same,
    assert_true,
    device_of,
    each_impl,
    every_isa,
    gaps,
    refused,
    run,
    skip_slow,
    skip_uncomputable,
)
from torch import Tensor

from cogview_ops import layer_norm, sandwich_layer_norm

WIDTHS = (1, 3, 16, 17, 63, 64, 100, 2560)
LONGEST = 20512  # no GPU kernel keeps such a row in registers
RELAX = (None, "row", "tensor")
WEIGHTS = ("post_weight", "post_bias", "pre_weight", "pre_bias")


def norm(width: int, relax: str | None, rows: int = 5) -> Case:
    shapes = {"x": (rows, width), "weight": (width,), "bias": (width,)}
    return Case("layer_norm", f"{width}-{relax}", shapes, {"relax": relax, "eps": 1e-2 if width == 1 else 1e-5})


def sandwich(width: int, relax: str | None, rows: int = 5, **options: Any) -> Case:
    shapes = {"branch": (rows, width), "residual": (rows, width)} | dict.fromkeys(WEIGHTS, (width,))
    options |= {"relax": relax, "eps": 1e-2 if width == 1 else 1e-5}  # the formula in float16 needs it at width 1
    return Case("sandwich_layer_norm", f"{width}-{relax}", shapes, options)


NORMS = [norm(width, relax) for width, relax in itertools.product(WIDTHS, RELAX)]
SANDWICHES = [
    sandwich(width, relax, dropout_p=0.3 * (k % 2), seed=7)
    for k, (width, relax) in enumerate(itertools.product(WIDTHS, RELAX))
]
DROPOUT = sandwich(37, "row", dropout_p=0.25, seed=2**40 + 3)


def without(case: Case, *missing: str) -> Case:
    """Of some parameters, which are None."""
    shapes = {name: shape for name, shape in case.shapes.items() if name not in missing}
    label = f"{case.label}-without-{'-'.join(missing)}"
    return case._replace(label=label, shapes=shapes, options=case.options | dict.fromkeys(missing))


NORMS += [
    without(norm(width, relax), *missing)
    for width, relax in ((37, "row"), (64, "tensor"), (100, None))
    for missing in (("bias",), ("weight",), ("weight", "bias"))
]
SANDWICHES += [
    without(sandwich(width, relax, dropout_p=0.3, seed=7), *missing)
    for width, relax in ((37, "row"), (64, "tensor"))
    for missing in (WEIGHTS, ("post_bias", "pre_bias"), ("post_weight", "pre_bias"))
]
WIDE_RESIDUALS = [  # at width 3 the formula has NaN in float16
    case._replace(label=f"{case.label}-wide{'-weights' if wide else ''}", wide=("residual", *wide))
    for case in (*SANDWICHES, sandwich(LONGEST, "tensor", rows=2))
    for wide in ((), WEIGHTS)
    if case.shapes["branch"][1] > 3 and (not wide or case.options["relax"] == "row")
]


@each_impl("layer_norm", [*NORMS, norm(LONGEST, "tensor", rows=2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)


@each_impl("sandwich_layer_norm", [*SANDWICHES, sandwich(LONGEST, "row", rows=2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sandwich_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)


@each_impl("sandwich_layer_norm", WIDE_RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_residual_stays_float32(impl: str, case: Case, dtype: torch.dtype) -> None:
    """Beside a branch of 16 bits all is as in float32, to the bit, but for what is rounded to the branch's dtype."""
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)
    inputs = case.inputs(dtype, device_of(impl))
    (h, x), grads = run(case, inputs, impl, rounding=dtype)
    (wide_h, wide_x), wide_grads = run(case, {name: x.float() for name, x in inputs.items()}, impl, rounding=dtype)
    assert (h.dtype, x.dtype) == (torch.float32, dtype)
    expected = [wide_h, wide_x.to(dtype), *(wide_grads[name].to(x.dtype) for name, x in inputs.items())]
    assert_same([h, x, *grads.values()], expected, impl)
    with torch.autocast(device_of(impl), dtype):
        assert_same(case(inputs, impl), [h, x], impl)
        assert run(case, inputs, impl, [0])[1]["residual"].dtype == torch.float32


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("output", [0, 1], ids=["dh", "dx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth_with_one_gradient(impl: str, output: int, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(DROPOUT, dtype, impl, [output])
    assert_true(DROPOUT._replace(wide=("residual",)), dtype, impl, [output])


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for case in SANDWICHES if dtype.itemsize > 2 else (*SANDWICHES, *WIDE_RESIDUALS):
        assert_true(case, dtype, "cpp")


@each_impl("sandwich_layer_norm")
def test_many_rows(impl: str) -> None:
    """Sums over rows keep float32's accuracy, and repeat bit for bit with any number of threads."""
    skip_slow(impl)
    case = sandwich(9, "row", rows=5000)
    assert_true(case, torch.float32, impl)


def test_repeats_with_any_number_of_threads(threads: None) -> None:
    case = sandwich(64, "row", rows=700, dropout_p=0.1, seed=1)
    inputs = case.inputs(torch.float32)
    results = []
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        outputs, grads = run(case, inputs, "cpp")
        results.append([*outputs, *grads.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_isa
@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
def test_many_rows_are_their_parts(isa: str, dtype: torch.dtype, wide: torch.dtype) -> None:
    """Results beyond the caches are written around them, in lines that rows of this width begin and end within."""
    width, rows, part = 1025, 5000, 700
    branch, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(wide)
    weights = torch.randn(4, width).to(dtype)

    def results(rows: slice) -> tuple[Tensor, ...]:
        inputs = [x[rows].detach().requires_grad_() for x in (branch, residual)]
        outs = sandwich_layer_norm(*inputs, *weights, impl="cpp")
        return *outs, *torch.autograd.grad(outs, inputs, [residual[rows], branch[rows]])

    whole = results(slice(None))
    assert whole[0].nbytes > 2**23
    for start in range(0, rows, part):
        rows_of_part = slice(start, start + part)
        for got, expected in zip(whole, results(rows_of_part), strict=True):
            assert torch.equal(got[rows_of_part], expected)


@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("width", [3, 20])
def test_gradcheck(relax: str | None, width: int) -> None:
    """Numerical derivatives of plain LayerNorm; with relax, c is held constant, so the reference's derivatives."""
    case = sandwich(width, relax, dropout_p=0.3, seed=9)
    inputs = case.inputs(torch.float64)
    if relax is None:
        leaves = [x.requires_grad_() for x in inputs.values()]
        assert torch.autograd.gradcheck(lambda *a: sandwich_layer_norm(*a, **case.options), leaves)
    else:
        expected = run(case, inputs, "reference")[1]
        for name, grad in run(case, inputs, "cpp")[1].items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12)


# --- what differs from plain LayerNorm -------------------------------------------------------------------------------


@each_impl("layer_norm")
def test_relax_none_is_torch(impl: str) -> None:
    x, w, b = norm(100, None).inputs(torch.float64, device_of(impl)).values()
    torch.testing.assert_close(layer_norm(x, w, b, relax=None, eps=0.1, impl=impl), F.layer_norm(x, (100,), w, b, 0.1))


@each_impl("layer_norm")
@pytest.mark.parametrize("relax", ["row", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e38),
        (torch.float32, 1e-42),
        (torch.bfloat16, 1e38),
        (torch.float16, 3e4),
        (torch.float16, 1e-7),
        (torch.float64, 1e307),
        (torch.float64, 1e-320),
    ],
    ids=str,
)
def test_any_magnitude(impl: str, dtype: torch.dtype, scale: float, relax: str) -> None:
    """Neither overflow nor a lost row where plain LayerNorm has both."""
    skip_uncomputable(dtype, impl)
    inputs = norm(40, relax).inputs(torch.float64, device_of(impl))
    x = (inputs["x"].clamp(-2, 2) * scale).to(dtype)
    weight, bias = inputs["weight"].to(dtype), inputs["bias"].to(dtype)
    unit = x.double() / x.abs().amax().double()
    truth = layer_norm(unit, weight.double(), bias.double(), relax=relax, impl="reference")
    out = layer_norm(x, weight, bias, relax=relax, impl=impl)
    torch.testing.assert_close(out.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    h, _ = sandwich_layer_norm(x, x * 0, weight, bias, weight, bias, relax=relax, impl=impl)
    assert_same([h], [out], impl)


@each_impl("layer_norm")
def test_huge_gradients_are_finite(impl: str) -> None:
    x = torch.tensor([[3e38, -3e38, -3e38, 1e38]], device=device_of(impl), requires_grad=True)
    weight = torch.ones(4, device=x.device, requires_grad=True)
    layer_norm(x, weight, torch.zeros_like(weight), impl=impl).backward(torch.eye(4, device=x.device)[:1])
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.isfinite().all()
    assert weight.grad[0] > 1


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_give_bias(impl: str, relax: str | None, dtype: torch.dtype) -> None:
    """c = 0 counts as 1; the gradient is plain LayerNorm's."""
    skip_uncomputable(dtype, impl)
    inputs = norm(20, relax).inputs(dtype, device_of(impl))
    x, weight, bias = inputs.values()
    zeros = torch.zeros_like(x).requires_grad_()
    out = layer_norm(zeros, weight, bias, relax=relax, impl=impl)
    assert torch.equal(out, bias.expand_as(out))
    out.backward(x)
    wide = torch.zeros_like(x, dtype=torch.float64).requires_grad_()
    F.layer_norm(wide, (20,), weight.double(), bias.double()).backward(x.double())
    assert zeros.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(zeros.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps, atol=1e-3)
    h, out = sandwich_layer_norm(zeros, zeros, weight, bias, weight, bias, relax=relax, impl=impl)
    assert torch.equal(h, bias.expand_as(h))
    assert out.isfinite().all()


@each_impl("layer_norm")
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [5, 40])
def test_not_finite(impl: str, relax: str | None, bad: float, width: int) -> None:
    """A row with NaN or infinity is NaN, as is a tensor with NaN whose c is common; infinite c leaves bias."""
    inputs = norm(width, relax).inputs(torch.float32, device_of(impl))
    for column in (0, width - 1):
        x = inputs["x"].clone()
        x[1, column] = bad
        truth = layer_norm(
            x.double(), inputs["weight"].double(), inputs["bias"].double(), relax=relax, impl="reference"
        )
        out = layer_norm(x, inputs["weight"], inputs["bias"], relax=relax, impl=impl)
        torch.testing.assert_close(out.double(), truth, equal_nan=True, rtol=1e-5, atol=1e-5)


# --- layouts, dtypes, sizes ------------------------------------------------------------------------------------------


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("relax", RELAX)
def test_any_strides(impl: str, relax: str | None, poisoned: None) -> None:
    """Gaps, stride 0, overlapping windows and permuted dimensions, for inputs and gradients."""
    case = sandwich(37, relax, dropout_p=0.3, seed=4)
    inputs = case.inputs(torch.float32, device_of(impl))
    windows = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(inputs["branch"].device).unfold(0, 37, 1)
    block = torch.randn(6, 4, 37).to(windows.device)
    for branch, residual in (
        (gaps(inputs)["branch"], gaps(inputs)["residual"]),
        (inputs["branch"][:1].expand(5, 37), inputs["residual"]),
        (windows, windows.flip(0).contiguous()),
        (block.transpose(0, 1), block.view(4, 6, 37)),
        (inputs["branch"][0], inputs["residual"][0]),
    ):
        plain = {**inputs, "branch": branch.contiguous(), "residual": residual.contiguous()}
        assert_same(case({**inputs, "branch": branch, "residual": residual}, impl), case(plain, impl), impl)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    h, x = case(leaves, impl)
    wide = torch.randn(5, 74, device=x.device)[:, ::2]  # last dimension not contiguous: copied
    for grad in (wide, wide[:1].expand(5, 37), wide[:, :1].expand(5, 37)):
        got = torch.autograd.grad((h, x), list(leaves.values()), (grad, grad), retain_graph=True)
        same = grad.contiguous()
        expected = torch.autograd.grad((h, x), list(leaves.values()), (same, same), retain_graph=True)
        assert_same(got, expected, impl)


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_float32_weights(impl: str, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    inputs = DROPOUT.inputs(dtype, device_of(impl))
    mixed = {name: x.float() if name in WEIGHTS else x for name, x in inputs.items()}
    outputs, grads = run(DROPOUT, mixed, impl, rounding=dtype)
    truth, true_grads = run(DROPOUT, {name: x.double() for name, x in mixed.items()}, "reference", rounding=dtype)
    formula, formula_grads = run(DROPOUT, inputs, "reference", rounding=dtype)
    for out, true, plain in zip(outputs, truth, formula, strict=True):
        assert_as_good_as(out, true, plain)
    for name, grad in grads.items():
        assert grad.dtype == mixed[name].dtype
        assert_as_good_as(grad, true_grads[name], formula_grads[name].to(grad.dtype), name)


@each_impl("sandwich_layer_norm")
@pytest.mark.parametrize("relax", RELAX)
def test_no_rows(impl: str, relax: str | None) -> None:
    for seed in (1, torch.empty(0, dtype=torch.int64)):
        case = sandwich(20, relax, rows=0, dropout_p=0.5, seed=seed)
        outputs, grads = run(case, case.inputs(torch.float32, device_of(impl)), impl)
        assert all(out.shape == (0, 20) for out in outputs)
        assert all(not grads[name].any() for name in WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [(), ("residual",)], ids=["same", "wide"])
def test_opcheck_backward(dtype: torch.dtype, wide: tuple[str, ...]) -> None:
    inputs = DROPOUT._replace(wide=wide).inputs(dtype)
    branch, residual, *weights = inputs.values()
    for seed in (torch.tensor(3), torch.arange(5)):
        numbers = None, 1.0, 1e-5, 1, 0.0, False, 0.25, False, seed
        h, x, *stats = torch.ops.cogview_ops.sandwich_layer_norm_fwd(branch, residual, *weights, *numbers)
        for dh, dx in ((h, x), (h, None), (None, x)):
            given = weights[0], None, weights[2], None
            args = (dh, dx, branch, h, *given, *stats, False, 1.0, 0.0, 0.25, False, seed)
            torch.library.opcheck(torch.ops.cogview_ops.sandwich_layer_norm_bwd.default, args)
    torch.library.opcheck(
        torch.ops.cogview_ops.layer_norm_bwd.default, (x.to(h.dtype), h, weights[2].float(), stats[2], stats[3], 0.0)
    )


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("x", [1.0], TypeError),
        ("x", torch.ones(5, 20, dtype=torch.int32), TypeError),
        ("x", torch.ones(()), ValueError),
        ("x", torch.ones(5, 0), ValueError),
        ("x", torch.ones(20, 5).T, ValueError),
        ("weight", 1.0, TypeError),
        ("weight", torch.ones(19), ValueError),
        ("bias", torch.ones(1, 20), ValueError),
        ("bias", torch.ones(20, device="meta"), ValueError),
        ("eps", 0.0, ValueError),
        ("eps", math.nan, ValueError),
        ("eps", "1e-5", TypeError),
        ("relax", "head", ValueError),
        ("relax", True, ValueError),
        ("impl", "fast", ValueError),
    ],
)
def test_norm_arguments(name: str, value: Any, error: type[Exception]) -> None:
    refused(layer_norm, norm(20, None).inputs(torch.float32), name, value, error)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("branch", None, TypeError),
        ("residual", None, TypeError),
        ("residual", torch.ones(5, 20, dtype=torch.float64), TypeError),
        ("residual", torch.ones(1, 20), ValueError),
        ("residual", torch.ones(20, 5).T, ValueError),
        ("post_weight", torch.ones(21), ValueError),
        ("post_bias", torch.ones(20, dtype=torch.int64), TypeError),
        ("pre_weight", torch.ones(()), ValueError),
        ("pre_bias", "zeros", TypeError),
        ("dropout_p", -0.1, ValueError),
        ("dropout_p", 1.5, ValueError),
        ("dropout_p", None, TypeError),
        ("seed", None, ValueError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
        ("seed", 2**63, ValueError),
        ("seed", torch.tensor(1.0), ValueError),
        ("seed", torch.tensor([1, 2]), ValueError),
        ("seed", torch.ones(5), ValueError),
        ("seed", torch.ones(5, 1, dtype=torch.int64), ValueError),
        ("seed", torch.ones(5, dtype=torch.int64, device="meta"), ValueError),
        ("seed", torch.tensor(1, device="meta"), ValueError),
    ],
)
def test_sandwich_arguments(name: str, value: Any, error: type[Exception]) -> None:
    inputs = {**sandwich(20, None).inputs(torch.float32), "dropout_p": 0.5, "seed": 1}
    refused(sandwich_layer_norm, inputs, name, value, error)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_seeds_are_one_or_of_samples(impl: str) -> None:
    x, seeds = torch.ones(4, 20), torch.ones(20, dtype=torch.int64)
    of_samples = "one int64 on the input's device cpu, or one for each of the 4 samples"
    with pytest.raises(ValueError, match=f"^seed: expected {of_samples}, got torch.int64 of shape \\(20,\\) on cpu$"):
        sandwich_layer_norm(x, x, dropout_p=0.5, seed=seeds, impl=impl)
    with pytest.raises(ValueError, match=r"^seed: expected one int64 on the input's device cpu, got "):
        sandwich_layer_norm(x[0], x[0], dropout_p=0.5, seed=seeds, impl=impl)
    for given, seed in ((x, seeds), (x, seeds[:4, None]), (x, seeds[:4].int()), (x[0], seeds)):
        numbers = None, 1.0, 1e-5, 1, 0.0, False, 0.5, False, seed
        with pytest.raises(RuntimeError, match="seed: expected one int64, or one for each sample"):
            torch.ops.cogview_ops.sandwich_layer_norm_fwd(given, given, None, None, None, None, *numbers)


@pytest.mark.parametrize(
    ("branch", "residual"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_residual_is_no_narrower(impl: str, branch: torch.dtype, residual: torch.dtype) -> None:
    inputs = sandwich(20, None).inputs(branch)
    refused(sandwich_layer_norm, {**inputs, "impl": impl}, "residual", inputs["residual"].to(residual), TypeError)
    seed, weights = torch.tensor(3), [inputs[name] for name in WEIGHTS]
    with pytest.raises(RuntimeError, match="residual: expected branch's dtype, or float32 beside bfloat16 or float16"):
        torch.ops.cogview_ops.sandwich_layer_norm_fwd(
            inputs["branch"],
            inputs["residual"].to(residual),
            *weights,
            None,
            1.0,
            1e-5,
            1,
            0.0,
            False,
            0.25,
            False,
            seed,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_residual_stream(dtype: torch.dtype) -> None:
    """As `residual + F.layer_norm(branch)` does; 300.9 in bfloat16 is 300 or 302."""
    case = sandwich(20, "row")._replace(wide=("residual",))
    inputs = case.inputs(dtype)
    inputs["residual"] += 300.9
    with torch.autocast("cpu", torch.bfloat16):
        h, x = case(inputs, "auto")
        out = layer_norm(h, inputs["pre_weight"], inputs["pre_bias"])
        narrow = layer_norm(h, inputs["pre_weight"].bfloat16(), inputs["pre_bias"])  # mixed weights: all in float32
    wide_h, wide_x = case({name: x.double() for name, x in inputs.items()}, "reference")
    assert (h.dtype, x.dtype, out.dtype, narrow.dtype) == (torch.float32, dtype, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(h, wide_h.float(), atol=1e-4, rtol=0)
    for result in (x, out):  # of h as it is, not as bfloat16 has it
        torch.testing.assert_close(result.double(), wide_x, atol=1e-3, rtol=2**-8)
    torch.testing.assert_close(narrow, out, atol=0.03, rtol=0.03)


def test_weights_alike() -> None:
    x, weight, bias = norm(20, None).inputs(torch.bfloat16).values()
    with pytest.raises(TypeError, match=r"bias: expected the input's dtype .+ the same for all .+, got torch.bfloat16"):
        layer_norm(x, weight.float(), bias)
    with pytest.raises(TypeError, match=r"weight: expected the input's dtype .+, got torch.float16"):
        layer_norm(x, weight.half(), bias.half())
