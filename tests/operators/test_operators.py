"""What holds for every operator alike: opcheck, compilation, layouts, repeats, autocast, transforms, derivatives."""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import ALL, BY_LABEL, DIFFERENTIABLE
from common import (
    DTYPES,
    LAYOUTS,
    Case,
    Inputs,
    assert_bitwise,
    assert_same,
    computable,
    device_of,
    each,
    gaps,
    heads_last,
    interpreted,
    narrow_only,
    results,
    run,
    skip_emulated,
    skip_slow,
    skip_uncomputable,
    spread_out,
    unavailable,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from cogview_ops._manifest import KERNELS

EMPTY = [
    BY_LABEL[label]._replace(
        label=f"{label}-{name}", shapes={k: resize(s) for k, s in BY_LABEL[label].shapes.items()}, options=options
    )
    for label, name, resize, options in (
        ("no_pivots", "no tokens", lambda s: (*s[:2], 0, s[3]), BY_LABEL["no_pivots"].options),
        ("blocks_of_64", "no batch", lambda s: (0, *s[1:]), {"pivots": torch.zeros(0, 9, dtype=torch.int32)}),
        ("packed", "no tokens", lambda s: (0, *s[1:]),
         {"pivots": torch.full((2, 3), -1), "cu_seqlens": torch.zeros(3, dtype=torch.int32)}),
        ("packed", "no sequences", lambda s: (0, *s[1:]),
         {"pivots": torch.zeros(0, 3, dtype=torch.int32), "cu_seqlens": torch.zeros(1, dtype=torch.int32)}),
        ("packed", "no heads", lambda s: (s[0], 0, s[2]), BY_LABEL["packed"].options),
        ("blocks_of_64", "no heads", lambda s: (s[0], 0, *s[2:]), BY_LABEL["blocks_of_64"].options),
        ("cogview2", "no batch", lambda s: (0, *s[1:]), BY_LABEL["cogview2"].options),
        ("cogview2", "no heads", lambda s: (s[0], 0, *s[2:]), BY_LABEL["cogview2"].options),
        ("softmax", "no rows", lambda s: (*s[:2], 0, s[3]), {}),
        ("layer_norm", "no rows", lambda s: (0, *s[1:]) if len(s) > 1 else s, {}),
        ("sandwich", "no rows", lambda s: (0, *s[1:]) if len(s) > 1 else s, {}),
        ("rms_norm", "no rows", lambda s: (0, *s[1:]) if len(s) > 1 else s, {}),
        ("rms_both", "no rows", lambda s: (0, *s[1:]) if len(s) > 1 else s, {}),
        ("linear", "no rows", lambda s: (0, *s[1:]) if len(s) > 2 else s, {}),
        ("three_region_decode", "no batch", lambda s: (0, *s[1:]),
         {"pivots": torch.zeros(0, 9, dtype=torch.int32), "cache_seqlens": torch.zeros(0, dtype=torch.int32)}),
        ("local_2d_decode", "no queries", lambda s: (*s[:2], 0, s[3]) if s[1] == 2 else s,
         BY_LABEL["local_2d_decode"].options),
    )
]  # fmt: skip


def narrow_or_float32(case: Case, impl: str) -> torch.dtype:
    """A dtype of 16 bits where the case then mixes dtypes, or the kernel takes no other."""
    return computable(torch.bfloat16, impl) if case.wide or narrow_only(case.op, impl) else torch.float32


def test_every_operator_is_here() -> None:
    """Its cases, in each list that the tests below go through."""
    assert {case.op for case in ALL} == {case.op for case in EMPTY} == {operator.name for operator in KERNELS}
    assert {case.op for case in DIFFERENTIABLE} == {operator.name for operator in KERNELS if operator.differentiable}


# --- memory ----------------------------------------------------------------------------------------------------------


@each([*BY_LABEL.values()])
def test_layouts_and_poisoned_allocations(impl: str, case: Case, poisoned: None) -> None:
    """Any strides give the contiguous result to the bit, no output is left unwritten, outputs follow the query."""
    skip_slow(impl, unless=case.label == "tiny" or case.of_rows or not case.differentiable)
    # rows that tensor cores take are aligned to 16 bytes
    aligned = {gaps: functools.partial(gaps, beside=8)} if narrow_only(case.op, impl) else {}
    for k, layout in enumerate((heads_last, gaps) if interpreted(impl) else LAYOUTS):
        layout, dtype = aligned.get(layout, layout), computable(DTYPES[k], impl, case.op)
        inputs = layout(case.inputs(dtype, device_of(impl)))
        plain = {name: x.contiguous() for name, x in inputs.items()}
        mine, expected = results(case, inputs, impl), results(case, plain, impl)
        assert_same(mine, expected, impl)
        assert not any(x.isnan().any() for x in mine)
        first = next(iter(inputs.values()))
        like = torch.empty_like(first) if mine[0].shape == first.shape else torch.empty(mine[0].shape)
        assert mine[0].stride() == like.stride()


# where the scale is large probabilities of 0 say nothing of what is seen
@each([case for case in BY_LABEL.values() if not case.of_rows and case.label != "large_scale"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_seen_does_not_matter(impl: str, case: Case, bad: float) -> None:
    """A value that is not finite reaches the queries that see it, no others of their tile, and no log-sum-exp."""
    if impl != "cpp":
        pytest.skip("reaches all queries of a tile there")
    tokens = 0 if case.packed else 2
    names = [name for name in case.shapes if "value" in name and case.shapes[name][tokens]]
    for dtype, name in itertools.product((torch.float32, torch.bfloat16, torch.float16), names):

        def outputs(number: float, inputs: Inputs, name: str = name) -> tuple[Tensor, ...]:
            """With so much as the values of one key."""
            key = torch.tensor(inputs[name].shape[tokens] // 2)
            return case({**inputs, name: inputs[name].index_fill(tokens, key, number)}, impl)

        exact = case.inputs(torch.float32)
        seen = outputs(1, exact | {name: torch.zeros_like(exact[name]) for name in names})[0] > 0
        inputs = case.inputs(dtype)
        (out, *lse), (expected, *expected_lse) = outputs(bad, inputs), outputs(0, inputs)
        assert not out[seen].isfinite().any()
        close = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close([out[~seen], *lse], [expected[~seen], *expected_lse], rtol=close, atol=close)


@each(ALL)
def test_gradient_layouts(impl: str, case: Case) -> None:
    """Gradients that come in with strange strides: expanded (from a sum), transposed."""
    if not case.differentiable:
        pytest.skip("inference only")
    for make in (lambda g: g.sum().expand_as(g), lambda g: heads_last({"": g})[""], lambda g: g.mT.contiguous().mT):
        dtype = computable(torch.float32, impl, case.op)
        inputs = {k: x.requires_grad_() for k, x in case.inputs(dtype, device_of(impl)).items()}
        outputs = case(inputs, impl)
        grads = [make(torch.ones_like(x)) if x.dim() > 2 else torch.ones_like(x) for x in outputs]
        strange = torch.autograd.grad(outputs, list(inputs.values()), grads, retain_graph=True)
        plain = torch.autograd.grad(outputs, list(inputs.values()), [g.contiguous() for g in grads])
        assert_same(strange, plain, impl)


@each([case for case in DIFFERENTIABLE if "attention" in case.op])
def test_statistics_in_any_layout(impl: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch slices what it shards."""
    dtype = computable(torch.float32, impl, case.op)
    inputs = case.inputs(dtype, device_of(impl))
    expected, grads = run(case, inputs, impl)
    spread = spread_out(monkeypatch, expected[1].shape)
    assert_same(run(case, inputs, impl)[1].values(), grads.values(), impl)
    assert spread


@each(EMPTY)
def test_empty(impl: str, case: Case) -> None:
    inputs = case.inputs(computable(torch.float32, impl, case.op), device_of(impl))
    for x in results(case, inputs, impl):
        assert x.isfinite().all()
    if case.differentiable:  # parameters of an empty batch get zeros, not what was in memory
        assert all((g == 0).all() for g in run(case, inputs, impl)[1].values())


@each([case for case in ALL if not case.packed])  # those have one of their own
def test_offsets_beyond_32_bits(impl: str, case: Case) -> None:
    """The second sample lies 2**31 elements behind the first (pages never touched take no memory)."""
    inputs = case.inputs(computable(torch.bfloat16, impl), device_of(impl))
    name, x = next(iter(inputs.items()))
    far = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device=x.device)
    view = far.as_strided((2, *x.shape[1:]), (2**31, *x.stride()[1:]))
    view.copy_(x[:2])
    narrow = {k: v[: 2 if v.dim() > 1 and k not in ("bias", "weight") else None] for k, v in inputs.items()}
    options = {k: v[:2] if isinstance(v, Tensor) and k != "weight" else v for k, v in case.options.items()}
    small = case._replace(options=options)
    assert_bitwise(results(small, {**narrow, name: view}, impl), results(small, narrow, impl))


# --- repeats, threads ------------------------------------------------------------------------------------------------


@each(ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bitwise(impl: str, case: Case, dtype: torch.dtype, threads: None) -> None:
    """Twice the same, and the same on one thread as on three (but for norms, which sum over rows in slices)."""
    skip_slow(impl)  # and one after the other: no race to see
    skip_uncomputable(dtype, impl, case.op)
    inputs = case.inputs(dtype, device_of(impl))
    torch.set_num_threads(3)
    first = results(case, inputs, impl)
    assert_bitwise(results(case, inputs, impl), first)
    if "norm" not in case.op:
        torch.set_num_threads(1)
        assert_bitwise(results(case, inputs, impl), first)


@each(ALL)
def test_several_python_threads(impl: str, case: Case) -> None:
    if interpreted(impl):
        pytest.skip("Triton's interpreter is for one thread")
    skip_emulated(case.op, impl)
    inputs = case.inputs(torch.bfloat16, device_of(impl))
    expected = results(case, inputs, impl)
    with ThreadPoolExecutor(4) as pool:
        for mine in pool.map(lambda _: results(case, inputs, impl), range(8)):
            assert_bitwise(mine, expected)


# --- torch.library ---------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The calls of our operators: (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("cogview_ops"):
            self.calls.append((func, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


@each(ALL)
def test_opcheck(impl: str, case: Case) -> None:
    """All four tests of torch.library.opcheck, on forward and backward operator, on strided views."""
    skip_emulated(case.op, impl)
    with Recorder() as recorder:
        results(case, heads_last(case.inputs(narrow_or_float32(case, impl), device_of(impl))), impl)
    assert len(recorder.calls) == 1 + case.differentiable
    for func, args in recorder.calls:
        if case.differentiable and func is recorder.calls[0][0]:
            args = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(func, args)


@each(ALL)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(impl: str, case: Case, dynamic: bool) -> None:
    skip_slow(impl, unless=dynamic and case.differentiable)
    skip_emulated(case.op, impl)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: case(x, impl), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = case.inputs(narrow_or_float32(case, impl), device_of(impl))
    if not case.differentiable:
        return assert_bitwise(list(compiled(inputs)), list(case(inputs, impl)))
    leaves = [x.requires_grad_() for x in inputs.values()]
    mine, expected = compiled(inputs), case(inputs, impl)
    assert_bitwise(list(mine), list(expected))
    grads = [torch.randn_like(x) for x in mine]
    assert_bitwise(*(list(torch.autograd.grad(outputs, leaves, grads)) for outputs in (mine, expected)))


@each(ALL)
def test_meta_tensors(impl: str, case: Case) -> None:
    """Shapes, dtypes and strides without computing: large models are built on the meta device."""
    inputs = heads_last(case.inputs(computable(torch.bfloat16, impl), device_of(impl)))
    expected = case(inputs, impl)
    for out, real in zip(case({k: x.to("meta") for k, x in inputs.items()}, impl), expected, strict=True):
        assert (out.shape, out.dtype, out.stride(), out.device.type) == (real.shape, real.dtype, real.stride(), "meta")


@each(ALL)
def test_fake_tensor_mode(impl: str, case: Case) -> None:
    """Pivots and lengths may stay real: their values are not looked at."""
    inputs = case.inputs(computable(torch.float32, impl, case.op), device_of(impl))
    expected = results(case, inputs, impl)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = results(case, {k: mode.from_tensor(x) for k, x in inputs.items()}, impl)
    assert [(x.shape, x.dtype) for x in fakes] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_make_fx(case: Case) -> None:
    """In its plain mode, which runs on real values and has none of them to look at."""
    inputs = case.inputs(torch.float32)
    graph = make_fx(lambda inputs: case(inputs, "cpp"))(inputs)
    assert_bitwise(list(graph(inputs)), list(case(inputs, "cpp")))


# --- choice of implementation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_asking_by_name_never_falls_back(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    with pytest.raises(
        ValueError, match=r"^impl: 'cuda' runs on cuda or meta tensors|^impl: 'cuda' runs on cuda tensors"
    ):
        case(inputs, "cuda")
    if unavailable(case.op, "triton"):
        with pytest.raises(RuntimeError, match="triton"):
            case(inputs, "triton")


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_auto_is_the_compiled_kernel_on_cpu(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    with Recorder() as recorder:
        auto = case(inputs, "auto")
    assert len(recorder.calls) == 1
    assert_bitwise(list(auto), list(case(inputs, "cpp")))
