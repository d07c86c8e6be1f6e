"""dalle_attention and cogview2_attention: one whole sequence of text and images, composed of the operators."""

import itertools
import math
import zlib
from typing import Any

import pytest
import torch
from common import (
    DTYPES,
    Case,
    assert_as_good_as,
    assert_probed,
    assert_true,
    device_of,
    each_impl,
    each_probe,
    gaps,
    heads_last,
    identity,
    packed,
    refused,
    skip_slow,
)
from torch import Tensor

from cogview_ops import cogview2_attention, dalle_attention, dalle_attention_decode, patterns

OP = "local_attention_2d"  # which the compositions need
BIASES = ("text_bias", "coarse_bias")
KINDS = ("row", "row_wrap", "column", "convolutional")


def sequence(
    op: str,
    label: str,
    tokens: int,
    dim: int = 16,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    masked: bool = False,
    **how: Any,
) -> Case:
    if masked:  # no text at all, padding on the left, on the right
        n = how["text_len"]
        i = torch.arange(n)
        how["text_mask"] = torch.stack([i < 0, i >= n // 2, i < (n + 1) // 2])
    kv = (3, kv_heads, tokens, dim)
    return Case(op, label, {"query": (3, heads, tokens, dim), "key": kv, "value": kv}, how)


def dalle(kind: str, text_len: int, grid: tuple[int, int], dim: int = 16, **how: Any) -> Case:
    label = f"{kind}-{text_len}-{grid[0]}x{grid[1]}{'-masked' * how.get('masked', False)}"
    how |= {"kind": kind.split("_")[0], "wrap": kind == "row_wrap", "text_len": text_len, "grid": grid}
    return sequence("dalle_attention", label, text_len + grid[0] * grid[1], dim, **how)


def cogview2(
    label: str, text_len: int, grid: tuple[int, int], coarse: tuple[int, int] | None = None, **how: Any
) -> Case:
    cells = 0 if coarse is None else coarse[0] * coarse[1]
    how |= {"text_len": text_len, "grid": grid, "coarse_grid": coarse}
    return sequence("cogview2_attention", label, text_len + cells + grid[0] * grid[1], **how)


MASKED = [dalle(kind, 9, (4, 13), 20, kernel_size=5, masked=True, heads=2, scale=0.4) for kind in KINDS]
CASES = [
    *(dalle(kind, 7, (5, 6), kernel_size=3) for kind in KINDS),
    *MASKED,
    dalle("convolutional", 3, (4, 4)),  # 11 is more than there is
    dalle("row_wrap", 1, (1, 3)),
    dalle("row_wrap", 2, (3, 1), masked=True),
    cogview2("direct", 6, (6, 9), (2, 3), kernel_size=(5, 3), coarse_kernel_size=(3, 3)),
    cogview2("direct_causal", 5, (4, 6), (4, 2), kernel_size=(5, 3), coarse_kernel_size=(3, 1), masked=True,
             raster_causal=True),
    cogview2("direct_biased", 5, (4, 6), (2, 3), kernel_size=(5, 3), coarse_kernel_size=(3, 1), masked=True,
             text_bias=1.4, coarse_bias=-0.7),
    cogview2("iterative", 6, (9, 7), masked=True, heads=2),
    cogview2("iterative_biased", 6, (5, 7), masked=True, text_bias=1.4),
    cogview2("iterative_causal", 1, (9, 7), raster_causal=True, scale=0.4),
    # small enough for Triton's interpreter
    dalle("convolutional", 2, (2, 3), kernel_size=3, heads=1, kv_heads=1)._replace(label="tiny_dalle"),
    cogview2("tiny_cogview2", 2, (2, 4), (1, 2), kernel_size=(3, 3), coarse_kernel_size=(1, 1), heads=1, kv_heads=1),
]  # fmt: skip


def some(*labels: str) -> pytest.MarkDecorator:
    """Parametrise `case` over some of them."""
    by_label = {case.label: case for case in CASES}
    return pytest.mark.parametrize("case", [by_label[label] for label in labels], ids=labels)


def pattern(case: Case) -> Tensor:
    """bool [3, S, S], from the patterns."""
    how = {"kernel_size": 11} if case.op == "dalle_attention" else {"kernel_size": (9, 5), "raster_causal": False}
    how |= {"coarse_kernel_size": (5, 5)} if case.op == "cogview2_attention" else {}
    how |= {k: v for k, v in case.options.items() if k not in (*BIASES, "text_mask", "scale")}
    i = torch.arange(case.shapes["query"][2])
    predicate = patterns.dalle if case.op == "dalle_attention" else patterns.cogview2
    seen = predicate(i[:, None], i, **how).expand(3, -1, -1)
    if "text_mask" in case.options:
        hidden = torch.zeros(3, 1, len(i), dtype=torch.bool)
        hidden[:, 0, : how["text_len"]] = ~case.options["text_mask"]
        seen = seen & (~hidden | torch.eye(len(i), dtype=torch.bool))
    return seen


def added(case: Case) -> Tensor:
    """float64 [S, S]: the biases, block by block."""
    text, cells = case.options["text_len"], math.prod(case.options["coarse_grid"] or (0,))
    bias = torch.zeros(2 * case.shapes["query"][2:3], dtype=torch.float64)
    bias[text:, :text] = case.options.get("text_bias", 0.0)
    bias[text + cells :, text : text + cells] = case.options.get("coarse_bias", 0.0)
    return bias


@each_impl(OP, CASES, narrow=False)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(impl: str, case: Case, dtype: torch.dtype) -> None:
    assert_true(case, dtype, impl)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_reference_is_sdpa_under_the_pattern(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    mask, scale = pattern(case)[:, None], case.options.get("scale")
    if any(name in case.options for name in BIASES):
        mask = added(case).masked_fill(~mask, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *inputs.values(), attn_mask=mask, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(case(inputs, "reference")[0], expected, atol=1e-12, rtol=0)


def probe(impl: str, dtype: torch.dtype, case: Case) -> None:
    """With equal scores the weights are the pattern over its row sum; read from the output, from dv (values of no
    gradient elsewhere), and where dq and dk are not zero."""
    tokens = case.shapes["query"][2]
    seen = pattern(case).double()
    weights = seen / seen.sum(-1, keepdim=True)
    values = identity(tokens, impl)
    eye = values.to(device_of(impl), dtype).expand(3, 1, -1, -1)
    q, k, v = (x.clone().requires_grad_() for x in (torch.zeros_like(eye), eye, eye))
    out = case._replace(options={**case.options, "scale": 1.0})({"query": q, "key": k, "value": v}, impl)[0]
    dq, dv = torch.autograd.grad(out, (q, v), eye)
    own = weights.diagonal(dim1=1, dim2=2)[..., None]
    dscores = weights * (torch.eye(tokens) - own)
    for name, actual, expected in (("output", out, weights), ("dv", dv, weights.mT), ("dq", dq, dscores)):
        assert_probed(actual[:, 0], expected @ values, f"{name}: {case}")  # and zeros


@each_probe(OP, cuda=False)
def test_dalle_masks_exhaustively(impl: str, dtype: torch.dtype) -> None:
    skip_slow(impl)
    for kind, height, width, text_len in itertools.product(KINDS, range(1, 5), range(1, 5), (1, 3)):
        for kernel in (1, 3, 5) if kind == "convolutional" else (11,):
            probe(impl, dtype, dalle(kind, text_len, (height, width), kernel_size=kernel, masked=text_len == 3))


@each_probe(OP, cuda=False)
def test_cogview2_masks_exhaustively(impl: str, dtype: torch.dtype) -> None:
    skip_slow(impl)
    sizes = [(1, 1), (2, 1), (2, 4), (4, 3)]
    for grid, causal, masked in itertools.product(sizes, (False, True), (False, True)):
        divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in grid]
        for coarse in (None, *itertools.product(*divisors)):
            own = [(k, j) for k, j in itertools.product((1, 3), (1, 5)) if k < 2 * grid[0] and j < 2 * grid[1]][-1]
            how: dict[str, Any] = {"kernel_size": own, "raster_causal": causal, "masked": masked}
            cross = min(3, 2 * coarse[0] - 1) if coarse else 1
            probe(impl, dtype, cogview2("probe", 3, grid, coarse, coarse_kernel_size=(cross, 1), **how))


def test_dalle_row_with_wrap_is_the_papers() -> None:
    """Figure 11 of the paper: text of 6, an image of 4 x 4; the last 5 image tokens, to the one right above."""
    i = torch.arange(22)
    how: dict[str, Any] = {"text_len": 6, "grid": (4, 4), "kernel_size": 11}
    seen = patterns.dalle(i[:, None], i, kind="row", wrap=True, **how)
    for q, k in itertools.product(range(22), repeat=2):
        assert seen[q, k] == (k <= q and (k < 6 or q - k < 5))
    column = patterns.dalle(i[:, None], i, kind="column", wrap=False, **how)
    assert column[6 + 13].nonzero().flatten().tolist() == [*range(6), 6 + 1, 6 + 5, 6 + 9, 6 + 13]


@each_impl(OP, narrow=False)
@pytest.mark.parametrize("layout", [heads_last, gaps, packed], ids=lambda f: f.__name__)
@some("row_wrap-7-5x6", "direct", "iterative")
def test_any_strides(impl: str, case: Case, layout: Any) -> None:
    skip_slow(impl)
    inputs = case.inputs(torch.float32, device_of(impl))
    views = layout(inputs)
    out = case(views, impl)[0]
    torch.testing.assert_close(out, case(inputs, impl)[0], rtol=1e-5, atol=1e-5)
    query = views["query"]
    assert (out.stride(1) < out.stride(2)) == (query.stride(1) < query.stride(2))


@each_impl(f"{OP}_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.label)
def test_decode_equals_forward(impl: str, case: Case, dtype: torch.dtype) -> None:
    skip_slow(impl)
    device, text_len = device_of(impl), case.options["text_len"]
    inputs = case.inputs(dtype, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    truth = case({k: x.double() for k, x in inputs.items()}, "reference")[0]
    formula = case(inputs, "reference")[0]
    for steps, end in ((1, text_len + 1), (3, text_len + 15), (1, text_len + 52)):
        ends = torch.tensor([end, max(end - 7, text_len + steps), text_len + steps], device=device)
        rows = ends[:, None] - steps + torch.arange(steps, device=device)

        def pick(x: Tensor, rows: Tensor = rows) -> Tensor:
            return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        written = torch.arange(inputs["key"].shape[2], device=device)[:, None] < ends[:, None, None, None]
        caches = (inputs[name].masked_fill(~written, math.nan) for name in ("key", "value"))
        out = dalle_attention_decode(pick(inputs["query"]), *caches, ends, **options, impl=impl)
        assert_as_good_as(out, pick(truth), pick(formula), f"{steps} tokens up to {ends.tolist()}")


@each_impl(OP, narrow=False)
@some("row_wrap-9-4x13-masked", "direct_causal", "iterative")
def test_gradcheck(impl: str, case: Case) -> None:
    skip_slow(impl)
    how = {k: v[:1] if isinstance(v, Tensor) else v for k, v in case.options.items()}
    how |= {"text_len": 3, "grid": (2, 2), "kernel_size": 3 if case.op == "dalle_attention" else (3, 3)}
    how |= {"text_mask": torch.tensor([[True, False, True]])} if "text_mask" in how else {}
    coarse = how.get("coarse_grid") and {"coarse_grid": (2, 1), "coarse_kernel_size": (3, 1)}
    tokens = 7 + 2 * bool(coarse)
    generator = torch.Generator().manual_seed(zlib.crc32(case.label.encode()))
    leaves = [torch.randn(1, h, tokens, 2, dtype=torch.float64, generator=generator) for h in (2, 1, 1)]

    def call(*tensors: Tensor) -> Tensor:
        small = case._replace(options=how | (coarse or {}))
        return small(dict(zip(("query", "key", "value"), tensors, strict=True)), impl)[0]

    assert torch.autograd.gradcheck(call, [x.to(device_of(impl)).requires_grad_() for x in leaves])


@some("row-9-4x13-masked", "direct")
def test_compiles_as_one_graph_and_runs_under_autocast(case: Case) -> None:
    torch._dynamo.reset()
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(lambda **x: case(x, "auto")[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), case(inputs, "auto")[0])
    expected: list[Tensor] = []
    for names in ((), ("key",), ("query", "value")):  # in bfloat16 already
        leaves = {k: (x.bfloat16() if k in names else x).detach().requires_grad_() for k, x in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            out = case(leaves, "auto")[0]
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.sum(), list(leaves.values()))
        assert [g.dtype for g in grads] == [x.dtype for x in leaves.values()]
        results = [out, *(g.bfloat16() for g in grads)]
        expected = expected or results
        assert all(map(torch.equal, results, expected))


# --- arguments -------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 4, 15, 8)
MASK = torch.ones(2, 3, dtype=torch.bool)
BOTH: list[tuple[str, Any, type[Exception]]] = [
    ("query", None, TypeError),
    ("query", X[:, :, :14], ValueError),
    ("key", X[:1], ValueError),
    ("value", X[..., :7], ValueError),
    ("text_len", 0, ValueError),
    ("text_len", 3.0, TypeError),
    ("grid", 12, TypeError),
    ("grid", (0, 12), ValueError),
    ("text_mask", [True], TypeError),
    ("text_mask", MASK.float(), TypeError),
    ("text_mask", MASK[:, :2], ValueError),
    ("scale", math.nan, ValueError),
    ("impl", "fast", ValueError),
]


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments_of_dalle(impl: str) -> None:
    how = {"kind": "row", "text_len": 3, "grid": (3, 4), "text_mask": MASK, "impl": impl}
    arguments = {"query": X, "key": X, "value": X, **how}
    own: list[tuple[str, Any, type[Exception]]] = [
        ("kind", "diagonal", ValueError),
        ("kernel_size", 4, ValueError),
        ("kernel_size", (11, 11), TypeError),
        ("wrap", 1, TypeError),
    ]
    for name, value, error in BOTH + own:
        refused(dalle_attention, arguments, name, value, error)
    with pytest.raises(ValueError, match=r"^query: expected 16 tokens \(4 \+ 12\), got"):
        dalle_attention(**{**arguments, "text_len": 4, "text_mask": None})
    with pytest.raises(ValueError, match=r"^key: expected 15 tokens \(3 \+ 12\), got"):
        dalle_attention(**{**arguments, "key": X[:, :, :14], "value": X[:, :, :14]})
    refused(dalle_attention, {**arguments, "kind": "column"}, "wrap", True, ValueError)
    cached = {"query": X[:, :, :2], "key_cache": X, "value_cache": X, "cache_seqlens": torch.tensor([5, 15]), **how}
    for bad in (torch.tensor([4, 15]), torch.tensor([5, 16])):
        refused(dalle_attention_decode, cached, "cache_seqlens", bad, ValueError)
    short = {**cached, "value_cache": X[:, :, :14], "cache_seqlens": torch.tensor([5, 14])}
    refused(dalle_attention_decode, short, "key_cache", X[:, :, :14], ValueError)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_invalid_arguments_of_cogview2(impl: str) -> None:
    arguments = {"query": X, "key": X, "value": X, "text_len": 3, "grid": (2, 4), "kernel_size": (3, 3), "impl": impl}
    arguments |= {"coarse_grid": (1, 4), "coarse_kernel_size": (1, 3), "text_mask": MASK}
    own: list[tuple[str, Any, type[Exception]]] = [
        ("kernel_size", 3, TypeError),
        ("kernel_size", (5, 3), ValueError),
        ("coarse_grid", 4, TypeError),
        ("coarse_grid", (1, 3), ValueError),
        ("coarse_kernel_size", (1, 9), ValueError),
        ("raster_causal", "no", TypeError),
        ("text_bias", float("nan"), ValueError),
        ("coarse_bias", "1", TypeError),
    ]
    for name, value, error in BOTH + own:
        refused(cogview2_attention, arguments, name, value, error)
