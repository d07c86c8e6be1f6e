"""Attention kernels in CUDA C++: what the operator tests, which are for all implementations, do not ask of them.

Without a GPU on the emulator. COGVIEW_TESTS=all breaks them too, one thing at a time: cuda_faults.py.
"""

import ctypes
import itertools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cuda_faults
import emulated_cuda
import kept_build
import pytest
import torch
from cases import local_2d, some_pivots, three_region
from common import (
    TENSOR_CORE_DTYPES,
    Case,
    assert_bitwise,
    assert_true,
    device_of,
    gaps,
    heads_last,
    results,
    run,
    unavailable,
)
from torch import Tensor

from cogview_ops import _cuda_limits, _dispatch, _measured, local_attention_2d, three_region_attention

OP = "three_region_attention"
ROOT = Path(__file__).parents[2]
SEEDS = (1, 2)
missing = unavailable(OP, "cuda")
on_cuda = pytest.mark.parametrize(
    "impl", [pytest.param("cuda", marks=pytest.mark.skipif(missing is not None, reason=str(missing)))]
)
emulated = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
long = pytest.mark.skipif(os.environ.get("COGVIEW_TESTS") != "all", reason="takes a minute: COGVIEW_TESTS=all")


# --- in the emulator, without torch: several schedules, and faults ---------------------------------------------------


@pytest.fixture(scope="module", params=["three_region", pytest.param("local_2d", marks=long)])
def suite(request: pytest.FixtureRequest) -> cuda_faults.Suite:
    return cuda_faults.suite(request.param)


@emulated
@pytest.mark.parametrize("seed", SEEDS)
def test_runs_under_any_schedule(suite: cuda_faults.Suite, seed: int) -> None:
    library = cuda_faults.library(suite)
    for label, call in suite.runs.items():
        message = call(library, seed)
        assert not message, f"{label}: {message}"


@emulated
@long
def test_every_fault_is_shown(suite: cuda_faults.Suite) -> None:
    assert not cuda_faults.missed(suite)


# --- three-region attention ------------------------------------------------------------------------------------------

# all heads, the pattern's edges in and between tiles of 32, 64 and 128 rows
CASES = [
    three_region("dim_32", 150, 32, 16, 1, "text", batch=1, heads=2, kv_heads=1, pivot_bias=0.7),
    three_region("dim_64", 150, 64, 100, 1, "all", batch=1, heads=1, kv_heads=1, scale=-0.3),
    three_region("dim_96", 150, 96, 3, 5, "long", batch=1, heads=1, kv_heads=1),
    three_region("dim_128", 150, 128, 64, 1, "text", batch=1, heads=1, kv_heads=1, pivot_bias=-0.5),
    three_region("one_window", 131, 64, 128, 2, "text", batch=1, heads=1, kv_heads=1),
    three_region("large_bias", 135, 32, 16, 1, "text", batch=1, heads=1, kv_heads=1, pivot_bias=13.0),
    three_region("many_splits", 250, 32, 8, 1, "few", batch=1, heads=3, kv_heads=1),
]


@on_cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_truth(impl: str, case: Case) -> None:
    dtype = TENSOR_CORE_DTYPES[CASES.index(case) % 2]
    assert_true(case, dtype, impl)


@on_cuda
@pytest.mark.parametrize("output", [0, 1], ids=["dout", "dlse"])
def test_truth_with_one_gradient(impl: str, output: int) -> None:
    assert_true(CASES[0], torch.bfloat16, impl, [output])


@on_cuda
@long
def test_strips_that_are_empty_in_some_phases(impl: str) -> None:
    """Of phases that differ by a cell, with coarse keys that such a strip does not see."""
    case = local_2d("phases", (10, 129), (1, 3), 32, batch=1, heads=1, kv_heads=1, dilation=(1, 8), coarse=(10, 129),
                    coarse_kernel_size=(7, 1))  # fmt: skip
    assert_true(case, torch.bfloat16, impl)


