"""The forward of CUDA C++ with the backward of Triton, `cogview_ops_mixed`: what auto takes where each is the faster.

Without a GPU the forward is that of CPUs, and Triton's kernels are interpreted.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import local_2d, three_region, varlen
from common import Case, assert_as_good_as, assert_bitwise, unavailable
from common import run as run_case

from cogview_ops import _dispatch, _measured

NAME = "cogview_ops_mixed"
OPS = "three_region_attention", "three_region_attention_varlen", "local_attention_2d"
GPU = torch.cuda.is_available()
DTYPE, DIM = (torch.bfloat16, 32) if GPU else (torch.float32, 8)
CASES = [
    three_region("tiny", 40, DIM, 4, 2, "text", heads=2, kv_heads=1),
    varlen("tiny_packed", (23, 0, 9), DIM, 4, 1, heads=2, kv_heads=1),
    local_2d("tiny_local", (3, 4), (3, 3), DIM, batch=2, heads=1, kv_heads=1, prefix=3),
]
FIRST = "cuda" if GPU else "cpp"
missing = next((why for op in OPS for impl in (FIRST, "triton") if (why := unavailable(op, impl))), None)
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert _dispatch._load_triton() is None
    kernels = torch.library.Library(NAME, "IMPL")
    if not GPU:
        for op in OPS:
            kernels.impl(f"{op}_fwd", getattr(torch.ops.cogview_ops, f"{op}_fwd"), "CPU")
    select = _dispatch.select
    monkeypatch.setattr(
        _dispatch, "select", lambda op, impl, *rest: NAME if impl == "auto" else select(op, impl, *rest)
    )
    yield
    kernels._destroy()


@each_case
def test_forward_and_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = _dispatch.run

    def noted(namespace: str, name: str, *args: Any, **rest: Any) -> Any:
        ran.append((namespace, name))
        return run(namespace, name, *args, **rest)

    inputs = case.inputs(DTYPE, "cuda" if GPU else "cpu")
    expected = case(inputs, FIRST)
    monkeypatch.setattr(_dispatch, "run", noted)
    outputs, grads = run_case(case, inputs, "auto", rounding=DTYPE)
    assert ran == [(NAME, f"{case.op}_fwd"), ("cogview_ops_triton", f"{case.op}_bwd")]
    assert_bitwise(list(outputs), list(expected))
    _, truth = run_case(case, {name: x.double() for name, x in inputs.items()}, "reference", rounding=DTYPE)
    _, formula = run_case(case, inputs, "reference", rounding=DTYPE)
    for name, grad in grads.items():
        assert_as_good_as(grad, truth[name], formula[name], name)


@each_case
def test_opcheck_and_one_graph(case: Case) -> None:
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == NAME:
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    inputs = case.inputs(DTYPE, "cuda" if GPU else "cpu")
    with Recorder():
        case(inputs, "auto")
    ((func, args),) = calls
    leaves = (x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
    torch.library.opcheck(
        func, tuple(leaves), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: case(x, "auto"), fullgraph=True, backend="aot_eager")
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = compiled(leaves)
    grads = torch.autograd.grad([x.sum() for x in outputs], list(leaves.values()))
    eager = torch.autograd.grad([x.sum() for x in case(leaves, "auto")], list(leaves.values()))
    assert_bitwise(list(grads), list(eager))


@pytest.mark.parametrize("limit", [None, "it is too large"])
def test_sharding_rules_come_after_the_choice(monkeypatch: pytest.MonkeyPatch, limit: str | None) -> None:
    """Which may load Triton: first calls with DTensors need the rules of what it chose."""
    monkeypatch.undo()
    happened = []

    def choice(*args: Any) -> str:
        happened.append("choice")
        return NAME

    monkeypatch.setattr(_measured, "cuda_first", lambda *args: (True, False))
    monkeypatch.setattr(_dispatch, "_namespace", choice)
    monkeypatch.setattr(_dispatch, "_known_namespace", choice)
    monkeypatch.setattr(_dispatch._sharding, "register", lambda: happened.append("rules"))
    x = torch.nn.Parameter(torch.empty(1, 1, 4, 32, device="meta"))  # no plain tensor
    assert _dispatch.select("three_region_attention_fwd", "auto", x, lambda: limit) == NAME
    assert happened == ["choice", "rules"]
