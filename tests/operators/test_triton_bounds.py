"""Triton kernels read and write where their arguments are and nowhere else, whatever tensors of indices hold, which
nothing looks at on a GPU: in the interpreter, where each access is compared with the launch's arguments."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from common import interpreted, unavailable
from torch import Tensor

missing = unavailable("three_region_attention_varlen", "triton") or (
    None if interpreted("triton") else "kernels are not interpreted"
)
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
NUMBERS = 4, 1, 0.5, 0.3
TOTAL = 21


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from tensors(part)


def place(x: Tensor) -> tuple[int, int]:
    """Of its first byte and behind its last one."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + elements * x.element_size() * (x.numel() > 0)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    from cogview_ops.triton import _three_region_call, _tiles, three_region_attention

    known: list[tuple[int, int]] = []

    def launch(*arguments: Any, **named: Any) -> None:
        known[:] = [place(x) for x in tensors(tuple(named.values()))]
        _tiles.launch(*arguments, **named)

    for module in (_three_region_call, three_region_attention):
        monkeypatch.setattr(module, "launch", launch)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        access = getattr(InterpreterBuilder, name)

        def watched(self: Any, at: Any, *rest: Any, access: Any = access, mask_at: int = mask_at) -> Any:
            addresses = at.data[numpy.broadcast_to(rest[mask_at].data, at.data.shape)].astype(numpy.int64)
            inside = numpy.zeros(addresses.shape, bool)
            for begin, end in known:
                inside |= (addresses >= begin) & (addresses < end)
            assert inside.all(), f"{access.__name__} of {int((~inside).sum())} elements where no argument is"
            return access(self, at, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, watched)


def test_it_would_show(checked: None) -> None:
    from triton.runtime.errors import InterpreterError

    x, pivots, nothing = torch.randn(1, 1, 20, 16), torch.arange(4)[None], torch.empty(0, dtype=torch.int64)
    with pytest.raises(InterpreterError, match="where no argument is"):
        torch.ops.cogview_ops_triton.three_region_attention_decode(x, x, x, pivots, nothing, *NUMBERS)


ENDS = {
    "up and down": [0, 16, 5, TOTAL, 3],
    "descending, beyond": [2**31 - 1, 50, 20, 5, -(2**31)],
    "begins late": [11, 11, 12, 14, TOTAL],
    "wide": [0, 2**40, -(2**40), 2**33 + 5, 2**62],
    "none": [0],
}


@pytest.mark.parametrize(("name", "longest"), [*((name, TOTAL) for name in ENDS), ("begins late", 3), ("wide", 0)])
def test_packed_sequences(checked: None, poisoned: None, name: str, longest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, TOTAL, 1, 16, generator=generator)
    ends = torch.tensor(ENDS[name])
    ends = ends if name == "wide" else ends.int()
    pivots = torch.randint(-(2**31), 2**31 - 1, (len(ends) - 1, 20), generator=generator)
    pivots[::2] = torch.arange(20)
    ops = torch.ops.cogview_ops_triton
    out, lse = ops.three_region_attention_varlen_fwd(q, k, v, pivots, ends, longest, *NUMBERS)
    ops.three_region_attention_varlen_bwd(q, lse, q, k, v, out, lse, pivots, ends, longest, *NUMBERS)


def test_what_kernels_search_ascends() -> None:
    """Or tiles of one kernel would be of other sequences than those of another, and read what it has not written."""
    from cogview_ops.triton._three_region_call import Call, samples

    rows = samples(torch.zeros(TOTAL, 1, 16))
    for ends, seen in (("up and down", [0, 16, 16, 21, 21]), ("wide", [0, 21, 21, 21, 21])):
        pivots = torch.zeros(4, 1, dtype=torch.int32)
        begins = Call(rows, rows, rows, pivots, NUMBERS, torch.tensor(ENDS[ends]), TOTAL).packed["begins"]
        assert (begins.tolist(), begins.dtype) == (seen, torch.int32)


@pytest.mark.parametrize("places", [(0, 12, 30), (-5, 2**40, -(2**40)), (3, 31, 17)], ids=str)
def test_left_padded_caches(checked: None, places: tuple[int, ...]) -> None:
    q, cache = torch.randn(3, 2, 2, 16), torch.randn(3, 1, 30, 16)
    pivots, begins = torch.arange(-3, 9).repeat(3, 1), torch.tensor(places)
    ops = torch.ops.cogview_ops_triton
    for ends in (torch.tensor([30, 12, 2]), -begins, begins + 7):
        out, lse = ops.three_region_attention_decode(q, cache, cache, pivots, ends, *NUMBERS, begins)
        assert out.isfinite().all()
        assert (lse < torch.inf).all()
