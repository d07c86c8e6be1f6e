"""What the operator tests share: cases as data, implementations, layouts, and the comparison with the truth.

A case is one call of a public operator without its floating-point values. The same lists serve the tests of truth,
strides, poisoned allocations, opcheck and the instruction sets.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import emulated_cuda
import pytest
import torch
from torch import Tensor

import cogview_ops
from cogview_ops import _cuda_limits, _dispatch
from cogview_ops._manifest import OPERATORS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# what CUDA kernels on tensor cores take
TENSOR_CORES = {"three_region_attention", "three_region_attention_varlen", "local_attention_2d"}
TENSOR_CORE_DTYPES, TENSOR_CORE_HEAD_DIMS = DTYPES[2:], (32, 64, 96, 128)
Inputs = dict[str, Tensor]


class Case(NamedTuple):
    op: str  # name of the public function
    label: str
    shapes: dict[str, tuple[int, ...]]  # floating-point arguments, drawn from N(0, 1)
    options: dict[str, Any]  # all others, integer and bool tensors included
    wide: tuple[str, ...] = ()  # arguments in float32 where the others have 16 bits

    @property
    def differentiable(self) -> bool:
        return OPERATORS[self.op].differentiable

    @property
    def packed(self) -> bool:
        """Attention of `[total, H, D]`."""
        return len(self.shapes.get("query", ())) == 3

    @property
    def of_rows(self) -> bool:
        """No attention: every row of the first argument for itself."""
        return "query" not in self.shapes

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """The same values in every dtype but for rounding."""
        wide = self.wide if dtype.itemsize == 2 else ()
        generator = torch.Generator().manual_seed(zlib.crc32(self.label.encode()))
        draw = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return {name: x.to(device, torch.float32 if name in wide else dtype) for name, x in draw.items()}

    def __call__(self, inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
        """All outputs of the operator, as a tuple. Skips the test where a kernel does not take the tensors."""
        first = next(iter(inputs.values()))
        skip_uncomputable(first.dtype, impl, self.op)
        skip_beyond_limits(impl, self.op, first, self.options)
        device = next(iter(inputs.values())).device
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        out = getattr(cogview_ops, self.op)(**inputs, **options, impl=impl)
        return out if isinstance(out, tuple) else (out,)


def results(case: Case, inputs: Inputs, impl: str) -> list[Tensor]:
    """Outputs, and gradients where there are any."""
    if not case.differentiable:
        return list(case(inputs, impl))
    outputs, grads = run(case, inputs, impl)
    return [*outputs, *grads.values()]


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {k} differs by {(a - b).abs().max().item():.3g}"


def each(cases: Sequence[Case]) -> Any:
    """Parametrise over (impl, case); one skip per operator and implementation that cannot run here."""
    table = []
    for impl in ("cpp", "cuda", "triton"):
        for op in dict.fromkeys(case.op for case in cases):
            reason = unavailable(op, impl)
            mine = [case for case in cases if case.op == op]
            if reason:
                mark = pytest.mark.skip(reason=f"{op}, {impl}: {reason}")
                table.append(pytest.param(impl, mine[0], id=f"{impl}-{op}", marks=mark))
            else:
                chosen = runnable(mine, impl)
                assert chosen, f"{op}: none of these cases can run on {impl}"
                table += [pytest.param(impl, case, id=f"{impl}-{case.label}") for case in chosen]
    return pytest.mark.parametrize(("impl", "case"), table)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter, in the repository's root."""
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env={**os.environ, **environment}, capture_output=True, text=True
    )


def show_packages(there: Path, folder: Path, site: Path, hidden: str) -> None:
    """An environment's packages, but for those whose names begin like `hidden`, in another one, by links in `folder`:
    outside it, where nobody uninstalls them."""
    folder.mkdir()
    for path in there.iterdir():
        if not re.match(hidden, path.name):
            (folder / path.name).symlink_to(path)
    (site / "shown.pth").write_text(f"{folder}\n")


needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def preloaded() -> str:
    """How to start processes as copies of one that has imported what takes long. They print where that one did."""
    torch.multiprocessing.set_forkserver_preload(["torch.distributed.tensor.parallel", "cogview.train.loop"])
    return "forkserver"


def in_two_processes(work: Callable[[Any], None]) -> None:
    """work(their mesh) in each, a function of a module that can be imported."""
    with tempfile.TemporaryDirectory() as folder:
        how = preloaded()
        torch.multiprocessing.start_processes(_one_of_two, (f"file://{folder}/store", work), nprocs=2, start_method=how)


