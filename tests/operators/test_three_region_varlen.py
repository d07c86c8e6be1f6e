"""three_region_attention_varlen: truth, mask, the batch form, neighbours, arguments. What all operators share is in
test_operators.py."""

import itertools
import math
from typing import Any

import pytest
import torch
from cases import BY_LABEL, VARLEN, some_pivots, varlen
from common import (
    DTYPES,
    Case,
    assert_bitwise,
    assert_probed,
    assert_true,
    computable,
    device_of,
    each_impl,
    each_probe,
    every_isa,
    identity,
    interpreted,
    narrow_only,
    refused,
    results,
    run,
    skip_slow,
    skip_uncomputable,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cogview_ops import (
    patterns,
    sample_pivots,
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)

OP, BATCH = "three_region_attention_varlen", "three_region_attention"
SOME = [BY_LABEL[x] for x in ("packed", "packed_empty_ends", "packed_uneven", "packed_32", "tiny_packed")]
NAMES = ("query", "key", "value")


def spans(case: Case) -> list[tuple[int, int]]:
    """Begin and end of each sequence."""
    return list(itertools.pairwise(case.options["cu_seqlens"].tolist()))


def heads_first(x: Tensor) -> Tensor:
    """[S, H, D], or [H, S] of lse, as a batch of one."""
    return (x.transpose(0, 1) if x.dim() == 3 else x)[None]


def of_batch(case: Case, inputs: dict[str, Tensor], n: int, impl: str) -> tuple[Case, dict[str, Tensor]]:
    """Sequence n as a call of the batch form."""
    begin, end = spans(case)[n]
    options = {k: x for k, x in case.options.items() if k not in ("cu_seqlens", "max_seqlen")}
    options["pivots"] = options["pivots"][n : n + 1]
    alone = {name: heads_first(inputs[name][begin:end]) for name in NAMES}
    return Case(BATCH, case.label, {k: tuple(x.shape) for k, x in alone.items()}, options), alone


@each_impl(OP, VARLEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_slow(impl, unless=case.label == "tiny_packed" or dtype == torch.float32)
    assert_true(case, dtype, impl)


@each_impl(OP, SOME)
@pytest.mark.parametrize("output", [0, 1], ids=["dout", "dlse"])
def test_truth_with_one_gradient(impl: str, case: Case, output: int) -> None:
    skip_slow(impl, unless=output == 1)
    assert_true(case, computable(torch.float32, impl, OP), impl, [output])


@every_isa
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, case: Case, dtype: torch.dtype) -> None:
    assert_true(case, dtype, "cpp")


@each_impl(OP, [x for x in VARLEN if x.label != "packed_zero_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_batch_form_of_each_sequence(impl: str, case: Case, dtype: torch.dtype) -> None:
    """On CPU the forward to the bit; gradients are summed up in another order."""
    skip_slow(impl, unless=case.label == "tiny_packed")
    skip_uncomputable(dtype, impl, OP)
    inputs = case.inputs(dtype, device_of(impl))
    (out, lse), grads = run(case, inputs, impl)
    generator = torch.Generator().manual_seed(0)
    douts = [torch.randn(x.shape, generator=generator).to(x) for x in (out, lse)]  # as run() has them
    for n, (begin, end) in enumerate(spans(case)):
        if begin == end:
            continue
        single, alone = of_batch(case, inputs, n, impl)
        leaves = {k: x.detach().requires_grad_() for k, x in alone.items()}
        expected = single(leaves, impl)
        mine = heads_first(out[begin:end]), heads_first(lse[:, begin:end])
        exact = {} if impl == "cpp" else {"rtol": 32 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), **exact or {"rtol": 0, "atol": 0})
        douts_alone = [heads_first(douts[0][begin:end]), heads_first(douts[1][:, begin:end])]
        theirs = torch.autograd.grad(expected, list(leaves.values()), douts_alone)
        eps = torch.finfo(dtype).eps
        for name, grad in zip(NAMES, theirs, strict=True):
            size = grad.abs().max().item()
            torch.testing.assert_close(heads_first(grads[name][begin:end]), grad, rtol=4 * eps, atol=4 * eps * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_lengths_are_a_batch_to_the_bit(dtype: torch.dtype) -> None:
    """Forward and backward: the work is cut alike."""
    case = varlen("equal", (200, 200, 200), 16, 16, 2, heads=4, kv_heads=2, pivot_bias=0.5)
    inputs = case.inputs(dtype)
    batch = case._replace(
        op=BATCH, options={k: x for k, x in case.options.items() if k != "cu_seqlens"},
        shapes={k: (3, s[1], 200, s[2]) for k, s in case.shapes.items()},
    )  # fmt: skip
    rows = {k: x.unflatten(0, (3, 200)).transpose(1, 2).detach().requires_grad_() for k, x in inputs.items()}
    leaves = {k: x.detach().requires_grad_() for k, x in inputs.items()}
    mine, expected = case(leaves, "cpp"), batch(rows, "cpp")
    as_batch = [mine[0].unflatten(0, (3, 200)).transpose(1, 2), mine[1].unflatten(1, (3, 200)).transpose(0, 1)]
    assert_bitwise(as_batch, list(expected))
    douts = [torch.randn_like(x) for x in expected]
    theirs = torch.autograd.grad(expected, list(rows.values()), douts)
    ours = torch.autograd.grad(as_batch, list(leaves.values()), douts)
    assert_bitwise([x.unflatten(0, (3, 200)).transpose(1, 2) for x in ours], list(theirs))


# --- the mask, entry by entry ----------------------------------------------------------------------------------------


def packed_pivots(lengths: tuple[int, ...], kinds: tuple[str, ...]) -> Tensor:
    """Of each sequence another kind."""
    pivots = torch.full((len(lengths), max(lengths) + 5), -1)
    for row, length, kind in zip(pivots, lengths, itertools.cycle(kinds), strict=False):
        some = some_pivots(kind, 1, length)[0] if length else row[:0]
        row[: len(some)] = some
    return pivots


def probe(impl: str, dtype: torch.dtype, lengths: tuple[int, ...], block_size: int, window_blocks: int) -> None:
    """Weights, read from the output and from each gradient, are the pattern over its row sum: see
    test_three_region_attention."""
    total, bias, device = sum(lengths), 0.5, device_of(impl)
    ends = torch.tensor((0, *lengths)).cumsum(0)
    pivots = packed_pivots(lengths, ("all", "text", "long"))
    window, pivot = patterns.three_region_packed_masks(pivots, ends, total, block_size, window_blocks)
    weights = window.double() + pivot.double() * math.exp(bias)
    weights = weights / weights.sum(-1, keepdim=True)
    eye, dlse = identity(total, impl), torch.arange(1.0, total + 1, dtype=torch.float64)
    dscores = weights * (torch.eye(total) - weights.diagonal()[:, None] + dlse[:, None])

    def tensor(x: Tensor) -> Tensor:
        return x.to(device, dtype)[:, None].contiguous().requires_grad_()

    for q, k in ((torch.zeros_like(eye), eye), (eye, torch.zeros_like(eye))):
        query, key, value = tensor(q), tensor(k), tensor(eye)
        out, lse = three_region_attention_varlen(
            query, key, value, pivots.to(device), ends.to(device), block_size=block_size, window_blocks=window_blocks,
            pivot_bias=bias, scale=1.0, return_lse=True, impl=impl,
        )  # fmt: skip
        torch.autograd.backward([out, lse], [tensor(eye).detach(), dlse.to(lse).expand_as(lse)])
        where = f"lengths {lengths}, block {block_size}, window {window_blocks}"
        got = [("output", out, weights), ("dv", value.grad, weights.mT)]
        got += [("dq", query.grad, dscores)] if k is eye else [("dk", key.grad, dscores.mT)]
        for name, actual, expected in got:
            assert actual is not None
            assert_probed(actual[:, 0], expected @ eye, f"{name}: {where}")


@each_probe(OP)
def test_mask_exhaustively(impl: str, dtype: torch.dtype) -> None:
    """Every pair of a short sequence and another one, between empty ones."""
    table = list(itertools.product(range(8), (1, 5, 9), (1, 2, 3, 4), (1, 2)))
    chosen = slice(100, 101) if interpreted(impl) else slice(None, None, 29 if impl == "cuda" else 1)
    for first, second, block_size, window_blocks in table[chosen]:
        probe(impl, dtype, (0, first, 0, second, 0), block_size, window_blocks)


@each_probe(OP)
@pytest.mark.parametrize(
    ("lengths", "block_size", "window_blocks"),
    [((67, 1, 130), 16, 1), ((64, 64, 64), 64, 1), ((3, 150), 3, 5), ((65, 63, 2), 1, 1)],
)
def test_mask_across_tiles(
    impl: str, dtype: torch.dtype, lengths: tuple[int, ...], block_size: int, window_blocks: int
) -> None:
    skip_slow(impl)
    probe(impl, dtype, lengths, block_size, window_blocks)


@each_probe(OP)
def test_gradcheck(impl: str, dtype: torch.dtype) -> None:
    skip_slow(impl)
    if narrow_only(OP, impl):
        pytest.skip("no kernel for heads of 3")
    case = varlen("gradcheck", (7, 0, 1, 4), 3, 2, 1, heads=2, kv_heads=1, pivot_bias=0.3)
    if dtype != torch.float64:
        return assert_true(case, dtype, impl)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64, device_of(impl)).values()]
    assert torch.autograd.gradcheck(lambda *x: case(dict(zip(NAMES, x, strict=True)), impl), leaves)


# --- neighbours ------------------------------------------------------------------------------------------------------


@each_impl(OP)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_sequence(impl: str, dtype: torch.dtype) -> None:
    """Forward and backward: every other sequence is as if it were not there."""
    if impl != "cpp":
        pytest.skip("on GPUs it reaches what shares a tile with it")
    case = varlen("poisoned", (20, 70, 0, 3, 130), 16, 16, 1, "all", heads=2, kv_heads=1)
    inputs = case.inputs(dtype)
    clean = results(case, inputs, impl)
    for n, bad in itertools.product((1, 3), (math.nan, math.inf)):
        begin, end = spans(case)[n]
        spoiled = {k: x.clone() for k, x in inputs.items()}
        for x in spoiled.values():
            x[begin:end] = bad
        rest = torch.ones(len(inputs["query"]), dtype=torch.bool)
        rest[begin:end] = False
        for k, (mine, expected) in enumerate(zip(results(case, spoiled, impl), clean, strict=True)):
            at = (slice(None), rest) if k == 1 else rest  # lse is [H, total]
            assert torch.equal(mine[at], expected[at]), k


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side: str) -> None:
    """Their tokens taken out, and put back: each row is what it is alone, whatever the padding holds."""
    lengths, room = torch.tensor([9, 40, 1, 25]), 40
    place = torch.arange(room)
    real = place >= room - lengths[:, None] if side == "left" else place < lengths[:, None]
    x = torch.randn(4, room, 2, 8).masked_fill(~real[..., None, None], math.nan)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    pivots = sample_pivots((place < 3).expand(4, -1)[real], (place >= 3).expand(4, -1)[real], 44, cu_seqlens=ends)
    packed = x[real]
    out = torch.zeros_like(x)
    out[real] = three_region_attention_varlen(packed, packed, packed, pivots, ends, block_size=4, window_blocks=2)
    assert not out[~real].any()
    for row in range(4):
        alone = heads_first(x[row][real[row]])
        expected = three_region_attention(alone, alone, alone, pivots[row : row + 1, : lengths[row]], block_size=4,
                                          window_blocks=2)  # fmt: skip
        torch.testing.assert_close(heads_first(out[row][real[row]]), expected)


