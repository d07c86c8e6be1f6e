"""local_attention_2d and its decode: truth, masks, cache, gradients, arguments. What all operators share is in
test_operators.py."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from cases import BY_LABEL, LOCAL_2D, local_2d
from common import (
    DTYPES,
    Case,
    assert_as_good_as,
    assert_probed,
    assert_true,
    device_of,
    each_impl,
    each_probe,
    every_isa,
    identity,
    interpreted,
    narrow_only,
    refused,
    run,
    skip_beyond_limits,
    skip_slow,
    skip_uncomputable,
    some,
)
from torch import Tensor

from cogview_ops import local_attention_2d, local_attention_2d_decode, merge_attentions, patterns, reference

OP = "local_attention_2d"
TINY = [("tiny_sets", torch.float32), ("tiny_row", torch.float32), ("tiny_local", torch.float16),
        ("tiny_dilated", torch.float32), ("tiny_shifted", torch.float16)]  # fmt: skip
SOME = [BY_LABEL[x] for x in ("row", "three_by_three", "strict_column", "coarse_ratio_2", "all_sets", "all_sets_wide",
                              "dilated_causal", "shifted_sets", "bands", "sets_32", "tiny_sets")]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_phases_that_skip_coarse_keys_share_no_query(dtype: torch.dtype, threads: None) -> None:
    """Dilation leaves coarse keys that a phase does not see between those that it sees: no gradient may be lost.

    On tiles every group of coarse keys adds to every patch of queries, from the first on, so groups that ran at once
    would run into each other.
    """
    case = local_2d("skipped", (32, 32), (3, 3), 16, batch=1, heads=1, kv_heads=1, dilation=4, coarse=(32, 32),
                    coarse_kernel_size=(1, 1))  # fmt: skip
    torch.set_num_threads(4)
    assert_true(case, dtype, "cpp")
    inputs = case.inputs(dtype)
    expected = run(case, inputs, "cpp")[1]["query"]
    for _ in range(10):
        assert torch.equal(run(case, inputs, "cpp")[1]["query"], expected)


@each_impl(OP, LOCAL_2D)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_slow(impl, unless=(case.label, dtype) in TINY)
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


@each_impl(OP)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_set_outweighs_the_others(impl: str, dtype: torch.dtype) -> None:
    """Scores of the sets far apart, in both directions: the running maximum must move from set to set."""
    skip_slow(impl)
    case = BY_LABEL["sets_32" if impl == "cuda" else "all_sets"]
    for prefix_bias, coarse_bias in itertools.product((-60.0, 0.0, 60.0), repeat=2):
        biased = case._replace(options={**case.options, "prefix_bias": prefix_bias, "coarse_bias": coarse_bias})
        assert_true(biased, dtype, impl)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_that_grow_on_the_way(isa: str, dtype: torch.dtype) -> None:
    """Keys so long that a row maximum becomes necessary after some tiles, when some queries have not seen any key."""
    case = local_2d("growing", (16, 16), (9, 5), 32, prefix=70, masked=True, raster_causal=True, prefix_bias=0.5)
    inputs = case.inputs(dtype)
    inputs["key"][:, :, 100:] *= 30
    inputs["key"][:, :, 200:] *= 4
    wide = {k: x.double() for k, x in inputs.items()}
    outputs, truth, formula = case(inputs, "cpp"), case(wide, "reference"), case(inputs, "reference")
    for k in range(2):
        assert_as_good_as(outputs[k], truth[k], formula[k], f"output {k}")


@every_isa
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_many_heads_share_packed_tiles(isa: str, dtype: torch.dtype, poisoned: None) -> None:
    """Enough heads that a work item takes several tiles of every set, and of the queries."""
    case = local_2d("many_heads", (16, 16), (5, 3), 16, batch=1, heads=16, kv_heads=16, prefix=70, prefix_bias=0.5,
                    coarse=(16, 16), coarse_kernel_size=(3, 3))  # fmt: skip
    assert_true(case, dtype, "cpp")


# --- the masks, entry by entry ---------------------------------------------------------------------------------------


def weights_of(options: dict[str, Any], prefix: int) -> Tensor:
    """Attention weights of equal scores, from patterns.py: float64 [B, S, P + S + C]."""
    grid, coarse = options["grid"], options.get("coarse_grid")
    i = torch.arange(grid[0] * grid[1])
    window = {k: options[k] for k in ("grid", "kernel_size", "dilation", "edge", "raster_causal") if k in options}
    local = patterns.local_2d(i[:, None], i, **window)
    mask = options["prefix_mask"].cpu() if prefix else torch.ones(2, 0)
    parts = [mask[:, None].double().expand(-1, len(i), -1) * math.exp(options.get("prefix_bias", 0.0))]
    parts.append(local.double().expand(2, -1, -1))
    if coarse:
        near = patterns.coarse_2d(
            i[:, None],
            torch.arange(coarse[0] * coarse[1]),
            grid=grid,
            coarse_grid=coarse,
            kernel_size=options["coarse_kernel_size"],
        )
        parts.append(near.double().expand(2, -1, -1) * math.exp(options["coarse_bias"]))
    weights = torch.cat(parts, -1)
    return weights / weights.sum(-1, keepdim=True)


def probe(impl: str, dtype: torch.dtype, prefix: int, **options: Any) -> None:
    """Attention weights, read from the output and from each gradient, are the pattern over its row sum.

    With q = 0 or k = 0 all scores are equal. The values of all keys together are the identity, so the output is the
    weights; so are dout (the gradient of the values is then their transpose) and k (then q).
    """
    tokens = options["grid"][0] * options["grid"][1]
    cells = options["coarse_grid"][0] * options["coarse_grid"][1] if "coarse_grid" in options else 0
    keys = prefix + tokens + cells
    weights = weights_of(options, prefix)
    eye = identity(keys, impl)
    picked = eye[prefix : prefix + tokens]  # q and dout of query i show key i of the local set
    chosen = picked[:, :keys]
    own = weights.diagonal(offset=prefix, dim1=1, dim2=2)[..., None]
    dlse = torch.arange(1.0, tokens + 1, dtype=torch.float64)
    dscores = weights * (chosen - own + dlse[:, None])
    device = device_of(impl)

    def sets(x: Tensor, kind: str) -> dict[str, Tensor]:
        names = ("prefix_" + kind, kind, "coarse_" + kind)
        split = x.to(device, dtype).expand(2, 1, -1, -1).split([prefix, tokens, cells], 2)
        return {n: part.clone().requires_grad_() for n, part in zip(names, split, strict=True) if part.shape[2]}

    for q, k in ((torch.zeros_like(picked), eye), (picked, torch.zeros_like(eye))):
        query = q.to(device, dtype).expand(2, 1, -1, -1).clone().requires_grad_()
        skip_beyond_limits(impl, OP, query, options)
        all_keys, all_values = sets(k, "key"), sets(eye, "value")
        out, lse = local_attention_2d(
            query, **all_keys, **all_values, **options, scale=1.0, return_lse=True, impl=impl
        )  # fmt: skip
        dout = picked.to(device, dtype).expand(2, 1, -1, -1).contiguous()
        torch.autograd.backward([out, lse], [dout, dlse.to(lse).expand_as(lse)])
        got = [("output", out, weights), ("dv", _joined(all_values), (chosen.T @ weights).mT)]
        got += [("dq", query.grad, dscores)] if k is eye else [("dk", _joined(all_keys), dscores.mT @ chosen)]
        for name, actual, expected in got:
            assert actual is not None
            assert_probed(actual[:, 0], expected @ eye, f"{name}: {options}")  # and zeros


def _joined(leaves: dict[str, Tensor]) -> Tensor:
    grads = [x.grad for x in leaves.values()]
    return torch.cat([g for g in grads if g is not None], 2)


@each_probe(OP)
def test_local_mask_exhaustively(impl: str, dtype: torch.dtype) -> None:
    """Every grid up to 4 x 5, every kernel, causal or not."""
    if interpreted(impl):
        return probe(impl, dtype, 0, grid=(2, 5), kernel_size=(3, 5), raster_causal=True)
    table = [
        {"grid": (height, width), "kernel_size": kernel, "raster_causal": causal}
        for height, width in itertools.product(range(1, 5), range(1, 6))
        for kernel in itertools.product(range(1, 2 * height, 2), range(1, 2 * width, 2))
        for causal in (False, True)
    ]
    for how in some(table, impl, 97):
        probe(impl, dtype, 0, **how)


@each_probe(OP, *DTYPES[2:])
def test_coarse_and_prefix_masks_exhaustively(impl: str, dtype: torch.dtype) -> None:
    """Every coarse grid that divides a few grids, every coarse kernel; the prefix masked differently per sample."""
    skip_slow(impl)
    masks = torch.tensor([[False, False, False], [True, False, True]])
    for height, width in ((1, 4), (4, 1), (2, 3), (3, 4), (4, 4), (4, 6)):
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in (height, width)]
        sizes = [
            (coarse, kernel)
            for coarse in itertools.product(*divisors)
            for kernel in itertools.product(range(1, 2 * coarse[0], 2), range(1, 2 * coarse[1], 2))
        ]
        for coarse, kernel in some(sizes, impl, 31):
            probe(
                impl, dtype, 3, grid=(height, width), kernel_size=(1, 1), raster_causal=sum(kernel) % 4 == 0,
                prefix_mask=masks.to(device_of(impl)), prefix_bias=0.25,
                coarse_grid=coarse, coarse_kernel_size=kernel, coarse_bias=-0.5,
            )  # fmt: skip


@each_probe(OP)
def test_dilated_and_shifted_masks_exhaustively(impl: str, dtype: torch.dtype) -> None:
    """Every kernel that a few grids and dilations have room for: clipped, causal, shifted."""
    if interpreted(impl):
        probe(impl, dtype, 0, grid=(5, 2), kernel_size=(3, 1), dilation=(2, 3), raster_causal=True)
        return probe(
            impl, dtype, 0, grid=(3, 7), kernel_size=(3, 3), dilation=(1, 2), edge="shift", raster_causal=False
        )
    for grid, dilation in itertools.product(((1, 9), (7, 4), (5, 6)), ((1, 1), (1, 2), (2, 1), (2, 3), (3, 8))):
        room = [(n + d - 1) // d for n, d in zip(grid, dilation, strict=True)]
        for kernel in some(itertools.product(*(range(1, 2 * n, 2) for n in room)), impl, 17):
            how: dict[str, Any] = {"grid": grid, "kernel_size": kernel, "dilation": dilation}
            if dilation != (1, 1):
                probe(impl, dtype, 0, **how, raster_causal=False)
                probe(impl, dtype, 0, **how, raster_causal=True)
            if all(k * d <= n for k, d, n in zip(kernel, dilation, grid, strict=True)):
                probe(impl, dtype, 0, **how, edge="shift", raster_causal=False)


@each_probe(OP, *DTYPES[2:])
@pytest.mark.parametrize("how", ["clip", "causal", "shift"])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (3, 4)])
@pytest.mark.parametrize("kernel", [(9, 5), (1, 25), (17, 1), (17, 25), (3, 3)])
def test_mask_across_tiles(
    impl: str, dtype: torch.dtype, kernel: tuple[int, int], dilation: tuple[int, int], how: str
) -> None:
    skip_slow(impl)
    grid = (9, 13)
    most = [n // d if how == "shift" else 2 * ((n + d - 1) // d) - 1 for n, d in zip(grid, dilation, strict=True)]
    kernel = (min(kernel[0], (most[0] - 1) | 1), min(kernel[1], (most[1] - 1) | 1))  # odd
    edge = "shift" if how == "shift" else "clip"
    probe(impl, dtype, 0, grid=grid, kernel_size=kernel, dilation=dilation, edge=edge, raster_causal=how == "causal")


@each_probe(OP)
def test_whole_grid_is_dense_attention(impl: str, dtype: torch.dtype) -> None:
    skip_slow(impl)
    for causal in (False, True):
        case = local_2d("dense", (4, 5), (7, 9), 64 if narrow_only(OP, impl) else 16, raster_causal=causal)
        inputs = case.inputs(dtype, device_of(impl))
        dense = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)
        truth, formula = (dense(*(x.to(y) for x in inputs.values())) for y in (torch.float64, dtype))
        assert_as_good_as(case(inputs, impl)[0], truth, formula)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_windows_of_any_size_are_safe_below_the_checks(dtype: torch.dtype) -> None:
    """torch.ops takes windows that the public function refuses: beyond the whole grid they change nothing."""
    q, k, v, coarse_k, coarse_v = torch.randn(5, 1, 2, 64, 16).to(dtype)
    results = []
    for size in (15, 2**63 - 1):
        sets, options = (None, None, coarse_k, coarse_v, *(None,) * 3), ([8, 8], [size, 1], [1, 1], False, False, 0.0)
        how = (*sets, *options, [8, 8], [1, size], 0.0, 0.25)
        out, lse = torch.ops.cogview_ops.local_attention_2d_fwd(q, k, v, *how)
        grads = torch.ops.cogview_ops.local_attention_2d_bwd(out, None, q, k, v, *sets, out, lse, *how[7:])
        results.append([out, lse, *(g for g in grads if g is not None)])
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)
    shifted = ([8, 8], [2**62 + 1, 1], [4, 1], False, True, 0.0, [0, 0], [0, 0], 0.0, 0.25)
    with pytest.raises(RuntimeError, match="dilated window inside the grid"):
        torch.ops.cogview_ops.local_attention_2d_fwd(q, k, v, *(None,) * 7, *shifted)


# --- decoding --------------------------------------------------------------------------------------------------------


@each_impl(f"{OP}_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("label", ["strict_row", "cogview2", "all_sets", "dilated_causal", "tiny_sets", "tiny_dilated"])
def test_decode_equals_forward(impl: str, dtype: torch.dtype, steps: int, label: str) -> None:
    """Token by token or several at once; the samples stand at different places; the rest of the cache is NaN."""
    skip_uncomputable(dtype, impl)
    fast = [("tiny_sets", 1, torch.float32), ("tiny_sets", 40, torch.float16), ("tiny_dilated", 3, torch.float32)]
    skip_slow(impl, unless=(label, steps, dtype) in fast)
    case, device = BY_LABEL[label], device_of(impl)
    inputs = case.inputs(dtype, device)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")[0]
    formula = case(inputs, "reference")[0]
    options = {k: v for k, v in case.options.items() if k not in ("return_lse", "raster_causal")}
    options |= {k: v.to(device) for k, v in options.items() if isinstance(v, Tensor)}
    options |= {k: x for k, x in inputs.items() if k.startswith(("prefix", "coarse"))}
    tokens = inputs["query"].shape[2]
    steps = min(steps, tokens)
    for end in (steps, tokens // 2, tokens - 1, tokens):
        ends = [max(steps, end - 11 * b) for b in range(inputs["query"].shape[0])]
        spans = [slice(e - steps, e) for e in ends]

        def rows(x: Tensor, spans: list[slice] = spans) -> Tensor:
            return torch.stack([sample[:, span] for sample, span in zip(x, spans, strict=True)])

        caches = [inputs[name].clone() for name in ("key", "value")]
        for cache, (b, e) in itertools.product(caches, enumerate(ends)):
            cache[b, :, e:] = torch.nan
        lens = torch.tensor(ends, device=device)
        out = local_attention_2d_decode(rows(inputs["query"]), *caches, lens, **options, impl=impl)
        assert_as_good_as(out, rows(truth), rows(formula), f"tokens up to {ends}")


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    case = BY_LABEL["local_2d_decode"]
    inputs = case.inputs(dtype)
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")
    assert_as_good_as(case(inputs, "cpp")[0], truth[0], case(inputs, "reference")[0])


# --- gradients -------------------------------------------------------------------------------------------------------


@each_probe(OP, *DTYPES[2:])
def test_gradcheck(impl: str, dtype: torch.dtype) -> None:
    """Against differences; of 16 bits, which have no small ones, against the formula's derivative."""
    skip_slow(impl)
    if narrow_only(OP, impl):
        pytest.skip("no kernel for heads of 3")
    sets: dict[str, Any] = {"prefix": 2, "masked": True, "prefix_bias": 0.3, "coarse": (1, 2)}
    sets |= {"coarse_kernel_size": (1, 1), "coarse_bias": -0.4}
    for case in (local_2d("gradcheck", (2, 3), (3, 3), 3, batch=1, kv_heads=1),
                 local_2d("gradcheck_dilated", (1, 5), (1, 3), 2, batch=1, heads=1, kv_heads=1, dilation=(1, 2)),
                 local_2d("gradcheck_shifted", (1, 6), (1, 3), 2, batch=1, heads=1, kv_heads=1, edge="shift"),
                 local_2d("gradcheck_sets", (2, 2), (3, 1), 2, raster_causal=True, **sets)):  # fmt: skip
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
    """The three sets are disjoint: merging three attentions is the joint one, gradients through lse included."""
    skip_slow(impl)
    skip_uncomputable(torch.float64, impl, OP)
    case = BY_LABEL["all_sets"]
    leaves = {k: x.requires_grad_() for k, x in case.inputs(torch.float64, device_of(impl)).items()}
    joint = case(leaves, impl)
    own = {k: leaves[k] for k in ("query", "key", "value")}
    plain = {k: v for k, v in case.options.items() if not k.startswith(("prefix", "coarse"))}
    local = case._replace(options=plain)(own, impl)
    query, scale, device = leaves["query"], leaves["query"].shape[3] ** -0.5, leaves["query"].device
    mask = case.options["prefix_mask"][:, None, None].to(device)
    text = reference.masked_attention(
        query, leaves["prefix_key"], leaves["prefix_value"], mask, case.options["prefix_bias"], scale
    )
    near = patterns.coarse_2d(
        torch.arange(48)[:, None], torch.arange(4), grid=(6, 8), coarse_grid=(2, 2), kernel_size=(3, 3)
    )
    coarse = reference.masked_attention(
        query, leaves["coarse_key"], leaves["coarse_value"], near.to(device), case.options["coarse_bias"], scale
    )
    assert text[1].isinf().any()
    merged = merge_attentions(*zip(local, text, coarse, strict=True))
    weights = [torch.randn_like(x) for x in joint]
    for a, b in zip(joint, merged, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    tensors = list(leaves.values())
    grads = [torch.autograd.grad(outputs, tensors, weights, retain_graph=True) for outputs in (joint, merged)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


# --- arguments -------------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 12, 8)
KV = torch.zeros(2, 2, 12, 8)
SMALL = torch.zeros(2, 2, 2, 8)
INVALID_KV: list[tuple[Any, type[Exception]]] = [
    (1.0, TypeError),
    (SMALL.double(), TypeError),
    (SMALL[:1], ValueError),
    (SMALL[..., :7], ValueError),
    (SMALL[..., ::2], ValueError),
    (torch.zeros(2, 3, 2, 8), ValueError),
    (SMALL[:, :0], ValueError),
    (SMALL.to("meta"), ValueError),
]
INVALID: list[tuple[str, Any, type[Exception]]] = [
    *((name, *row) for name in ("prefix_key", "prefix_value", "coarse_key", "coarse_value") for row in INVALID_KV),
    ("query", None, TypeError),
    ("query", Q[0], ValueError),
    ("query", Q.int(), TypeError),
    ("query", torch.zeros(2, 4, 12, 0), ValueError),
    ("grid", 12, TypeError),
    ("grid", (3, 4, 1), TypeError),
    ("grid", (3.0, 4.0), TypeError),
    ("grid", (3, 5), ValueError),
    ("grid", (0, 12), ValueError),
    ("grid", (-3, -4), ValueError),
    ("kernel_size", 3, TypeError),
    ("kernel_size", (3, True), TypeError),
    ("kernel_size", (6, 3), ValueError),
    ("kernel_size", (3, 0), ValueError),
    ("kernel_size", (7, 3), ValueError),
    ("kernel_size", (3, 9), ValueError),
    ("dilation", 0, ValueError),
    ("dilation", (1, -1), ValueError),
    ("dilation", 2.0, TypeError),
    ("dilation", True, TypeError),
    ("dilation", (2,), TypeError),
    ("prefix_value", None, ValueError),
    ("prefix_key", None, ValueError),
    ("prefix_value", torch.zeros(2, 2, 3, 8), ValueError),
    ("prefix_mask", [True, False], TypeError),
    ("prefix_mask", torch.zeros(2, 2), TypeError),
    ("prefix_mask", torch.zeros(2, 3, dtype=torch.bool), ValueError),
    ("prefix_mask", torch.zeros(2, dtype=torch.bool), ValueError),
    ("prefix_mask", torch.zeros(2, 2, dtype=torch.bool, device="meta"), ValueError),
    ("prefix_bias", None, TypeError),
    ("prefix_bias", float("-inf"), ValueError),
    ("coarse_key", None, ValueError),
    ("coarse_value", None, ValueError),
    ("coarse_grid", None, ValueError),
    ("coarse_grid", 2, TypeError),
    ("coarse_grid", (1, 3), ValueError),
    ("coarse_kernel_size", None, ValueError),
    ("coarse_kernel_size", (1, 4), ValueError),
    ("coarse_kernel_size", (3, 1), ValueError),
    ("coarse_bias", "0", TypeError),
    ("coarse_bias", float("nan"), ValueError),
    ("scale", float("nan"), ValueError),
    ("scale", (1,), TypeError),
    ("impl", "fast", ValueError),
]
SETS = {
    "prefix_key": SMALL,
    "prefix_value": SMALL,
    "prefix_mask": torch.ones(2, 2, dtype=torch.bool),
    "coarse_key": SMALL,
    "coarse_value": SMALL,
    "coarse_grid": (1, 2),
    "coarse_kernel_size": (1, 3),
}


def test_without_a_local_set() -> None:
    alone = {"query": Q, "key": None, "value": None, "grid": (3, 4), "kernel_size": None}
    prefix = {"prefix_key": SMALL, "prefix_value": SMALL}
    assert torch.equal(
        local_attention_2d(**alone, **prefix, dilation=(1, 1)), local_attention_2d(**alone, **prefix, dilation=1)
    )
    other = SMALL.repeat_interleave(2, 1)
    sets = {**SETS, "coarse_key": other, "coarse_value": other}
    expected = f"prefix_key's {SMALL.shape[1]} heads, got {other.shape[1]}"
    with pytest.raises(ValueError, match=f"^coarse_key: expected {expected}"):
        local_attention_2d(**alone, **sets)
    for name, value, message in (
        ("dilation", (2, 1), r"expected 1 where kernel_size is None, got \(2, 1\)"),
        ("raster_causal", True, "expected False where kernel_size is None, got True"),
        ("bias", torch.zeros(4, 5, 5), "expected None where kernel_size is None, got a tensor"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: {message}$"):
            local_attention_2d(**alone, **prefix, **{name: value})


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments(impl: str) -> None:
    arguments = {"query": Q, "key": KV, "value": KV, "grid": (3, 4), "kernel_size": (3, 3), **SETS, "impl": impl}
    table: list[tuple[str, Any, type[Exception]]] = [
        ("raster_causal", "no", TypeError),
        ("edge", "wrap", ValueError),
        ("edge", None, ValueError),
        ("query", Q[:, :, :11], ValueError),
    ]
    for name, value, error in INVALID + table:
        refused(local_attention_2d, arguments, name, value, error)
    heads = torch.zeros(2, 4, 2, 8)  # as many as query has, not as many as key
    for kind in ("prefix", "coarse"):
        refused(local_attention_2d, {**arguments, f"{kind}_value": heads}, f"{kind}_key", heads, ValueError)
    narrow = {**arguments, "coarse_kernel_size": (1, 1)}
    refused(local_attention_2d, narrow, "coarse_grid", (2, 1), ValueError)  # two rows do not divide three
    for how, kernel in (({"dilation": (3, 1)}, (3, 3)), ({"dilation": (1, 2)}, (3, 5)), ({"edge": "shift"}, (3, 5)),
                        ({"edge": "shift", "dilation": 2}, (1, 3))):  # fmt: skip
        refused(local_attention_2d, arguments | how, "kernel_size", kernel, ValueError)
    refused(local_attention_2d, arguments | {"raster_causal": True}, "edge", "shift", ValueError)
    bare = {k: v for k, v in arguments.items() if k not in SETS}
    refused(local_attention_2d, bare, "prefix_mask", SETS["prefix_mask"], ValueError)
    for name in ("coarse_grid", "coarse_kernel_size"):
        with pytest.raises(ValueError, match=r"^coarse_key: expected .+, got None"):
            local_attention_2d(**bare, **{name: (1, 1)})  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments_of_decode(impl: str) -> None:
    arguments = {"query": Q[:, :, :3], "key_cache": KV, "value_cache": KV, "cache_seqlens": torch.tensor([3, 12])}
    arguments |= {"grid": (3, 4), "kernel_size": (3, 3), **SETS, "impl": impl}
    table: list[tuple[str, Any, type[Exception]]] = [
        ("cache_seqlens", torch.tensor([2, 12]), ValueError),
        ("cache_seqlens", torch.tensor([3, 13]), ValueError),
        ("cache_seqlens", torch.tensor([3.0, 12.0]), TypeError),
        ("cache_seqlens", torch.tensor([3]), ValueError),
        ("key_cache", KV[:1], ValueError),
        ("value_cache", KV[:, :, :11], ValueError),
        ("query", Q[0], ValueError),
    ]
    for name, value, error in [row for row in INVALID if row[0] != "query"] + table:
        refused(local_attention_2d_decode, arguments, name, value, error)
    refused(local_attention_2d_decode, arguments | {"dilation": 2}, "kernel_size", (5, 3), ValueError)