def _one_of_two(rank: int, store: str, work: Callable[[Any], None]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    work(torch.distributed.init_device_mesh("cpu", (2,)))
    # gloo's threads may still hold tensors; they would abort an interpreter that ends (pytorch/pytorch#179291)
    os._exit(0)


def each_impl(op: str, cases: Iterable[Any] = (), narrow: bool = True) -> pytest.MarkDecorator:
    """Parametrise `impl` (and `case`) over the fused implementations; one that cannot run here is one skipped test.

    `op` is the public name. The reference is the truth, so it is not among them. Not `narrow`: without kernels for 16
    bits only, which other tests are for.
    """
    cases = list(cases)
    table = []
    for impl in ("cpp", "cuda", "triton"):
        reason = unavailable(op, impl)
        if not narrow and narrow_only(op, impl):
            reason = "it has tests of its own"
        if reason:
            nothing = (impl, None) if cases else (impl,)
            table.append(pytest.param(*nothing, id=impl, marks=pytest.mark.skip(reason=f"{op}, {impl}: {reason}")))
        elif cases:
            chosen = runnable(cases, impl)
            assert chosen, f"{op}: none of these cases can run on {impl}"
            table += [pytest.param(impl, case, id=f"{impl}-{case.label}") for case in chosen]
        else:
            table.append(pytest.param(impl, id=impl))
    return pytest.mark.parametrize(("impl", "case") if cases else ("impl",), table)


def each_probe(op: str, *narrow: torch.dtype, cuda: bool = True) -> pytest.MarkDecorator:
    """Parametrise `impl` as each_impl does, and `dtype`: float64, which shows all there is to see, float16 for kernels
    on tensor cores, and for the kernels of CPUs that multiply pairs of bfloat16 `narrow` dtypes (default: bfloat16)."""
    exact = {impl: torch.float16 if narrow_only(op, impl) else torch.float64 for impl in ("cpp", "cuda", "triton")}
    table = [
        pytest.param(*x.values, exact[x.values[0]], id=x.id, marks=x.marks) for x in each_impl(op, narrow=cuda).args[1]
    ]
    if unavailable(op, "cpp") is None and _dispatch._C.active_cpu() in ("avx512bf16", "amx"):
        table += [pytest.param("cpp", dtype, id=f"cpp-{dtype}") for dtype in narrow or [torch.bfloat16]]
    return pytest.mark.parametrize(("impl", "dtype"), table)


def interpreted(impl: str) -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: see conftest.py."""
    return impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def some(table: Iterable[Any], impl: str, step: int) -> list[Any]:
    """All, or for the CUDA emulator each step-th."""
    table = list(table)
    return table[step // 2 :: step] if impl == "cuda" and not torch.cuda.is_available() else table


def runnable(cases: Sequence[Case], impl: str) -> Sequence[Case]:
    """Of some cases those with heads that a kernel takes; and those made for the interpreter, which takes 0.01 s for
    a tile's forward and 0.006 s for eight rows, or for the CUDA emulator, which takes 0.1 s for forward and backward of
    64 rows."""
    if impl == "cuda":
        heads = [case for case in cases if case.op not in TENSOR_CORES or on_tensor_cores(case)]
        return [case for case in heads if torch.cuda.is_available() or case.op not in TENSOR_CORES or is_small(case)]
    if not interpreted(impl):
        return cases
    return [
        case
        for case in cases
        if case.label.startswith("tiny")
        or not case.differentiable
        or any(0 in x for x in case.shapes.values())
        or (case.of_rows and all(math.prod(x) <= 1200 for x in case.shapes.values()))
    ]


def on_tensor_cores(case: Case) -> bool:
    return case.shapes["query"][-1] in TENSOR_CORE_HEAD_DIMS


def is_small(case: Case) -> bool:
    *sizes, dim = case.shapes["query"]
    return math.prod(sizes) * (1 if case.op == "local_attention_2d" else dim / 130) <= 100


def narrow_only(op: str, impl: str) -> bool:
    """Whether a kernel takes 16 bits only."""
    return impl == "cuda" and op in TENSOR_CORES


def assert_same(actual: Iterable[Tensor], expected: Iterable[Tensor], impl: str) -> None:
    """To the bit. But not on a GPU: layouts decide how wide Triton reads, and that in which order it adds; CUDA's
    kernels for rows that are not aligned are compiled on their own, with other products fused into sums."""
    for k, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if device_of(impl) == "cpu":
            assert torch.equal(a, b), f"result {k} differs by {(a - b).abs().max().item():.3g}"
        else:
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=32 * eps, atol=32 * eps)


def computable(dtype: torch.dtype, impl: str, op: str = "") -> torch.dtype:
    """The interpreter computes bfloat16 wrongly; float16 then stands for it. 16 bits where a kernel takes no more."""
    if narrow_only(op, impl) and dtype not in TENSOR_CORE_DTYPES:
        return torch.bfloat16
    return torch.float16 if interpreted(impl) and dtype == torch.bfloat16 else dtype


def skip_uncomputable(dtype: torch.dtype, impl: str, op: str = "") -> None:
    if computable(dtype, impl, op) != dtype:
        cuda = "the CUDA kernels of this operator take float16 and bfloat16"
        pytest.skip(cuda if impl == "cuda" else "Triton's interpreter computes bfloat16 wrongly")


def skip_beyond_limits(impl: str, op: str, query: Tensor, options: dict[str, Any]) -> None:
    """Where a CUDA kernel on tensor cores is not made for a call, or not in the emulated library."""
    if impl != "cuda" or op != "local_attention_2d":
        return
    name, head_dim = "bf16" if query.dtype == torch.bfloat16 else "f16", query.shape[-1]
    if not torch.cuda.is_available() and (name, head_dim) not in emulated_cuda.LOCAL_SHAPES:
        pytest.skip(f"{name} with heads of {head_dim} is emulated under COGVIEW_TESTS=all")
    edge, dilation = options.get("edge", "clip"), options.get("dilation", 1)
    window = options["grid"], options["kernel_size"], dilation, edge
    if why := _cuda_limits.local_2d(window, options.get("coarse_kernel_size"), query=query):
        pytest.skip(why)


def skip_emulated(op: str, impl: str) -> None:
    """What takes the emulator long, of kernels that take it long; it runs one launch at a time."""
    if narrow_only(op, impl) and not torch.cuda.is_available() and os.environ.get("COGVIEW_TESTS") != "all":
        pytest.skip("takes the CUDA emulator long: COGVIEW_TESTS=all")


def skip_slow(impl: str, unless: bool = False) -> None:
    if interpreted(impl) and not unless:
        pytest.skip("takes Triton's interpreter long")


def unavailable(op: str, impl: str) -> str | None:
    name = OPERATORS[op].forward
    if impl == "cuda" and not torch.cuda.is_available() and emulated_cuda.has(name):
        return emulated_cuda.missing()
    reason = _dispatch.reason_unavailable(name, impl)
    if reason is None and impl != "cpp" and not interpreted(impl) and not torch.cuda.is_available():
        reason = "no GPU"
    return reason


def device_of(impl: str) -> str:
    """Where its tensors are; without a GPU CUDA kernels are emulated or not there."""
    if impl == "cuda":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if impl in ("cpp", "reference") or interpreted(impl) else "cuda"


def identity(keys: int, impl: str) -> Tensor:
    """The values of a probe: row k is key k's. Columns of zeros make the width one of those that a kernel takes, or one
    of few, since Triton compiles for each."""
    unit = {"triton": 64, "cuda": 64}.get(impl, 1)
    width = -(-keys // unit) * unit
    if impl == "cuda" and width not in TENSOR_CORE_HEAD_DIMS:
        pytest.skip("more keys than a head has elements there")
    return torch.eye(keys, width, dtype=torch.float64)


def assert_probed(actual: Tensor, weights: Tensor, what: str) -> None:
    """A probe's result is `weights` but for rounding: of 16 bits each to 1 or 2 %, and zeros are zeros."""
    dtype = actual.dtype
    how = {"rtol": 0.0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.0}
    assert torch.allclose(actual.detach().cpu().double(), weights, **how), what


def every_isa(test: Callable[..., None]) -> Any:
    """Run a test once for each instruction set of this build that this processor has."""
    names = _dispatch._C.supported_cpu() if _dispatch._C else []
    return pytest.mark.parametrize("isa", names, indirect=True)(test)


# --- gradients and truth ---------------------------------------------------------------------------------------------


def run(
    case: Case,
    inputs: Inputs,
    impl: str,
    which: Sequence[int] | None = None,
    rounding: torch.dtype = torch.float64,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, and the gradient of each input for random gradients of the outputs numbered in `which` (default: all).

    `rounding`: dtype that the gradients handed in are rounded to, so that runs in several dtypes get the same ones.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = case(leaves, impl)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=generator).to(x.device, rounding).to(x.dtype) for x in outputs]
    used = [k for k in range(len(outputs)) if which is None or k in which]
    torch.autograd.backward([outputs[k] for k in used], [grads[k] for k in used])
    results = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return tuple(out.detach() for out in outputs), results


