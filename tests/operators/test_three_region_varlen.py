"""three_region_attention_varlen, left-padded decoding and pivots of packed sequences: truth, mask, the batch form,
neighbours, arguments. What all operators share is in test_operators.py."""

import itertools
import math
from typing import Any

import pytest
import torch
from cases import BY_LABEL, VARLEN, some_pivots, varlen
from common import (
    DTYPES,
    Case,
    assert_as_good_as,
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
from torch._dynamo.testing import CompileCounterWithBackend
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


# --- left-padded caches ----------------------------------------------------------------------------------------------


@each_impl("three_region_attention_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 70])
def test_decode_of_left_padded_caches_equals_varlen(impl: str, dtype: torch.dtype, steps: int) -> None:
    """Token by token or several at once, of which some may stand in the padding and give 0; what lies before the
    sequences and behind them is NaN."""
    skip_uncomputable(dtype, impl)
    skip_slow(impl, unless=(steps, dtype) == (3, torch.float16))
    lengths, capacity, device = (130, 41, 90), 150, device_of(impl)
    case = varlen("leftpad", lengths, 16, 16, 2, heads=4, kv_heads=2, pivot_bias=0.4)
    options = {k: case.options[k] for k in ("block_size", "window_blocks", "pivot_bias")}
    inputs = case.inputs(dtype, device)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")[0]
    formula, pivots = case(inputs, "reference")[0], case.options["pivots"].to(device)
    for end in (steps, 100, 139) if not interpreted(impl) else (100,):  # the cache is filled up to here
        begins = [139 - length for length in lengths]
        caches = [x.new_full((3, 2, capacity, 16), math.nan) for x in (inputs["key"], inputs["value"])]
        query = torch.randn(3, 4, steps, 16, device=device).to(dtype)
        expected = [torch.zeros(3, 4, steps, 16, device=device, dtype=x.dtype) for x in (truth, formula)]
        for b, (begin, (first, _)) in enumerate(zip(begins, spans(case), strict=True)):
            there = max(0, end - begin)  # tokens of the sequence
            for cache, name in zip(caches, ("key", "value"), strict=True):
                cache[b, :, begin : begin + there] = inputs[name][first : first + there].transpose(0, 1)
            new = min(steps, there)
            last = slice(first + there - new, first + there)
            query[b, :, steps - new :] = inputs["query"][last].transpose(0, 1)
            for mine, whole in zip(expected, (truth, formula), strict=True):
                mine[b, :, steps - new :] = whole[last].transpose(0, 1)
        ends, pads = torch.full((3,), end, device=device), torch.tensor(begins, device=device).clamp(max=end)
        for impls in (impl, "reference"):
            out = three_region_attention_decode(query, *caches, pivots, ends, cache_leftpad=pads, **options, impl=impls)
            assert_as_good_as(out, *expected, f"cache up to {end}, {impls}")


@each_impl("three_region_attention_decode")
def test_no_padding_is_as_none_given(impl: str) -> None:
    case = BY_LABEL["three_region_decode"]
    inputs = case.inputs(torch.float32, device_of(impl))
    padded = case._replace(options={**case.options, "cache_leftpad": torch.zeros(2, dtype=torch.int32)})
    assert torch.equal(case(inputs, impl)[0], padded(inputs, impl)[0])


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padded_decode_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    case = BY_LABEL["three_region_decode_leftpad"]
    inputs = case.inputs(dtype)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")
    assert_as_good_as(case(inputs, "cpp")[0], truth[0], case(inputs, "reference")[0])


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


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_padding(impl: str) -> None:
    cache = torch.zeros(2, 2, 12, 8)
    arguments = {"query": torch.zeros(2, 4, 2, 8), "key_cache": cache, "value_cache": cache, "pivots": GOOD[:2]}
    arguments |= {"cache_seqlens": torch.tensor([12, 9]), "impl": impl}  # type: ignore[dict-item]
    table: list[tuple[Any, type[Exception], str]] = [
        (3, TypeError, "a tensor, got int"),
        (torch.zeros(2), TypeError, "dtype int32 or int64, got float32"),
        (torch.zeros(1, dtype=torch.int32), ValueError, r"shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 1, dtype=torch.int32), ValueError, "1 dimensions"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), ValueError, "query's device cpu, got meta"),
        (torch.tensor([0, -1]), ValueError, r"places from 0 to cache_seqlens \[12, 9\], got \[0, -1\]"),
        (torch.tensor([0, 10]), ValueError, r"places from 0 to cache_seqlens \[12, 9\], got \[0, 10\]"),
    ]
    for value, error, text in table:
        with pytest.raises(error, match=f"^cache_leftpad: expected .*{text}"):
            three_region_attention_decode(**arguments, cache_leftpad=value)  # type: ignore[arg-type]


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


# --- pivots ----------------------------------------------------------------------------------------------------------

ROWS = ("tttiiiiiiiiiiiiiiiii", "", "tttttttt....iiiiiiii", "iiii", ".....", "titititititititititi", "")
TEXT, IMAGE = (torch.tensor([c == kind for c in "".join(ROWS)]) for kind in "ti")
BEGINS = torch.tensor([0, *itertools.accumulate(map(len, ROWS))])


@pytest.mark.parametrize("count", [10, 11, 19, 20, 30])
def test_what_is_drawn(count: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        pivots = sample_pivots(TEXT, IMAGE, count, cu_seqlens=BEGINS, generator=generator)
        assert pivots.shape == (len(ROWS), count)
        assert pivots.dtype == torch.int32
        for row, drawn in zip(ROWS, pivots.tolist(), strict=True):
            chosen = [p for p in drawn if p >= 0]
            assert drawn == chosen + [-1] * (count - len(chosen))
            assert chosen == sorted(set(chosen))
            assert {p for p, kind in enumerate(row) if kind == "t"} <= set(chosen)
            assert all(row[p] in "ti" for p in chosen)
            assert len(chosen) == min(count, sum(kind in "ti" for kind in row))
    other = sample_pivots(TEXT, IMAGE, 10, cu_seqlens=BEGINS, generator=torch.Generator().manual_seed(9))
    again = sample_pivots(TEXT, IMAGE, 10, cu_seqlens=BEGINS.int(), generator=torch.Generator().manual_seed(9))
    assert torch.equal(other, again)


def test_every_image_token_is_equally_likely() -> None:
    row, draws, count = "tttt" + "i" * 16 + "....", 4000, 10
    text, image = (torch.tensor([c == kind for c in row]).repeat(draws) for kind in "ti")
    ends = torch.arange(draws + 1) * len(row)
    pivots = sample_pivots(text, image, count, cu_seqlens=ends, generator=torch.Generator().manual_seed(0))
    frequency = torch.zeros(24).index_add_(0, pivots.flatten().long(), torch.ones(draws * count)) / draws
    assert (frequency[:4] == 1).all()
    assert (frequency[20:] == 0).all()
    p = 6 / 16
    assert ((frequency[4:20] - p).abs() < 5 * (p * (1 - p) / draws) ** 0.5).all()
    together = ((pivots == 4).any(1) & (pivots == 19).any(1)).float().mean()
    assert abs(together - 6 / 16 * 5 / 15) < 0.03


def test_drawing_never_waits_for_the_device() -> None:
    """One graph, then one for all sizes, and nothing read from the tensors: on a GPU there is no synchronisation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample_pivots, fullgraph=True, backend=counter)
    for n in range(2, 6):
        lengths = BEGINS.diff().repeat(n)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        pivots = compiled(TEXT.repeat(n), IMAGE.repeat(n), 10 + n, cu_seqlens=ends)
        assert pivots.shape == (n * len(ROWS), 10 + n)
        assert pivots[len(ROWS), :3].tolist() == [0, 1, 2]
    assert counter.frame_count <= 2
    on_meta = sample_pivots(TEXT.to("meta"), IMAGE.to("meta"), 1, cu_seqlens=BEGINS.to("meta"))
    assert on_meta.shape == (len(ROWS), 1)


@pytest.mark.parametrize("sequences", [0, 3])
def test_nothing_to_draw_from(sequences: int) -> None:
    mask, ends = torch.zeros(0, dtype=torch.bool), torch.zeros(sequences + 1, dtype=torch.int32)
    expected = torch.full((sequences, 4), -1, dtype=torch.int32)
    assert torch.equal(sample_pivots(mask, mask, 4, cu_seqlens=ends), expected)


def test_invalid_masks() -> None:
    table: list[tuple[str, type[Exception], dict[str, Any]]] = [
        ("text_mask", ValueError, {"text_mask": TEXT[None]}),
        ("image_mask", ValueError, {"image_mask": IMAGE[:-1]}),
        ("image_mask", ValueError, {"image_mask": IMAGE | TEXT}),
        ("num_pivots", ValueError, {"num_pivots": 9}),
        ("cu_seqlens", TypeError, {"cu_seqlens": 3}),
        ("cu_seqlens", TypeError, {"cu_seqlens": BEGINS.float()}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS[None]}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS[:-2]}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS.flip(0)}),
        ("cu_seqlens", ValueError, {"cu_seqlens": BEGINS.to("meta")}),
    ]
    good = {"text_mask": TEXT, "image_mask": IMAGE, "num_pivots": 10, "cu_seqlens": BEGINS}
    sample_pivots(**good)  # type: ignore[arg-type]
    for name, error, changed in table:
        with pytest.raises(error, match=rf"^{name}: expected .+, got .+"):
            sample_pivots(**{**good, **changed})  # type: ignore[arg-type]
