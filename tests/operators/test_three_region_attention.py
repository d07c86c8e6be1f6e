"""three_region_attention and its decode: truth, mask, cache, gradients, arguments. What all operators share is in
test_operators.py."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_LABEL, THREE_REGION, some_pivots, three_region
from common import (
    DTYPES,
    Case,
    assert_as_good_as,
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
    run,
    skip_slow,
    skip_uncomputable,
)
from torch import Tensor

from cogview_ops import merge_attentions, patterns, reference, three_region_attention, three_region_attention_decode

OP = "three_region_attention"
SOME = [
    BY_LABEL[x]
    for x in (
        "two_tokens",
        "tiny",
        "all_pivots",
        "text_pivots",
        "few_pivots",
        "grouped_32",
        "blocks_of_64",
        "blocks_of_128",
        "wide_heads",
    )
]


@each_impl(OP, THREE_REGION)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_slow(impl, unless=case.label == "tiny_grouped" or dtype == torch.float32)
    assert_true(case, dtype, impl)


@each_impl(OP, SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", [0, 1], ids=["dout", "dlse"])
def test_truth_with_one_gradient(impl: str, case: Case, dtype: torch.dtype, output: int) -> None:
    skip_slow(impl, unless=dtype == torch.float16)
    assert_true(case, dtype, impl, [output])


@every_isa
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, case: Case, dtype: torch.dtype) -> None:
    assert_true(case, dtype, "cpp")


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_grow_on_the_way(isa: str, dtype: torch.dtype) -> None:
    """Keys so long that a row maximum becomes necessary after some tiles, when some queries have not seen any key."""
    for case in (BY_LABEL["text_pivots"], three_region("growing", 130, 64, 16, 1, "none")):
        inputs = case.inputs(dtype)
        inputs["key"][:, :, 70:] *= 30
        inputs["key"][:, :, 110:] *= 4
        inputs["key"][:, :, 112] = -30 * inputs["query"][:, :, 112]  # without pivots the only one: e^score is 0
        wide = {k: x.double() for k, x in inputs.items()}
        outputs, truth, formula = case(inputs, "cpp"), case(wide, "reference"), case(inputs, "reference")
        for k in range(2):
            assert_as_good_as(outputs[k], truth[k], formula[k], f"{case.label}, output {k}")


@every_isa
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_many_heads_share_packed_tiles(isa: str, dtype: torch.dtype, poisoned: None) -> None:
    """Enough heads that a work item takes several tiles of keys and of pivots."""
    case = three_region("many_heads", 330, 16, 50, 1, "all", batch=1, heads=32, kv_heads=32, pivot_bias=0.5)
    assert_true(case, dtype, "cpp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_groups_of_keys_share_no_query(dtype: torch.dtype, threads: None) -> None:
    """A window over many tiles of keys: groups of these that ran at once would lose gradients of its queries."""
    case = three_region("wide_windows", 1024, 16, 64, 16, "none", batch=1, heads=1, kv_heads=1)
    torch.set_num_threads(4)
    inputs = case.inputs(dtype)
    assert_true(case, dtype, "cpp")
    expected = run(case, inputs, "cpp")[1]["query"]
    for _ in range(10):
        assert torch.equal(run(case, inputs, "cpp")[1]["query"], expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_some_long_keys_on_any_number_of_threads(dtype: torch.dtype, threads: None) -> None:
    """How queries are grouped depends on threads, for which of them a row maximum becomes necessary does not."""
    pivots, blocks = torch.arange(0, 2048, 4)[None], {"block_size": 64, "window_blocks": 1}
    q, k, v = torch.randn(3, 1, 1, 2048, 16).to(dtype)
    k[:, :, [200, 1100]] *= 300
    found = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        prompt = three_region_attention_decode(q[:, :, 1000:2021], k, v, pivots, torch.tensor([2021]), **blocks)
        found.append((three_region_attention(q, k, v, pivots, **blocks), prompt))
        assert all(map(torch.equal, found[-1], found[0])), count


@each_impl(OP)
def test_large_scores(impl: str) -> None:
    """Scores far beyond exp's range: the online maximum must carry them, in every tile order."""
    case = BY_LABEL["tiny_aligned" if interpreted(impl) else "text_pivots"]
    dtypes = {computable(x, impl, OP): None for x in (torch.float32, torch.bfloat16)}
    for factor, dtype in itertools.product((30.0, -30.0), dtypes):
        inputs = case.inputs(dtype, device_of(impl))
        inputs["key"] = inputs["key"] + torch.linspace(0, factor, inputs["key"].shape[2])[:, None].to(inputs["key"])
        wide = {k: x.double() for k, x in inputs.items()}
        for a, t, f in zip(case(inputs, impl), case(wide, "reference"), case(inputs, "reference"), strict=True):
            assert_as_good_as(a, t, f)