def spread_out(monkeypatch: pytest.MonkeyPatch, shape: torch.Size) -> list[Tensor]:
    """What kernels are given of this shape from now on lies apart in memory, as torch's shards may. All of it."""
    below, given = _dispatch.below_autograd, []

    def spread(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.shape != shape:
            return x
        given.append(torch.stack((x, x.new_full(x.shape, torch.nan)), -1)[..., 0])
        return given[-1]

    monkeypatch.setattr(_dispatch, "below_autograd", lambda *args: below(*map(spread, args)))
    return given


def assert_true(case: Case, dtype: torch.dtype, impl: str, which: Sequence[int] | None = None) -> None:
    """Outputs and gradients of one case are as near the float64 truth as the plain formula in the same dtype."""
    skip_uncomputable(dtype, impl, case.op)
    inputs = case.inputs(dtype, device_of(impl))
    wide = {name: x.double() for name, x in inputs.items()}
    outputs, grads = run(case, inputs, impl, which, dtype)
    true_outputs, true_grads = run(case, wide, "reference", which, dtype)
    formula_outputs, formula_grads = run(case, inputs, "reference", which, dtype)
    for k, (out, truth, formula) in enumerate(zip(outputs, true_outputs, formula_outputs, strict=True)):
        assert_as_good_as(out, truth, formula, f"output {k}")
    for name, grad in grads.items():
        assert_as_good_as(grad, true_grads[name], formula_grads[name], f"gradient of {name}")


def assert_as_good_as(actual: Tensor, truth: Tensor, formula: Tensor, what: str = "result") -> None:
    """Error against `truth` (float64) at most twice that of `formula` (plain torch in actual's dtype), max and RMS.

    On top: one rounding of the result to its dtype, and 64 roundings of the accumulator's (float64's or float32's)
    epsilon on terms of order one, for sums that cancel and for cases where the formula happens to be exact.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == formula.dtype, f"{what}: dtype {actual.dtype}, expected {formula.dtype}"
    if not actual.numel():
        return
    actual, truth, formula, dtype = actual.double(), truth.double(), formula.double(), actual.dtype
    finite = truth.isfinite()
    assert torch.equal(actual[~finite], truth[~finite]), f"{what}: differs where the truth is infinite"
    actual, truth, formula = actual[finite], truth[finite], formula[finite]
    assert actual.isfinite().all(), f"{what}: {int((~actual.isfinite()).sum())} values are not finite"
    if not actual.numel():
        return
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    size = truth.abs().max().item()
    floor = torch.finfo(dtype).eps / 2 * size + 64 * torch.finfo(accumulator).eps * max(size, 1.0)
    error, allowed = (actual - truth).abs(), (formula - truth).abs()
    for measure, e, a in (("max", error.max(), allowed.max()), ("RMS", _rms(error), _rms(allowed))):
        limit = 2 * a.item() + floor / (1 if measure == "max" else 2)
        assert e.item() <= limit, (
            f"{what}: {measure} error {e.item():.3g}, formula's {a.item():.3g}, allowed {limit:.3g} "
            f"(largest value {size:.3g}, worst at flat index {int(error.argmax())} of {error.numel()} finite ones)"
        )


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


# --- layouts: the same values, other strides -------------------------------------------------------------------------


def heads_last(inputs: Inputs) -> Inputs:
    """[B, H, S, D] as a view of a contiguous [B, S, H, D]."""
    return {k: x.transpose(-2, -3).contiguous().transpose(-2, -3) if x.dim() > 2 else x for k, x in inputs.items()}


def gaps(inputs: Inputs, beside: int = 3) -> Inputs:
    """Slices of larger tensors whose rest is NaN, `beside` elements of it next to each row."""
    out = {}
    for name, x in inputs.items():
        room = x.new_full([2 * n + 1 for n in x.shape[:-1]] + [x.shape[-1] + beside], math.nan)
        view = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape[:-1])][..., : x.shape[-1]]
        out[name] = view.copy_(x)
    return out


def expanded(inputs: Inputs) -> Inputs:
    """Sample 0 for the whole batch, at stride 0."""
    return {k: x[:1].expand_as(x) if x.dim() > 1 else x for k, x in inputs.items()}


def packed(inputs: Inputs) -> Inputs:
    """The first three arguments in one [B, S, 3, H, D] tensor, as a fused projection makes them."""
    names = list(inputs)[:3]
    first = [inputs[name] for name in names]
    if all(x.dim() == 3 and len(x) == len(first[0]) for x in first) and "query" in inputs:  # packed sequences
        parts = torch.cat(first, 1).split([x.shape[1] for x in first], 1)
        return {**inputs, **dict(zip(names, parts, strict=True))}
    if any(x.dim() != 4 or x.shape[2] != first[0].shape[2] for x in first):
        return heads_last(inputs)
    together = torch.cat([x.transpose(1, 2) for x in first], 2)
    parts = together.split([x.shape[1] for x in first], 2)
    return {**inputs, **{name: x.transpose(1, 2) for name, x in zip(names, parts, strict=True)}}


LAYOUTS = (heads_last, gaps, expanded, packed)


# --- bad arguments ---------------------------------------------------------------------------------------------------


def refused(call: Callable[..., Any], arguments: dict[str, Any], name: str, value: Any, error: type[Exception]) -> None:
    """The call raises `error` because of argument `name`, and says what was expected and what came."""
    with pytest.raises(error, match=rf"^{name}: expected .+, got .+"):
        call(**{**arguments, name: value})
