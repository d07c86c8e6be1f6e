"""pb_relax_attention: SDPA's result with the weights beside it, in float16 too where plain attention overflows."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, Case, assert_true, device_of, each_impl, gaps, heads_last, packed, refused, skip_uncomputable
from torch import Tensor

from cogview_ops import patterns, pb_relax_attention

OP = "pb_relax_softmax"  # which the composition needs


def attention(label: str, queries: int, keys: int, heads: int = 2, mask: Tensor | None = None, **options: Any) -> Case:
    kv = (2, 2, keys, 8)
    shapes = {"query": (2, heads, queries, 8), "key": kv, "value": kv}
    return Case("pb_relax_attention", label, shapes, {"mask": mask, "return_weights": True, **options})


def some(*shape: int) -> Tensor:
    """A mask of two in three, its first row empty."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 1 / 3
    mask[..., 0, :] = shape[-2] == 1
    return mask


CASES = [
    attention("tiny_full", 5, 5),
    attention("tiny_causal", 4, 7, heads=4, causal=True),
    attention("tiny_key_mask", 3, 5, mask=some(2, 1, 1, 5), alpha=8.0, scale=0.3),
    attention("mask", 33, 20, heads=6, mask=some(2, 6, 33, 20), alpha=3.0),
    attention("causal_mask", 20, 37, causal=True, mask=some(20, 37)),
    attention("causal_tall", 9, 4, causal=True),  # the first queries see nothing
]
BY_LABEL = {case.label: case for case in CASES}


@each_impl(OP, CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_uncomputable(dtype, impl)
    assert_true(case, dtype, impl)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_is_sdpa(case: Case) -> None:
    """Whatever alpha is; a row that sees nothing is zeros, as SDPA's."""
    inputs, how = case.inputs(torch.float64), case.options
    queries, keys = inputs["query"].shape[2], inputs["key"].shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool) if how["mask"] is None else how["mask"]
    if how.get("causal"):
        mask = mask & patterns.causal(torch.arange(queries)[:, None], torch.arange(keys), queries, keys)
    out, weights = case(inputs, "reference")
    expected = F.scaled_dot_product_attention(*inputs.values(), attn_mask=mask, scale=how.get("scale"), enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    values = inputs["value"].repeat_interleave(out.shape[1] // 2, 1)
    torch.testing.assert_close(weights @ values, out, atol=1e-12, rtol=0)
    assert not (weights * ~mask).any()


@each_impl(OP)
def test_float16_does_not_overflow(impl: str) -> None:
    """Scores of 720000, each key there twice: half the weight each, where plain float16 attention is NaN."""
    device, generator = device_of(impl), torch.Generator().manual_seed(0)
    q, v, dout = (torch.randn(1, 2, n, 64, generator=generator).to(device, torch.float16) for n in (6, 12, 6))
    q = 300 * q.sign()
    q, k, v = (x.requires_grad_() for x in (q, q.repeat(1, 1, 2, 1), v))
    for plain in ((q / 8) @ k.mT, q @ k.mT / 8):
        assert plain.isinf().any()
        assert (plain.softmax(-1) @ v).isnan().any()
    out, weights = pb_relax_attention(q, k, v, return_weights=True, impl=impl)
    assert torch.equal(weights.cpu(), torch.eye(6).repeat(1, 2).expand(1, 2, 6, 12).half() / 2)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = F.scaled_dot_product_attention(*wide)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for mine, expected in zip((out, *grads), (truth, *torch.autograd.grad(truth, wide, dout.double())), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_masks(dtype: torch.dtype) -> None:
    """Added to the scores, as SDPA's, with a gradient; -inf and a dtype's lowest value hide a key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 7, 7))
    mask = torch.randn(2, 1, 6, 7, dtype=torch.float64)
    mask[0, 0, 2:4, 3], mask[1, 0, :, 6] = -math.inf, torch.finfo(torch.float64).min
    mask.requires_grad_()
    truth = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = torch.autograd.grad(truth.sin().sum(), (q, k, v, mask))
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    other = mask.detach().to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
    out, weights = pb_relax_attention(*low, mask=other, return_weights=True)
    assert (out.dtype, weights.dtype) == (dtype, dtype)
    assert not weights[0, :, 2:4, 3].any()
    assert not weights[1, :, :, 6].any()
    grads = torch.autograd.grad(out.double().sin().sum(), (*low, other))
    tolerance = 20 * torch.finfo(dtype).eps
    for mine, right in zip((out, *grads), (truth, *expected), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", [heads_last, gaps, packed])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_layouts(case: Case, layout: Any) -> None:
    inputs = layout(case.inputs(torch.float32))
    outputs, expected = case(inputs, "auto"), case({k: x.contiguous() for k, x in inputs.items()}, "auto")
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 2, 0)], ids=["no batch", "no heads", "no queries"])
def test_empty(sizes: tuple[int, int, int]) -> None:
    batch, heads, queries = sizes
    q, k = torch.empty(batch, heads, queries, 8, requires_grad=True), torch.empty(batch, heads, 5, 8)
    out, weights = pb_relax_attention(q, k, k, causal=True, return_weights=True)
    assert (out.shape, weights.shape) == (q.shape, (*q.shape[:3], 5))
    out.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    for case in (BY_LABEL["tiny_causal"], BY_LABEL["tiny_key_mask"]):
        compiled = torch.compile(lambda x, case=case: case(x, "auto"), fullgraph=True, dynamic=dynamic, backend="eager")
        inputs = case.inputs(torch.float32)
        for a, b in zip(compiled(inputs), case(inputs, "auto"), strict=True):
            assert torch.equal(a, b)


def test_autocast() -> None:
    case = BY_LABEL["tiny_causal"]
    inputs = case.inputs(torch.float32)
    inputs["value"] = inputs["value"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = case(inputs, "auto")
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16)
    expected = case({k: x.bfloat16() for k, x in inputs.items()}, "auto")
    assert torch.equal(out, expected[0])
    assert torch.equal(weights, expected[1])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("query", torch.ones(4, 3, 8), ValueError),
        ("key", torch.ones(2, 3, 5, 8), ValueError),  # 3 does not divide 4
        ("key", torch.ones(2, 2, 5, 8, dtype=torch.float64), TypeError),
        ("key", torch.ones(2, 2, 0, 8), ValueError),
        ("value", torch.ones(2, 2, 4, 8), ValueError),
        ("alpha", 0.0, ValueError),
        ("alpha", math.inf, ValueError),
        ("scale", math.nan, ValueError),
        ("mask", torch.ones(3, 5).int(), TypeError),
        ("mask", torch.ones(2, 3, 5, dtype=torch.bool), ValueError),
        ("impl", "fast", ValueError),
    ],
)
def test_arguments(name: str, value: Any, error: type[Exception]) -> None:
    key = value if name == "key" and not value.numel() else torch.ones(2, 2, 5, 8)
    arguments = {"query": torch.ones(2, 4, 3, 8), "key": key, "value": key}
    refused(pb_relax_attention, arguments, name, value, error)