@on_cuda
@pytest.mark.parametrize("edge", ["clip", "shift"])
def test_entries_of_biases_that_no_window_has_do_not_matter(impl: str, edge: str) -> None:
    """And have no gradient; others may hide keys, here those to the left. The same bits twice."""
    case = local_2d("unseen", (5, 9), (3, 5), 32, batch=1, heads=2, kv_heads=1, biased="wide", edge=edge)
    inputs = case.inputs(torch.bfloat16, device_of(impl))
    inputs["bias"][:, :, :4] = -math.inf
    bad = inputs["bias"].clone()
    if edge == "clip":
        bad[:, [0, 4]] = bad[:, :, [0, 1, 7, 8]] = math.nan
    outputs, grads = run(case, inputs, impl)
    again, bad_grads = run(case, inputs | {"bias": bad}, impl)
    assert_bitwise([*again, *bad_grads.values()], [*outputs, *grads.values()])
    for k, truth in enumerate(case({k: x.double() for k, x in inputs.items()}, "reference")):
        torch.testing.assert_close(outputs[k].double(), truth, rtol=2e-2, atol=2e-2)
    unseen = bad.isnan() | inputs["bias"].isinf()
    assert not grads["bias"][unseen].any()
    assert grads["bias"][~unseen].all()


@on_cuda
def test_same_bits_in_any_layout_and_each_time(impl: str) -> None:
    case = CASES[0]
    inputs = case.inputs(torch.bfloat16, device_of(impl))
    expected = results(case, inputs, impl)
    for same in (heads_last(inputs), gaps(inputs, beside=8)):
        assert_bitwise(results(case, same, impl), expected)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_pivots_of_any_kind_are_safe(impl: str, dtype: torch.dtype) -> None:
    """Nothing looks at what they hold before the kernels, which read nowhere else than they may."""
    q, k, v = torch.randn(3, 2, 1, 150, 32, device=device_of(impl)).bfloat16()
    strange = torch.randint(-(2**31), 2**31 - 1, (2, 170), dtype=dtype, generator=torch.Generator().manual_seed(0))
    strange[0, ::3] %= 200
    if dtype == torch.int64:
        strange[1, ::5] += 2**40
    namespace = getattr(torch.ops, emulated_cuda.NAMESPACE if device_of(impl) == "cpu" else "cogview_ops")
    for pivots in (strange, strange.sort(-1).values, strange.sort(-1, descending=True).values):
        numbers = pivots.to(q.device), 16, 1, 0.0, 0.2
        out, lse = namespace.three_region_attention_fwd(q, k, v, *numbers)
        for x in (out, *namespace.three_region_attention_bwd(torch.ones_like(out), None, q, k, v, out, lse, *numbers)):
            assert x.shape == q.shape


def rows(dim: int = 32, of: int = 32, first: int = 0, dtype: torch.dtype = torch.bfloat16) -> Callable[[str], Tensor]:
    """Made on a device: a copy to another would be aligned."""
    return lambda device: torch.zeros(1, 2, 9, max(of, dim), dtype=dtype, device=device)[..., first : first + dim]


QKV = ("query", "key", "value")
REFUSED = [
    ("query: expected bfloat16 or float16, got torch.float32", dict.fromkeys(QKV, rows(dtype=torch.float32))),
    ("query: expected head_dim 32, 64, 96 or 128, got 40", dict.fromkeys(QKV, rows(40))),
    (
        "query: expected at most 67108864 tokens",
        dict.fromkeys(QKV, lambda device: rows()(device)[:, :, :1].expand(-1, -1, 2**26 + 1, -1)),
    ),
    ("key: expected rows aligned to 16 bytes", {"key": rows(of=36)}),
    ("value: expected rows aligned to 16 bytes", {"value": rows(of=40, first=1)}),
]


