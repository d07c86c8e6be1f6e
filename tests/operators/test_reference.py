"""The reference attentions against torch's own attention under the patterns' masks (norms, softmax: their files)."""

import math
from typing import Any

import pytest
import torch
from cases import BY_LABEL, LOCAL_2D, THREE_REGION
from common import Case
from torch import Tensor

from cogview_ops import local_attention_2d_decode, patterns, reference, three_region_attention_decode


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`mask` [B, S, K], `bias` [B, H or 1, S, K]; torch's formula with -inf in the hidden entries, 0 where all are."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = bias.double().masked_fill(~mask[:, None], -math.inf)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=scores, scale=scale)
    return out.masked_fill(~mask.any(-1)[:, None, :, None], 0)


@pytest.mark.parametrize("case", THREE_REGION, ids=lambda case: case.label)
def test_three_region(case: Case) -> None:
    q, k, v = inputs = case.inputs(torch.float64).values()
    options, seqlen = case.options, q.shape[2]
    window, pivot = patterns.three_region_masks(
        torch.arange(seqlen)[None], seqlen, options["pivots"], options["block_size"], options["window_blocks"]
    )
    bias = (pivot * torch.tensor(options.get("pivot_bias", 0.0), dtype=torch.float64))[:, None]
    expected = sdpa(*inputs, window | pivot, bias, options.get("scale", q.shape[3] ** -0.5))
    out, lse = case({"query": q, "key": k, "value": v}, "reference")
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    # lse: with values of one, exp(-lse) times the sum of exponentials is one; shifting the scores shifts it
    shifted = case({"query": q, "key": k, "value": torch.ones_like(v)}, "reference")
    torch.testing.assert_close(shifted[0], torch.ones_like(out), atol=1e-12, rtol=0)
    assert torch.equal(shifted[1], lse)
    assert lse.shape == q.shape[:3]


@pytest.mark.parametrize("case", LOCAL_2D, ids=lambda case: case.label)
def test_local_2d(case: Case) -> None:
    inputs, options = case.inputs(torch.float64), case.options
    q, grid, kernel_size = inputs["query"], options["grid"], options["kernel_size"]
    i = torch.arange(q.shape[2])[:, None]
    masks: list[Tensor] = []
    keys: list[str] = []
    biases: list[Any] = []
    if kernel_size is not None:
        dilation = options.get("dilation", (1, 1))
        local = patterns.local_2d(
            i,
            i.T,
            grid=grid,
            kernel_size=kernel_size,
            dilation=dilation,
            edge=options.get("edge", "clip"),
            raster_causal=options.get("raster_causal", False),
        )
        local = local.expand(len(q), -1, -1)
        if "key_mask" in options:
            local = local & options["key_mask"][:, None]
        masks.append(local)
        keys.append("")
        biases.append(_table(inputs.get("bias"), i, grid, kernel_size, dilation))
    if "prefix_key" in inputs:
        count = inputs["prefix_key"].shape[2]
        mask = options.get("prefix_mask", torch.ones(len(q), count, dtype=torch.bool))
        masks.append(mask[:, None].expand(len(q), len(i), -1))
        keys.append("prefix_")
        biases.append(options.get("prefix_bias", 0.0))
    if "coarse_key" in inputs:
        coarse, kernel = options["coarse_grid"], options["coarse_kernel_size"]
        cells = torch.arange(coarse[0] * coarse[1])
        near = patterns.coarse_2d(i, cells, grid=grid, coarse_grid=coarse, kernel_size=kernel)
        masks.append(near.expand(len(q), -1, -1))
        keys.append("coarse_")
        biases.append(options.get("coarse_bias", 0.0))
    key, value = (torch.cat([inputs[name + kind] for name in keys], 2) for kind in ("key", "value"))
    full = (len(q), q.shape[1], len(i))
    bias = torch.cat(
        [
            torch.as_tensor(b, dtype=torch.float64).expand(*full, m.shape[-1])
            for m, b in zip(masks, biases, strict=True)
        ],
        -1,
    )
    expected = sdpa(q, key, value, torch.cat(masks, -1), bias, options.get("scale", q.shape[3] ** -0.5))
    torch.testing.assert_close(case(inputs, "reference")[0], expected, atol=1e-12, rtol=0)


