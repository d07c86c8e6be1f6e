"""merge_attentions: attention over a union of keys from attentions over its parts. (That the fused operators equal
their merged parts is tested with them.)"""

import math

import pytest
import torch
from torch import Tensor

from cogview_ops import merge_attentions, reference


def parts(count: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """q, k, v; a mask of disjoint sets [count, S, S] (every fifth row of each empty, row 0 of all); the truth."""
    torch.manual_seed(count)
    tensors = [torch.randn(2, 3, 11, 8, dtype=dtype).requires_grad_() for _ in range(3)]
    owner = torch.randint(count, (11, 11))
    masks = torch.stack([owner == n for n in range(count)])
    for n in range(count):
        masks[n, n::5] = False
    masks[:, 0] = False
    whole = reference.masked_attention(*tensors, masks.any(0), 0.0, 0.3)
    return tensors, masks, whole


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equals_joint_attention(count: int) -> None:
    tensors, masks, whole = parts(count)
    merged = merge_attentions(*zip(*(reference.masked_attention(*tensors, m, 0.0, 0.3) for m in masks), strict=True))
    assert (whole[1][:, :, 0] == -math.inf).all()
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
    weights = torch.randn(2, 3, 11, dtype=torch.float64)
    weights[:, :, 0] = 0  # d(-inf)

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        return (out.square().sum(-1) * weights).sum() + (lse.masked_fill(lse.isinf(), 0) * weights).sum()

    grads = [torch.autograd.grad(loss(*pair), tensors) for pair in (merged, whole)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_gradcheck() -> None:
    outputs = [torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: merge_attentions([a, b], [c, d]), (*outputs, *lses))
    assert torch.autograd.gradgradcheck(lambda a, b, c, d: merge_attentions([a, b], [c, d]), (*outputs, *lses))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_once(dtype: torch.dtype) -> None:
    """Weights and sums are float32; only the result is rounded, and keeps the outputs' dtype."""
    outputs = [torch.randn(2, 3, 50, 16).to(dtype) for _ in range(3)]
    lses = [torch.randn(2, 3, 50) * 5 for _ in range(3)]
    out, lse = merge_attentions(outputs, lses)
    truth, _ = merge_attentions([x.double() for x in outputs], [x.double() for x in lses])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 8e-7
    assert ((out - truth).abs() <= eps / 2 * truth.abs() + 2e-6).all()


def test_extreme_and_empty_parts() -> None:
    """A part without keys adds nothing, not even NaN, nor do lses that overflow exp."""
    out = torch.randn(1, 1, 4, 2)
    empty, none = torch.zeros(1, 1, 4, 2), torch.full((1, 1, 4), -math.inf)
    for size in (0.0, 5000.0, -5000.0):
        lse = torch.full((1, 1, 4), size).requires_grad_()
        merged, total = merge_attentions([out, empty], [lse, none])
        assert torch.equal(merged, out)
        assert torch.equal(total, lse)
        (grad,) = torch.autograd.grad(total.sum() + merged.sum(), lse)
        torch.testing.assert_close(grad, torch.ones_like(grad))
    none.requires_grad_()
    merged, total = merge_attentions([empty, empty], [none, none])
    assert (merged == 0).all()
    assert (total == -math.inf).all()
    assert (torch.autograd.grad(merged.sum(), none)[0] == 0).all()


def test_invalid_arguments() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for name, error, outputs, lses in (
        ("lses", ValueError, [out, out], [lse]),
        ("lses", ValueError, [], []),
        (r"outputs\[0\]", TypeError, [1.0], [lse]),
        (r"outputs\[1\]", TypeError, [out, out.int()], [lse, lse]),
        (r"outputs\[1\]", ValueError, [out, out[..., :3]], [lse, lse]),
        (r"lses\[1\]", TypeError, [out, out], [lse, lse.half()]),
        (r"lses\[0\]", ValueError, [out], [lse[..., :2]]),
    ):
        with pytest.raises(error, match=rf"^{name}: expected .+, got .+"):
            merge_attentions(outputs, lses)  # type: ignore[arg-type]
