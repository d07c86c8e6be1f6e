"""linear_decode: truth, rows by themselves, arguments. What all operators share is in test_operators.py."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, assert_as_good_as, every_isa, refused
from torch import Tensor

from cogview_ops import _dispatch, linear_decode

ROWS = (1, 2, 3, 4, 7, 8, 21)
SIZES = [(1, 1), (19, 37), (8, 64), (70, 100), (64, 513), (3, 0)]  # of outputs, of inputs
GOOD: dict[str, Any] = {"x": torch.randn(2, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}


def drawn(rows: int, out: int, size: int, dtype: torch.dtype, int8: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows * 1000 + out + size)
    made = {"x": torch.randn(rows, size, generator=g), "bias": torch.randn(out, generator=g)}
    if not int8:
        return {name: x.to(dtype) for name, x in (made | {"weight": torch.randn(out, size, generator=g)}).items()}
    scale = torch.rand(out, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32) / 64
    weight = torch.randint(-128, 128, (out, size), generator=g, dtype=torch.int8)
    return {name: x.to(dtype) for name, x in made.items()} | {"weight": weight, "scale": scale}


def truth(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    wide = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    return F.linear(x.double(), wide, bias.double())


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_truth(isa: str, dtype: torch.dtype, int8: bool) -> None:
    for rows, (out, size) in itertools.product(ROWS, SIZES):
        inputs = drawn(rows, out, size, dtype, int8)
        formula = linear_decode(**inputs, impl="reference")
        assert_as_good_as(linear_decode(**inputs, impl="cpp"), truth(**inputs), formula, f"{rows} of {out} x {size}")


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_a_row_depends_on_no_other(isa: str, dtype: torch.dtype, int8: bool, threads: None) -> None:
    """To the bit, whatever the batch and the number of threads."""
    inputs = drawn(23, 90, 77, dtype, int8)
    whole = linear_decode(**inputs)
    for some in (slice(0, 1), slice(3, 5), slice(5, 9), slice(2, 15)):
        assert torch.equal(linear_decode(**inputs | {"x": inputs["x"][some]}), whole[some])
    torch.set_num_threads(1)
    assert torch.equal(linear_decode(**inputs), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_larger_than_a_piece_of_work(dtype: torch.dtype) -> None:
    inputs = drawn(2, 1000, 1040, dtype, False)
    assert_as_good_as(linear_decode(**inputs), truth(**inputs), linear_decode(**inputs, impl="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_larger_weight(dtype: torch.dtype) -> None:
    """Rows of any stride, of a slice of a table or with other columns beside them; bias and scale of any."""
    inputs = drawn(3, 40, 50, dtype, False)
    for weight in (inputs["weight"][::3], inputs["weight"][5:19, 7:40]):
        x, bias = inputs["x"][:, : weight.shape[1]], inputs["bias"].repeat_interleave(2)[::2][: len(weight)]
        assert torch.equal(linear_decode(x, weight, bias), linear_decode(x, weight.contiguous(), bias.contiguous()))
    assert torch.equal(
        linear_decode(inputs["x"], inputs["weight"]), linear_decode(**inputs | {"bias": torch.zeros(40).to(dtype)})
    )


def test_one_vector() -> None:
    inputs = drawn(1, 9, 20, torch.float32, False)
    alone = linear_decode(inputs["x"][0], inputs["weight"])
    assert alone.shape == (9,)
    assert torch.equal(alone, linear_decode(inputs["x"], inputs["weight"])[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite(dtype: torch.dtype, bad: float) -> None:
    """It reaches what it is multiplied into, and nothing else: not through the end of a row that fills no vector."""
    inputs = drawn(3, 10, 37, dtype, False)
    inputs["x"][1, 36] = inputs["weight"][4, 2] = bad
    hit = ~linear_decode(**inputs).isfinite()
    assert hit[1].all()
    assert hit[:, 4].all()
    assert int(hit.sum()) == 12


def test_it_is_differentiated_by_the_reference_alone() -> None:
    weight = GOOD["weight"].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="linear_decode cannot be differentiated; impl='reference' can"):
        linear_decode(GOOD["x"], weight).sum().backward()
    linear_decode(GOOD["x"], weight, impl="reference").sum().backward()
    assert torch.allclose(weight.grad, GOOD["x"].sum(0).expand(5, 8))


def test_int8_weights_of_a_layer_stay_near_it() -> None:
    layer = torch.nn.Linear(256, 64)
    scale = layer.weight.detach().abs().amax(1) / 127
    numbers = (layer.weight.detach() / scale[:, None]).round().to(torch.int8)
    x = torch.randn(4, 256)
    with torch.no_grad():
        wanted, got = layer(x), linear_decode(x, numbers, layer.bias, scale=scale)
    assert (got - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize(("name", "value", "error"), [
    ("x", [1.0], TypeError), ("x", torch.ones(2, 8, dtype=torch.int32), TypeError),
    ("x", torch.tensor(1.0), ValueError), ("x", torch.ones(8, 2).T, ValueError),
    ("weight", torch.ones(5, 7), ValueError), ("weight", torch.ones(8), ValueError),
    ("weight", torch.ones(5, 8).double(), TypeError), ("weight", torch.ones(5, 8, dtype=torch.int8), TypeError),
    ("weight", torch.ones(8, 5).T, ValueError), ("weight", torch.ones(5, 8, device="meta"), ValueError),
    ("bias", torch.ones(4), ValueError), ("bias", torch.ones(5).half(), TypeError), ("bias", 1.0, TypeError),
    ("bias", torch.ones(1, 5), ValueError),
])  # fmt: skip
def test_arguments(name: str, value: Any, error: type[Exception]) -> None:
    refused(linear_decode, GOOD, name, value, error)


@pytest.mark.parametrize(("name", "value", "error"), [
    ("scale", torch.ones(4), ValueError), ("scale", torch.ones(5).bfloat16(), TypeError), ("scale", 0.5, TypeError),
    ("weight", torch.ones(5, 8), TypeError),
])  # fmt: skip
def test_arguments_of_int8(name: str, value: Any, error: type[Exception]) -> None:
    good = GOOD | {"weight": torch.ones(5, 8, dtype=torch.int8), "scale": torch.ones(5)}
    refused(linear_decode, good, name, value, error)


def test_operators_called_directly_stay_within_memory() -> None:
    op = torch.ops.cogview_ops.linear_decode
    x, weight, numbers = torch.ones(2, 8), torch.ones(5, 8), torch.ones(5, 8, dtype=torch.int8)
    for arguments, what in (
        ((x, torch.ones(5, 9), None, None), "weight: shape"),
        ((x, weight.mT.contiguous().mT, None, None), "weight: expected a contiguous"),
        ((x, numbers, None, None), "weight: expected x's dtype"),
        ((x, weight, None, torch.ones(5)), "weight: expected x's dtype, or int8"),
        ((x, weight, torch.ones(4), None), "bias: shape"),
        ((x, weight, torch.ones(5).double(), None), "bias: expected another dtype"),
        ((x, numbers, None, torch.ones(6)), "scale: shape"),
        ((x, numbers, None, torch.ones(5).half()), "scale: expected another dtype"),
    ):
        with pytest.raises(RuntimeError, match=what):
            op(*arguments)


def test_there_is_no_kernel_for_gpus() -> None:
    assert all(_dispatch.reason_unavailable("linear_decode", impl) for impl in ("cuda", "triton"))
    with pytest.raises(RuntimeError, match="there is no Triton kernel of this operator"):
        linear_decode(**GOOD, impl="triton")