def _table(table: Tensor | None, i: Tensor, grid: Any, kernel: Any, dilation: Any) -> Any:
    """Of each pair of an image its entry in a table [heads, 2kh-1, 2kw-1], wherever there is one."""
    if table is None:
        return 0.0
    size = torch.tensor(kernel)[:, None, None]
    place = torch.stack((i // grid[1], i % grid[1]))
    y, x = ((place.mT - place) // torch.tensor(dilation)[:, None, None] + size - 1).clamp(min=0).minimum(2 * size - 2)
    return table[:, y, x]


def test_log_sum_exp() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind()
    mask = torch.ones(6, 6).tril().bool()
    _, lse = reference.masked_attention(q, k, v, mask, 0.25, 0.5)
    scores = (0.5 * q @ k.mT + 0.25).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), atol=1e-12, rtol=0)


def test_rows_without_keys() -> None:
    """Zeros, -inf, and zero gradient, from a mask or from no keys at all; what nobody sees may be NaN."""
    mask = torch.tensor([[True, True, False], [False, False, False]])
    k = torch.randn(1, 2, 3, 4)
    k[:, :, 2] = torch.nan
    leaves = [torch.randn(1, 2, 2, 4).requires_grad_(), k.clone().requires_grad_(), k.clone().requires_grad_()]
    out, lse = reference.masked_attention(*leaves, mask, 0.0, 1.0)
    assert (out[:, :, 1] == 0).all()
    assert (lse[:, :, 1] == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 0].sum(), leaves)
    assert (grads[0][:, :, 1] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    assert all((g[:, :, 2] == 0).all() for g in grads[1:])
    out, lse = reference.masked_attention(leaves[0], k[:, :, :0], k[:, :, :0], torch.ones(2, 0).bool(), 0.0, 1.0)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("label", ["text_pivots", "block_of_one"])
def test_three_region_decode_is_a_row_of_the_whole(label: str) -> None:
    case = BY_LABEL[label]
    q, k, v = case.inputs(torch.float64).values()
    full = case({"query": q, "key": k, "value": v}, "reference")
    options = {name: x for name, x in case.options.items() if name != "pivots"}
    for end in (1, 17, 40, q.shape[2]):
        past = [torch.where(torch.arange(q.shape[2])[:, None] < end, x, torch.nan) for x in (k, v)]
        lens = torch.full((len(q),), end)
        outputs = three_region_attention_decode(
            q[:, :, end - 1 : end], *past, case.options["pivots"], lens, **options, impl="reference"
        )
        for mine, whole in zip(outputs, full, strict=True):
            torch.testing.assert_close(mine, whole[:, :, end - 1 : end], atol=1e-12, rtol=0)


def test_local_2d_decode_is_a_row_of_the_whole() -> None:
    case = BY_LABEL["all_sets"]
    inputs = case.inputs(torch.float64)
    full = case(inputs, "reference")[0]
    q, k, v = (inputs.pop(name) for name in ("query", "key", "value"))
    options = {name: x for name, x in case.options.items() if name not in ("return_lse", "raster_causal")}
    for end in (1, 9, 48):
        past = [torch.where(torch.arange(48)[:, None] < end, x, torch.nan) for x in (k, v)]
        lens = torch.full((len(q),), end)
        out = local_attention_2d_decode(q[:, :, end - 1 : end], *past, lens, **inputs, **options, impl="reference")
        torch.testing.assert_close(out, full[:, :, end - 1 : end], atol=1e-12, rtol=0)


@pytest.mark.parametrize("label", ["two_tokens", "itself_only"])
def test_second_derivatives(label: str) -> None:
    case = BY_LABEL[label]
    small = case._replace(shapes={k: (1, s[1], s[2], 2) for k, s in case.shapes.items()})
    if "pivots" in small.options:
        small = small._replace(options={**small.options, "pivots": small.options["pivots"][:1]})
    leaves = [x.requires_grad_() for x in small.inputs(torch.float64).values()]
    assert torch.autograd.gradgradcheck(lambda *x: small(dict(zip(small.shapes, x, strict=True)), "reference"), leaves)