# --- the mask, entry by entry ----------------------------------------------------------------------------------------


def probe(
    impl: str, dtype: torch.dtype, pivots: Tensor, seqlen: int, block_size: int, window_blocks: int, bias: float
) -> None:
    """Attention weights, read from the output and from each gradient, are the pattern over its row sum.

    With q = 0 all scores are equal. v = identity makes the output the weights themselves; with dout = identity
    the gradient of v is their transpose; k = identity (then q instead) makes those of q and k show the rest.
    """
    batch = pivots.shape[0]
    window, pivot = patterns.three_region_masks(torch.arange(seqlen)[None], seqlen, pivots, block_size, window_blocks)
    weights = window.double() + pivot.double() * math.exp(bias)
    weights = weights / weights.sum(-1, keepdim=True)
    eye, dlse = identity(seqlen, impl), torch.arange(1.0, seqlen + 1, dtype=torch.float64)
    dscores = weights * (torch.eye(seqlen) - weights.diagonal(dim1=1, dim2=2)[..., None] + dlse[:, None])
    device = device_of(impl)

    def tensor(x: Tensor) -> Tensor:
        return x.to(device, dtype).expand(batch, 1, -1, -1).contiguous().requires_grad_()

    for q, k in ((torch.zeros_like(eye), eye), (eye, torch.zeros_like(eye))):
        query, key, value = tensor(q), tensor(k), tensor(eye)
        out, lse = three_region_attention(
            query, key, value, pivots.to(device), block_size=block_size, window_blocks=window_blocks,
            pivot_bias=bias, scale=1.0, return_lse=True, impl=impl,
        )  # fmt: skip
        torch.autograd.backward([out, lse], [tensor(eye).detach(), dlse.to(lse).expand_as(lse)])
        where = f"S {seqlen}, block {block_size}, window {window_blocks}, pivots {pivots.tolist()}"
        got = [("output", out, weights), ("dv", value.grad, weights.mT)]
        got += [("dq", query.grad, dscores)] if k is eye else [("dk", key.grad, dscores.mT)]
        for name, actual, expected in got:
            assert actual is not None
            assert_probed(actual[:, 0], expected @ eye, f"{name}: {where}")  # and zeros


@each_probe(OP)
def test_mask_exhaustively(impl: str, dtype: torch.dtype) -> None:
    table = list(itertools.product(range(1, 21), range(1, 6), range(1, 4)))
    chosen = slice(228, 229) if interpreted(impl) else slice(None, None, 59 if impl == "cuda" else 1)
    for seqlen, block_size, window_blocks in table[chosen]:
        pivots = torch.full((4, seqlen + 5), -1, dtype=torch.int32)
        for row, kind in zip(pivots, ("none", "all", "long", "text"), strict=True):
            some = some_pivots(kind, 1, seqlen)[0]
            row[: len(some)] = some
        probe(impl, dtype, pivots, seqlen, block_size, window_blocks, 0.5 * (seqlen % 3))


@each_probe(OP, *DTYPES[2:])
@pytest.mark.parametrize(
    ("seqlen", "block_size", "window_blocks"), [(67, 16, 1), (130, 64, 1), (150, 3, 5), (150, 1, 1)]
)
@pytest.mark.parametrize("kind", ["none", "all", "long", "text"])
def test_mask_across_tiles(
    impl: str, dtype: torch.dtype, seqlen: int, block_size: int, window_blocks: int, kind: str
) -> None:
    skip_slow(impl)
    probe(impl, dtype, some_pivots(kind, 2, seqlen), seqlen, block_size, window_blocks, -0.5)


