"""`dilation` and `edge="shift"` of local_attention_2d are NATTEN's (arXiv 2204.07143, 2209.15001), case by case.

Compared with FlexAttention over a mask after NATTEN's own code, because NATTEN itself is no light dependency: `pip` has
no wheel of it and builds it against a torch of its own. Where it is installed, it is compared with too.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from common import DTYPES, assert_as_good_as, device_of, each_probe, interpreted
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cogview_ops import local_attention_2d

OP = "local_attention_2d"
TINY = ((3, 7), (3, 3), (1, 2))
WINDOWS = [  # grid, kernel, dilation
    ((6, 8), (3, 3), (1, 1)),
    ((6, 8), (5, 7), (1, 1)),
    ((9, 11), (3, 5), (3, 2)),
    ((9, 11), (3, 3), (2, 3)),
    ((7, 6), (7, 3), (1, 2)),
    TINY,
]


def natten_mask(grid: tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]) -> Callable[..., Tensor]:
    """A mask_mod: `natten::get_window_start` for each axis."""

    def start(index: Tensor, length: int, kernel: int, dilation: int) -> Tensor:
        reach, offset, whole = kernel // 2 * dilation, index % dilation, length // dilation * dilation
        rest = length - whole
        last = torch.where(offset < rest, whole + offset - 2 * reach, whole + offset - kernel * dilation)
        inner = torch.where(index + reach >= length, last, index - reach)
        return torch.where(index - reach < 0, offset, inner)

    def sees(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        steps = []
        for axis, (query, key) in enumerate(((i // grid[1], j // grid[1]), (i % grid[1], j % grid[1]))):
            steps.append((key - start(query, grid[axis], kernel[axis], dilation[axis]), kernel[axis], dilation[axis]))
        (y, kh, dh), (x, kw, dw) = steps
        return (y >= 0) & (y < kh * dh) & (y % dh == 0) & (x >= 0) & (x < kw * dw) & (x % dw == 0)

    return sees


@each_probe(OP, *DTYPES[2:], cuda=False)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_equals_flex_attention_with_its_mask(impl: str, dtype: torch.dtype) -> None:
    for grid, kernel, dilation in [TINY] if interpreted(impl) else WINDOWS:
        tokens, device = grid[0] * grid[1], device_of(impl)
        inputs = torch.randn(3, 2, 2, tokens, 16, device=device).to(dtype)
        sees = natten_mask(grid, kernel, dilation)
        pairs = sees(0, 0, torch.arange(tokens)[:, None], torch.arange(tokens))
        assert (pairs.sum(-1) == kernel[0] * kernel[1]).all()
        mine = partial(local_attention_2d, grid=grid, kernel_size=kernel, dilation=dilation, edge="shift", impl=impl)
        # FlexAttention has no gradients on CPU
        dense = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=pairs.to(device))
        dout = torch.randn_like(inputs[0])
        out, truth, formula = (
            results(f, x, dout) for f, x in ((mine, inputs), (dense, inputs.double()), (dense, inputs))
        )
        if dtype == torch.float64:
            blocks = create_block_mask(sees, None, None, tokens, tokens, device=device)
            flex: Any = flex_attention(*inputs, block_mask=blocks)
            torch.testing.assert_close(truth[0], flex, atol=1e-12, rtol=0)
        for triple in zip(out, truth, formula, strict=True):
            assert_as_good_as(*triple)


def results(f: Callable[..., Any], inputs: Tensor, dout: Tensor) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out))]


def test_equals_natten() -> None:
    functional = pytest.importorskip("natten.functional", reason="NATTEN is not installed")
    for grid, kernel in itertools.product(((6, 8), (9, 11)), ((3, 3), (3, 5), (5, 3))):
        for dilation in itertools.product(*(range(1, n // k + 1) for n, k in zip(grid, kernel, strict=True))):
            q, k, v = torch.randn(3, 1, 2, grid[0] * grid[1], 16).unbind()
            images = [x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v)]
            theirs = functional.na2d(*images, kernel_size=kernel, dilation=dilation).flatten(1, 2).transpose(1, 2)
            mine = local_attention_2d(
                q, k, v, grid=grid, kernel_size=kernel, dilation=dilation, edge="shift", impl="reference"
            )
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