@on_cuda
@pytest.mark.parametrize(("message", "tensors"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refuses_what_kernels_do_not_take(impl: str, message: str, tensors: dict[str, Callable[[str], Tensor]]) -> None:
    device = device_of(impl)
    arguments = {name: make(device) for name, make in {**dict.fromkeys(QKV, rows()), **tensors}.items()}
    pivots = torch.zeros(1, 1, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=message):
        three_region_attention(**arguments, pivots=pivots, impl=impl)


@on_cuda
def test_gradients_of_any_alignment_are_taken(impl: str) -> None:
    x = torch.randn(1, 1, 20, 32, device=device_of(impl)).bfloat16()
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    out = three_region_attention(*leaves, some_pivots("text", 1, 20).to(x.device), block_size=4, impl=impl)
    dout = torch.randn(1, 1, 20, 33, device=x.device).bfloat16()[..., 1:]
    grads = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (dout, dout.contiguous())]
    assert_bitwise(list(grads[0]), list(grads[1]))


@on_cuda
def test_what_begins_anywhere_is_copied(impl: str) -> None:
    """A graph does not know where tensors begin, and leaves that to the bindings."""
    whole = torch.randn(3, 1, 2, 40, 40, device=device_of(impl)).bfloat16()
    namespace = getattr(torch.ops, emulated_cuda.NAMESPACE if impl == "cuda" and not whole.is_cuda else "cogview_ops")
    numbers = some_pivots("text", 1, 40).to(whole.device), 4, 2, 0.0, 0.2
    results = []
    for q, k, v in (whole[..., 1:33], whole[..., 1:33].clone()):
        out, lse = namespace.three_region_attention_fwd(q, k, v, *numbers)
        results.append((out, lse, *namespace.three_region_attention_bwd(out, lse, q, k, v, out, lse, *numbers)))
    assert_bitwise(list(results[0]), list(results[1]))


@on_cuda
def test_windows_that_do_not_fit_are_refused(impl: str) -> None:
    x = torch.zeros(1, 1, 400, 64, dtype=torch.bfloat16, device=device_of(impl))
    for kernel_size, most in (((1, 19), "fewer columns"), ((27, 3), "at most 25 rows with so many columns")):
        with pytest.raises(RuntimeError, match=f"kernel_size: expected {most} for head_dim 64 here, got"):
            local_attention_2d(x, x, x, grid=(20, 20), kernel_size=kernel_size, impl=impl)


# --- which of the two kernels ----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which(kept_build.COMPILER[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["CLIPPED", "SHIFTED", "SHIFTED_IN_SMALL"])
def test_what_is_let_through_fits(name: str) -> None:
    """The tables of windows, against the plan that cuts them."""
    here = kept_build.Object(Path(__file__).parents[1] / "cuda_choices.cpp", ["-std=c++17", "-fPIC", "-O1"])
    library = ctypes.CDLL(str(kept_build.build(ROOT / "build" / "choices", "choices", [here])))
    library.fits.restype = ctypes.c_bool
    table, how = getattr(_cuda_limits, name), (name != "CLIPPED", name == "SHIFTED")
    for size, dims in table.items():
        for dim, columns in itertools.product(dims, range(1, _cuda_limits.COLUMNS[-1] + 1, 2)):
            most = _cuda_limits.most_rows(table, dim, columns, size * 1024)
            for rows in range(1, most + 1, 2):
                assert library.fits(dim, rows, columns, *how, size * 1024), (size, dim, rows, columns)
            assert not library.fits(dim, 35, columns, *how, size * 1024)


def test_auto_takes_what_was_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    op, cuda = f"{OP}_fwd", torch.device("cuda")
    monkeypatch.setattr(_dispatch, "reason_unavailable", lambda op, impl: None)
    monkeypatch.setitem(_dispatch._triton, op, ("cuda",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    both, mixed, triton = "cogview_ops", "cogview_ops_mixed", "cogview_ops_triton"
    for ratios, name in (((1.2, 1.1), both), ((1.2, 0.9), mixed), ((0.9, 1.2), triton), ((0.9, 0.9), triton)):
        monkeypatch.setattr(_measured, "RATIOS", {(9, 0): {(OP, 64): ratios}})
        first = _measured.cuda_first(op, cuda, 64)
        assert _dispatch._namespace(op, "auto", "cuda", first, None) == name
        assert _dispatch._namespace(op, "auto", "cuda", first, "a reason") == triton
        assert _dispatch._namespace(op, "cuda", "cuda", first, None) == both
        assert _measured.cuda_first(op, cuda, 128) == (False, False)
        assert _measured.cuda_first(op, torch.device("xpu"), 64) == (False, False)
    with pytest.raises(RuntimeError, match="cannot run on a cuda tensor: cuda: a reason"):
        _dispatch._namespace(op, "cuda", "cuda", (True, True), "a reason")
    monkeypatch.setattr(_dispatch, "reason_unavailable", lambda op, impl: "no Triton" if impl == "triton" else None)
    assert _dispatch._namespace(op, "auto", "cuda", (True, False), None) == both