@each_probe(OP)
def test_all_pivots_are_causal_attention(impl: str, dtype: torch.dtype) -> None:
    dim = 32 if narrow_only(OP, impl) else 16
    case = three_region("causal", 33 if interpreted(impl) else 100, dim, 7, 2, "all", batch=1)
    inputs = case.inputs(dtype, device_of(impl))
    causal = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    truth, formula = (causal(*(x.to(y) for x in inputs.values())) for y in (torch.float64, dtype))
    assert_as_good_as(case(inputs, impl)[0], truth, formula)


# --- decoding --------------------------------------------------------------------------------------------------------


@each_impl(f"{OP}_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 70])
@pytest.mark.parametrize("label", ["tiny", "text_pivots", "block_of_three", "blocks_of_64"])
def test_decode_equals_forward(impl: str, dtype: torch.dtype, steps: int, label: str) -> None:
    """Token by token or several at once; the samples stand at different places; the rest of the cache is NaN."""
    skip_uncomputable(dtype, impl)
    skip_slow(impl, unless=label == "tiny" and (steps, dtype) in ((3, torch.float16), (70, torch.float32)))
    case = BY_LABEL[label]
    inputs = case.inputs(dtype, device_of(impl))
    wide = {k: x.double() for k, x in inputs.items()}
    truth, formula = case(wide, "reference"), case(inputs, "reference")
    batch, _, seqlen, _ = inputs["query"].shape
    steps = min(steps, seqlen - 1)
    options = {k: v for k, v in case.options.items() if k != "pivots"}
    for end in (steps, seqlen // 2, seqlen - 1, seqlen):
        ends = [max(steps, end - 11 * b) for b in range(batch)]
        spans = [slice(e - steps, e) for e in ends]

        def rows(x: Tensor, spans: list[slice] = spans) -> Tensor:
            return torch.stack([sample[:, span] for sample, span in zip(x, spans, strict=True)])

        caches = [inputs[name].clone() for name in ("key", "value")]
        for cache, (b, e) in itertools.product(caches, enumerate(ends)):
            cache[b, :, e:] = torch.nan
        lens = torch.tensor(ends, device=device_of(impl))
        pivots = case.options["pivots"].to(device_of(impl))
        outputs = three_region_attention_decode(rows(inputs["query"]), *caches, pivots, lens, **options, impl=impl)
        for k, (a, t, f) in enumerate(zip(outputs, truth, formula, strict=True)):
            assert_as_good_as(a, rows(t), rows(f), f"output {k}, tokens up to {ends}")


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    case = BY_LABEL["three_region_decode"]
    inputs = case.inputs(dtype)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")
    for results in zip(case(inputs, "cpp"), truth, case(inputs, "reference"), strict=True):
        assert_as_good_as(*results)


@each_impl(f"{OP}_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_never_reads_beyond_the_lengths(impl: str, dtype: torch.dtype) -> None:
    """A row's result depends on nothing but the tokens that its pattern names."""
    skip_uncomputable(dtype, impl)
    skip_slow(impl, unless=dtype == torch.float32)
    case = BY_LABEL["three_region_decode"]
    inputs = case.inputs(dtype, device_of(impl))
    block_size, window_blocks = case.options["block_size"], case.options["window_blocks"]
    ends = case.options["cache_seqlens"]
    position = ends[:, None] - 3 + torch.arange(3)
    masks = patterns.three_region_masks(position, 70, case.options["pivots"], block_size, window_blocks)
    unseen = ~(masks[0] | masks[1]).any(1)
    assert unseen.any(1).all()
    spoiled = {k: x.clone() for k, x in inputs.items()}
    for name in ("key_cache", "value_cache"):
        # within the pattern's tiles finite garbage, beyond the written part NaN
        spoiled[name].transpose(1, 2)[unseen] = 100.0
        spoiled[name].transpose(1, 2)[torch.arange(70) >= ends[:, None]] = torch.nan
    assert all(map(torch.equal, case(inputs, impl), case(spoiled, impl)))


@each_impl(f"{OP}_decode")
def test_decode_returns_lse_if_asked(impl: str) -> None:
    case = BY_LABEL["three_region_decode"]
    inputs = case.inputs(torch.float32, device_of(impl))
    out = case._replace(options={**case.options, "return_lse": False})(inputs, impl)
    assert len(out) == 1  # a tensor alone
    assert torch.equal(out[0], case(inputs, impl)[0])


@each_impl(f"{OP}_decode")
def test_decode_equals_its_merged_parts(impl: str) -> None:
    """Of a cache in two, by lengths and padding; of one sample the first half is empty."""
    device = device_of(impl)
    query, (key, value) = torch.randn(2, 4, 1, 16, device=device), torch.randn(2, 2, 2, 50, 16, device=device)
    cuts, ends = torch.tensor([30, 7], device=device), torch.tensor([50, 41], device=device)
    pivots = torch.arange(50, device=device).repeat(2, 1)

    def part(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        return three_region_attention_decode(query, key, value, pivots, end, block_size=8, window_blocks=2,
                                             cache_leftpad=begin, return_lse=True, impl=impl)  # fmt: skip

    begins = cuts * torch.tensor([0, 1], device=device)
    parts = [part(begins, cuts), part(cuts, ends)]
    assert parts[0][1][1].isneginf().all()
    merged = merge_attentions(*zip(*parts, strict=True))
    for a, b in zip(merged, part(begins, ends), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- gradients -------------------------------------------------------------------------------------------------------


@each_probe(OP, *DTYPES[2:])
def test_gradcheck(impl: str, dtype: torch.dtype) -> None:
    """Against differences; of 16 bits, which have no small ones, against the formula's derivative."""
    skip_slow(impl)
    if narrow_only(OP, impl):
        pytest.skip("no kernel for heads of 3")
    for case in (three_region("gradcheck", 7, 3, 2, 1, batch=1, heads=2, kv_heads=1, pivot_bias=0.3),
                 three_region("gradcheck_all", 6, 2, 1, 2, "all", batch=1, heads=1, kv_heads=1)):  # fmt: skip
        if dtype != torch.float64:
            assert_true(case, dtype, impl)
            continue
        inputs = case.inputs(torch.float64, device_of(impl))
        names = list(inputs)
        leaves = [x.requires_grad_() for x in inputs.values()]

        def call(*tensors: Tensor, case: Case = case, names: list[str] = names) -> tuple[Tensor, ...]:
            return case(dict(zip(names, tensors, strict=True)), impl)

        assert torch.autograd.gradcheck(call, leaves)


@each_impl(OP)
def test_equals_its_merged_parts(impl: str) -> None:
    """Window and pivots are disjoint: merging two attentions is the joint one, gradients through lse included."""
    skip_slow(impl)
    skip_uncomputable(torch.float64, impl, OP)
    case = BY_LABEL["block_of_three"]
    pivots, block, window = (case.options[name] for name in ("pivots", "block_size", "window_blocks"))
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64, device_of(impl)).values()]
    seqlen, dim = leaves[0].shape[2:]
    joint = three_region_attention(*leaves, pivots.to(leaves[0].device), block_size=block, window_blocks=window,
                                   pivot_bias=0.7, return_lse=True, impl=impl)  # fmt: skip
    near = three_region_attention(*leaves, pivots.new_empty(2, 0).to(leaves[0].device), block_size=block,
                                  window_blocks=window, return_lse=True, impl=impl)  # fmt: skip
    _, mask = patterns.three_region_masks(torch.arange(seqlen)[None], seqlen, pivots, block, window)
    far = reference.masked_attention(*leaves, mask[:, None].to(leaves[0].device), 0.7, dim**-0.5)
    assert far[1].isinf().any()
    merged = merge_attentions([near[0], far[0]], [near[1], far[1]])
    weights = [torch.randn_like(x) for x in joint]
    for a, b in zip(joint, merged, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    for a, b in zip(
        torch.autograd.grad(joint, leaves, weights), torch.autograd.grad(merged, leaves, weights), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


# --- arguments -------------------------------------------------------------------------------------------------------


def _pivots(*rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


Q = torch.zeros(2, 4, 12, 8)
KV = torch.zeros(2, 2, 12, 8)
INVALID_BOTH: list[tuple[str, Any, type[Exception]]] = [
    ("query", 1.0, TypeError),
    ("query", Q[0], ValueError),
    ("query", Q.int(), TypeError),
    ("query", Q.mT.contiguous().mT, ValueError),
    ("query", torch.zeros(2, 4, 12, 0), ValueError),
    ("pivots", [0, 1], TypeError),
    ("pivots", torch.zeros(2, 3), TypeError),
    ("pivots", torch.zeros(2, dtype=torch.int32), ValueError),
    ("pivots", _pivots([0, 1]), ValueError),
    ("pivots", _pivots([0, 2, 1], [0, 1, 2]), ValueError),
    ("pivots", _pivots([0, 1, 1], [0, 1, 2]), ValueError),
    ("pivots", _pivots([0, -1, 1], [0, 1, 2]), ValueError),
    ("pivots", _pivots([0, 1, 12], [0, 1, 2]), ValueError),
    ("pivots", _pivots([0, 1, -2], [0, 1, 2]), ValueError),
    ("pivots", _pivots([0, 1, 2**40], [0, 1, 2], dtype=torch.int64), ValueError),
    ("pivots", torch.zeros(2, 1, dtype=torch.int32, device="meta"), ValueError),
    ("block_size", 0, ValueError),
    ("block_size", 2.0, TypeError),
    ("block_size", True, TypeError),
    ("window_blocks", 0, ValueError),
    ("window_blocks", None, TypeError),
    ("pivot_bias", "1", TypeError),
    ("pivot_bias", float("nan"), ValueError),
    ("pivot_bias", float("inf"), ValueError),
    ("scale", "1", TypeError),
    ("scale", float("inf"), ValueError),
    ("impl", "gpu", ValueError),
    ("impl", None, ValueError),
]
INVALID_KV: list[tuple[Any, type[Exception]]] = [
    (None, TypeError),
    (KV.double(), TypeError),
    (KV[:1], ValueError),
    (KV[..., :7], ValueError),
    (KV[..., ::2], ValueError),
    (torch.zeros(2, 3, 12, 8), ValueError),
    (torch.zeros(2, 0, 12, 8), ValueError),
    (KV.to("meta"), ValueError),
]


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments(impl: str) -> None:
    arguments = {"query": Q, "key": KV, "value": KV, "pivots": _pivots([0, 1, -1], [0, 5, 7]), "impl": impl}
    table = INVALID_BOTH + [(name, *row) for name in ("key", "value") for row in INVALID_KV]
    table += [("value", KV[:, :1], ValueError), ("value", KV[:, :, :11], ValueError)]
    for name, value, error in table:
        refused(three_region_attention, arguments, name, value, error)
    longer = torch.zeros(2, 2, 13, 8)
    refused(three_region_attention, {**arguments, "value": longer}, "key", longer, ValueError)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments_of_decode(impl: str) -> None:
    lens = torch.tensor([12, 12])
    arguments = {"query": Q, "key_cache": KV, "value_cache": KV, "pivots": _pivots([0, 1, -1], [0, 5, 7])}
    arguments |= {"cache_seqlens": lens, "impl": impl}
    table = INVALID_BOTH + [(name, *row) for name in ("key_cache", "value_cache") for row in INVALID_KV]
    bad_lens: list[tuple[Any, type[Exception]]] = [
        (12, TypeError),
        (lens.float(), TypeError),
        (lens[None], ValueError),
        (lens[:1], ValueError),
        (torch.tensor([12, 11]), ValueError),
        (torch.tensor([12, 13]), ValueError),
        (torch.tensor([12, -1]), ValueError),
        (lens.to("meta"), ValueError),
    ]
    for name, value, error in table + [("cache_seqlens", *row) for row in bad_lens]:
        refused(three_region_attention_decode, arguments, name, value, error)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (1, 3)], ids=str)
def test_pivots_of_any_shape_are_safe_below_the_checks(shape: tuple[int, ...]) -> None:
    """torch.ops takes shapes that the public function refuses."""
    pivots, lens, how = torch.zeros(shape, dtype=torch.int64), torch.tensor([12, 12]), (16, 1, 0.0, 1.0)
    ops = torch.ops.cogview_ops
    with pytest.raises(RuntimeError, match="pivots: shape does not match"):
        ops.three_region_attention_fwd(Q, KV, KV, pivots, *how)
    with pytest.raises(RuntimeError, match="pivots: shape does not match"):
        ops.three_region_attention_decode(Q, KV, KV, pivots, lens, *how)


def test_contents_are_not_read_on_other_devices() -> None:
    """Reading pivots would wait for the device: what is not on CPU passes the checks, and shapes come out."""
    out = three_region_attention(*(x.to("meta") for x in (Q, KV, KV, _pivots([3, 1], [0, 0]))), impl="reference")
    assert out.shape == Q.shape  # type: ignore[union-attr]
