"""What makes small calls cheap hides no mistake: checks that are not asked again, indices that kernels look at."""

import gc
import io
import itertools
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cogview_ops import (
    _dispatch,
    _remembered,
    dalle_attention_decode,
    layer_norm,
    local_attention_2d,
    local_attention_2d_decode,
    pb_relax_softmax,
    three_region_attention,
    three_region_attention_decode,
)

pytestmark = pytest.mark.skipif(_dispatch._C is None, reason="the compiled extension is missing")
X = torch.randn(1, 2, 12, 8)
BLOCKS: dict[str, Any] = {"block_size": 4, "window_blocks": 2}
WINDOW: dict[str, Any] = {"grid": (3, 4), "kernel_size": (3, 3)}


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GOOD = ints(0, 3, -1)[None]


@pytest.mark.parametrize(
    ("good", "bad", "name"),
    [
        ({"grid": (3, 4)}, {"grid": (3.0, 4.0)}, "grid"),
        ({"kernel_size": (1, 3)}, {"kernel_size": (True, 3)}, "kernel_size"),
        ({"dilation": 1}, {"dilation": True}, "dilation"),
        ({"raster_causal": True}, {"raster_causal": 1}, "raster_causal"),
        ({"raster_causal": False}, {"raster_causal": 0}, "raster_causal"),
        ({"scale": 1.0}, {"scale": True}, "scale"),
        ({"prefix_bias": 0.0}, {"prefix_bias": False}, "prefix_bias"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_equals_a_good_value_is_not_taken_for_it(good, bad, name) -> None:
    first = local_attention_2d(X, X, X, **WINDOW | good)
    for _ in range(2):  # what is refused is not remembered either
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            local_attention_2d(X, X, X, **WINDOW | bad)
    assert torch.equal(local_attention_2d(X, X, X, **WINDOW | good), first)


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (X.double(), TypeError),
        (X[:, :, ::2], ValueError),
        (X[..., :4], ValueError),
        (torch.empty(1, 2, 8, 12).mT, ValueError),
        (X.to("meta"), ValueError),
        (X.tolist(), TypeError),
        (X.numpy(), TypeError),
    ],
    ids=["dtype", "tokens", "head_dim", "strides", "device", "list", "numpy"],
)
def test_tensors_unlike_those_that_passed_are_refused(other, error) -> None:
    local_attention_2d(X, X, X, **WINDOW)
    for place in range(3):
        operands = [X, X, X]
        operands[place] = other
        with pytest.raises(error):
            local_attention_2d(*operands, **WINDOW)


def test_numpy_numbers_and_lists_are_as_good() -> None:
    numpy = pytest.importorskip("numpy")
    expected = local_attention_2d(X, X, X, **WINDOW, scale=0.5)
    same: dict[str, Any] = {"grid": [numpy.int64(3), 4], "kernel_size": [3, 3], "scale": numpy.float64(0.5)}
    for _ in range(2):
        assert torch.equal(local_attention_2d(X, X, X, **same), expected)


def test_what_is_remembered_holds_no_tensor_and_has_an_end(monkeypatch) -> None:
    monkeypatch.setattr(_remembered, "MOST", 3)
    seen: list[tuple[Any, ...]] = []

    @_remembered.remembered
    def check(x: Tensor, n: int) -> int:
        seen.append((tuple(x.shape), n))
        return n

    x = torch.ones(2)
    for n in (1, 2, 3, 1, 2, 3):
        assert check(x, n) == n
    assert len(seen) == 3
    check(x, 4)  # the fourth kind: all are forgotten
    check(torch.ones(2), 1)
    check(torch.ones(2), 1)
    assert seen[3:] == [((2,), 4), ((2,), 1)]
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "row", [(3, 0), (3, 3), (-1, 3), (-2, 3), (0, 12), (0, 2**31 - 1)], ids=lambda row: ",".join(map(str, row))
)
def test_pivots_are_looked_at_in_every_call(row, dtype) -> None:
    """Also where they changed in place, unseen by autograd's count of versions."""
    pivots, lengths = ints(0, 3, dtype=dtype)[None], ints(12)
    calls = [
        lambda: three_region_attention(X, X, X, pivots, **BLOCKS),
        lambda: three_region_attention(X.clone().requires_grad_(), X, X, pivots, **BLOCKS),
        lambda: three_region_attention_decode(X[:, :, 11:], X, X, pivots, lengths, **BLOCKS),
    ]
    for call, inference in itertools.product(calls, (False, True)):
        with torch.inference_mode(inference):
            pivots.data[:] = ints(0, 3)
            call()
            pivots.data[:] = ints(*row, dtype=dtype)
            with pytest.raises(ValueError, match=r"^pivots: expected"):
                call()
    for op, more in (("fwd", ()), ("decode", (lengths,))):  # and where nobody checks before
        query = X if op == "fwd" else X[:, :, 11:]
        with pytest.raises(RuntimeError, match="pivots: expected"):
            getattr(torch.ops.cogview_ops, f"three_region_attention_{op}")(query, X, X, pivots, *more, 4, 2, 0.0, 1.0)