@each_impl(OP)
def test_offsets_beyond_32_bits(impl: str) -> None:
    """Heads, and tokens, lie 2**31 elements apart."""
    skip_slow(impl)
    case = varlen("far", (2, 1), 32, 2, 1, "all", heads=2, kv_heads=2)
    inputs = case.inputs(computable(torch.bfloat16, impl), device_of(impl))
    x = inputs["key"]
    for strides in ((2**31, 32, 1), (32, 2**31, 1)):
        far = torch.empty(2**32 + 2**10, dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
        assert_bitwise(results(case, {**inputs, "key": far.copy_(x)}, impl), results(case, inputs, impl))


@each_impl(OP, [BY_LABEL[x] for x in ("packed", "packed_32", "tiny_packed")])
def test_indices_in_any_form(impl: str, case: Case) -> None:
    """max_seqlen, the dtype of indices, and their strides change nothing."""
    skip_slow(impl, unless=case.label == "tiny_packed")
    inputs = case.inputs(computable(torch.float32, impl, OP), device_of(impl))
    expected, options = results(case, inputs, impl), case.options
    longest = max(end - begin for begin, end in spans(case))
    table: list[dict[str, Any]] = [
        {"max_seqlen": longest},
        {"max_seqlen": 2**40},
        {"max_seqlen": None},
        {"cu_seqlens": options["cu_seqlens"].long(), "pivots": options["pivots"].int()},
        {"cu_seqlens": options["cu_seqlens"].int(), "pivots": options["pivots"].long()},
        {"cu_seqlens": options["cu_seqlens"].repeat_interleave(2)[::2], "pivots": options["pivots"].T.clone().T},
    ]
    for changed in table[:: 3 if interpreted(impl) else 1]:
        assert_bitwise(results(case._replace(options=options | changed), inputs, impl), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uneven_work_on_any_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    """One long sequence before many short ones, with keys so long that rows need a maximum in the middle."""
    case = varlen("threads", (700, *(20,) * 40, 0, 300), 16, 16, 2, heads=4, kv_heads=2, pivot_bias=0.5)
    inputs = case.inputs(dtype)
    inputs["key"][350:] *= 20
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        found.append(results(case, inputs, "cpp"))
        assert_bitwise(found[-1], found[0])


# --- arguments -------------------------------------------------------------------------------------------------------

Q, KV = torch.zeros(12, 4, 8), torch.zeros(12, 2, 8)
ENDS = torch.tensor([0, 5, 5, 12])
GOOD = torch.tensor([[0, 4, -1], [-1, -1, -1], [1, 2, 6]])
INVALID: list[tuple[str, Any, type[Exception], str]] = [
    ("query", 1.0, TypeError, "a tensor, got float"),
    ("query", Q[None], ValueError, r"3 dimensions \[total, H, D\], got shape \(1, 12, 4, 8\)"),
    ("query", Q.int(), TypeError, "dtype"),
    ("query", Q.mT.contiguous().mT, ValueError, "a contiguous last dimension"),
    ("query", Q[..., :0], ValueError, "head_dim at least 1, got 0"),
    *((name, x, error, text) for name in ("key", "value") for x, error, text in (
        (None, TypeError, "a tensor, got NoneType"),
        (KV.double(), TypeError, "query's dtype torch.float32, got torch.float64"),
        (KV[..., ::2], ValueError, "a contiguous last dimension"),
        (KV.to("meta"), ValueError, "query's device cpu, got meta"),
    )),
    ("key", KV[:11], ValueError, r"12 tokens and head_dim 8 as query, got shape \(11, 2, 8\)"),
    ("key", KV[..., :7], ValueError, "12 tokens and head_dim 8 as query"),
    ("key", torch.zeros(12, 3, 8), ValueError, "a number of heads that divides query's 4, got 3"),
    ("key", KV[:, :0], ValueError, "a number of heads that divides query's 4, got 0"),
    ("value", KV[:, :1], ValueError, r"shape \(12, 2, 8\), got \(12, 1, 8\)"),
    ("cu_seqlens", [0, 12], TypeError, "a tensor, got list"),
    ("cu_seqlens", ENDS.float(), TypeError, "dtype int32 or int64, got float32"),
    ("cu_seqlens", ENDS[None], ValueError, "1 dimensions"),
    ("cu_seqlens", ENDS[:0], ValueError, r"shape \[sequences \+ 1\], got \(0,\)"),
    ("cu_seqlens", ENDS.to("meta"), ValueError, "query's device cpu, got meta"),
    ("cu_seqlens", torch.tensor([0, 7, 5, 12]), ValueError, r"values that ascend, got \[0, 7, 5, 12\]"),
    ("cu_seqlens", torch.tensor([0, -1, 5, 12]), ValueError, "values that ascend"),
    ("cu_seqlens", torch.tensor([1, 5, 5, 12]), ValueError, "values from 0 to 12, got 1 to 12"),
    ("cu_seqlens", torch.tensor([0, 5, 5, 11]), ValueError, "values from 0 to 12, got 0 to 11"),
    ("cu_seqlens", torch.tensor([0, 5, 5, 13]), ValueError, "values from 0 to 12, got 0 to 13"),
    ("max_seqlen", 6, ValueError, "at least the 7 tokens of the longest sequence, got 6"),
    ("max_seqlen", -1, ValueError, "at least 0, got -1"),
    ("max_seqlen", 7.0, TypeError, "an int, got float"),
    ("pivots", GOOD[:2], ValueError, r"shape \[3, P\], got \(2, 3\)"),
    ("pivots", GOOD[0], ValueError, "2 dimensions"),
    ("pivots", GOOD.float(), TypeError, "dtype int32 or int64"),
    ("pivots", torch.tensor([[0, 5, -1], [-1] * 3, [1, 2, 6]]), ValueError, r"indices below 5 \(sequence 0\) or -1"),
    ("pivots", torch.tensor([[0, 4, -1], [0, -1, -1], [1, 2, 6]]), ValueError, r"below 0 \(sequence 1\) or -1"),
    ("pivots", torch.tensor([[0, 4, -2], [-1] * 3, [1, 2, 6]]), ValueError, "strictly ascending rows"),
    ("pivots", torch.tensor([[-2, -1, -1], [-1] * 3, [1, 2, 6]]), ValueError, "strictly ascending rows|or -1"),
    ("pivots", torch.tensor([[4, 0, -1], [-1] * 3, [1, 2, 6]]), ValueError, "strictly ascending rows"),
    ("block_size", 0, ValueError, "at least 1"),
    ("window_blocks", None, TypeError, "an int"),
    ("pivot_bias", math.inf, ValueError, "a finite number"),
    ("scale", "1", TypeError, "a number"),
    ("impl", "gpu", ValueError, "'auto' or"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments(impl: str) -> None:
    arguments = dict(zip(NAMES, (Q, KV, KV), strict=True)) | {"pivots": GOOD, "cu_seqlens": ENDS, "impl": impl}
    assert three_region_attention_varlen(**arguments).shape == Q.shape  # type: ignore[arg-type, union-attr]
    for name, value, error, text in INVALID:
        refused(three_region_attention_varlen, arguments, name, value, error)
        with pytest.raises(error, match=f"^{name}: expected .*{text}"):
            three_region_attention_varlen(**{**arguments, name: value})  # type: ignore[arg-type]


def test_indices_are_looked_at_in_every_call() -> None:
    """Also where they changed in place, and where nobody checks before."""
    pivots, ends, pads = GOOD.clone(), ENDS.clone(), torch.zeros(2, dtype=torch.int64)
    cache, lens = torch.zeros(2, 2, 12, 8), torch.tensor([12, 9])
    ops = torch.ops.cogview_ops
    calls: list[tuple[Any, Any]] = [
        (lambda: three_region_attention_varlen(Q, KV, KV, pivots, ends),
         lambda: ops.three_region_attention_varlen_fwd(Q, KV, KV, pivots, ends, 12, 128, 6, 0.0, 1.0)),
        (lambda: three_region_attention_decode(cache, cache, cache, pivots[:2], lens, cache_leftpad=pads),
         lambda: ops.three_region_attention_decode(cache, cache, cache, pivots[:2], lens, 128, 6, 0.0, 1.0, pads)),
    ]  # fmt: skip
    lens[:] = 12
    changes: list[tuple[int, Tensor, Any, str]] = [
        (0, ends, torch.tensor([0, 6, 5, 12]), "cu_seqlens"),
        (0, ends, torch.tensor([0, 5, 5, 2**40]), "cu_seqlens"),
        (0, pivots, torch.tensor([[0, 5, -1], [-1] * 3, [1, 2, 6]]), "pivots"),
        (1, pads, torch.tensor([0, 13]), "cache_leftpad"),
        (1, pads, torch.tensor([-1, 0]), "cache_leftpad"),
    ]
    for at, x, bad, name in changes:
        public, inner = calls[at]
        good = x.clone()
        public()
        x.data[:] = bad
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            public()
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            inner()
        x.data[:] = good
    with pytest.raises(RuntimeError, match="max_seqlen: expected at least the longest length"):
        ops.three_region_attention_varlen_fwd(Q, KV, KV, pivots, ends, 6, 128, 6, 0.0, 1.0)


@pytest.mark.parametrize("name", ["pivots", "cu_seqlens"])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (1, 3), (), (0,)], ids=str)
def test_indices_of_any_shape_are_safe_below_the_checks(name: str, shape: tuple[int, ...]) -> None:
    """torch.ops takes shapes that the public function refuses."""
    given = {"pivots": GOOD, "cu_seqlens": ENDS, name: torch.zeros(shape, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=r"(pivots|cu_seqlens): (shape does not match|expected values)"):
        torch.ops.cogview_ops.three_region_attention_varlen_fwd(Q, KV, KV, *given.values(), 12, 16, 1, 0.0, 1.0)


def test_contents_are_not_read_on_other_devices() -> None:
    out = three_region_attention_varlen(*(x.to("meta") for x in (Q, KV, KV, GOOD + 7, ENDS + 7)), impl="reference")
    assert out.shape == Q.shape  # type: ignore[union-attr]


def pairs(case: Case) -> int:
    masks = patterns.three_region_packed_masks(
        case.options["pivots"], case.options["cu_seqlens"], len(case.inputs(torch.float32)["query"]),
        case.options["block_size"], case.options["window_blocks"],
    )  # fmt: skip
    return int((masks[0] | masks[1]).sum())


@pytest.mark.parametrize("case", VARLEN, ids=lambda case: case.label)
def test_flops_are_an_upper_bound(case: Case) -> None:
    """Of all sequences of so many tokens, and exact for one."""
    lengths = [end - begin for begin, end in spans(case)]
    _, heads, dim = case.shapes["query"]
    counts = []
    for longest in (None, max(lengths)):
        told = case._replace(options={**case.options, "max_seqlen": longest})
        with FlopCounterMode(display=False) as counter:
            run(told, case.inputs(torch.float32), "cpp")
        counts.append(counter.get_total_flops())
    seen = 4 * heads * dim * pairs(case)
    assert counts[0] >= counts[1] >= seen + seen * 5 // 2
    if case.label == "packed_one":
        assert counts == [seen + seen * 5 // 2] * 2


def test_flops_of_equal_lengths() -> None:
    case = varlen("equal", (32, 32, 32), 8, 16, 1, "all", max_seqlen=32)
    with FlopCounterMode(display=False) as counter:
        case(case.inputs(torch.float32), "cpp")
    assert counter.get_total_flops() == 4 * 2 * 8 * 3 * (32 * 33 // 2)