@pytest.mark.parametrize("end", [0, 1, 13, -5])
def test_lengths_are_looked_at_in_every_call(end: int) -> None:
    lengths, query = ints(12), X[:, :, 10:]
    image = X[:, :, 4:]
    calls = [
        lambda: three_region_attention_decode(query, X, X, GOOD, lengths, **BLOCKS),
        lambda: local_attention_2d_decode(query, X, X, lengths, **WINDOW),
        lambda: dalle_attention_decode(query, X, X, lengths, kind="row", text_len=4, grid=(2, 4)),
        lambda: torch.ops.cogview_ops.local_attention_2d_decode(
            query,
            image,
            image,
            *(None,) * 7,
            lengths,
            None,
            *([2, 4], [3, 3], [1, 1], True, False, 0.0, [0, 0], [0, 0], 0.0, 1.0),
        ),
    ]
    for k, call in enumerate(calls):
        lengths.data[:] = 12 if k < 3 else 8
        call()
        lengths.data[:] = end
        with pytest.raises(ValueError if k < 3 else RuntimeError, match="cache_seqlens: expected"):
            call()


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    x = X.clone().requires_grad_()
    for call in (
        lambda x: layer_norm(x),
        lambda x: pb_relax_softmax(x),
        lambda x: local_attention_2d(x, x, x, **WINDOW),
    ):
        assert call(x).requires_grad
        with torch.no_grad():
            assert not call(x).requires_grad
        assert not call(X).requires_grad
        with torch.inference_mode():
            assert call(x).is_inference()
        assert torch.equal(call(x), call(X))


class Grid(NamedTuple):
    rows: Any
    columns: Any


class Number:
    def __init__(self, n: int) -> None:
        self.n = n

    def __index__(self) -> int:
        return self.n


def test_what_may_be_or_become_something_else_is_not_remembered() -> None:
    local_attention_2d(X, X, X, grid=Grid(3, 4), kernel_size=Grid(3, 1))
    for bad in ({"kernel_size": Grid(3, True)}, {"grid": Grid(3.0, 4.0)}):
        with pytest.raises(TypeError, match="expected an int"):
            local_attention_2d(X, X, X, **{"grid": Grid(3, 4), "kernel_size": Grid(3, 1)} | bad)
    changing: Any = Number(3)
    window: dict[str, Any] = {"grid": (3, 4), "kernel_size": (changing, 3)}
    assert torch.equal(local_attention_2d(X, X, X, **window), local_attention_2d(X, X, X, **WINDOW))
    changing.n = 1
    row = local_attention_2d(X, X, X, grid=(3, 4), kernel_size=(1, 3))
    assert torch.equal(local_attention_2d(X, X, X, **window), row)


@pytest.mark.parametrize("call", [layer_norm, lambda x: local_attention_2d(x, x, x, **WINDOW)], ids=["norm", "local"])
@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.filterwarnings("ignore")  # that what Python decides is fixed
def test_traces_can_be_saved(call, differentiate: bool) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8), differentiate)

        def forward(self, x: Tensor) -> Tensor:
            return call(x * self.scale)

    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Module(), X), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(X), call(X))


class Scaled(Tensor):
    """Stands for `factor` times itself."""

    factor: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if "cogview_ops" in str(func):
                args = [x.as_subclass(Tensor) * x.factor if isinstance(x, Scaled) else x for x in args]
            return func(*args, **(kwargs or {}))


def test_what_subclasses_compute_is_recorded() -> None:
    weight = torch.ones(8).as_subclass(Scaled)
    weight.factor = factor = torch.tensor(2.0, requires_grad=True)
    layer_norm(X, weight).sum().backward()
    expected = layer_norm(X).sum()
    assert factor.grad is not None
    torch.testing.assert_close(factor.grad, expected)
