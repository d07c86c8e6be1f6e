"""Which of our own kernels an operator's call runs on a GPU, where it has several."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from cogview_ops import _dispatch
from cogview_ops.bench.problems import Problem

BOTH = {"cuda": "triton", "triton": "cuda", "mixed": "triton"}
COMPILED = {"cpu": "cpp", "cuda": "cuda"}  # by device


def chosen(call: Callable[[], Any]) -> tuple[str, set[str]]:
    """What impl="auto" took in a call, and for which torch operators; several, joined by "+"."""
    select = _dispatch.select
    found, operators = set(), set()

    def noted(op: str, impl: str, x: Any, limits: Any = None) -> str | None:
        namespace = select(op, impl, x, limits)
        compiled = {"cogview_ops": COMPILED.get(x.device.type, ""), "cogview_ops_triton": "triton"}
        compiled["cogview_ops_mixed"] = "mixed"
        found.add(compiled.get(namespace or "", "reference"))
        operators.add(op)
        return namespace

    with mock.patch.object(_dispatch, "select", noted):
        call()
    return "+".join(sorted(found)), operators


def of(problem: Problem) -> tuple[str, str | None]:
    """The implementation that "auto" takes for `ours`, and the other of two on a GPU."""
    mine, operators = chosen(lambda: problem.ours(*problem.inputs))
    other = BOTH.get(mine)
    if other == "cuda" and not all(_has_cuda(op) for op in operators):
        return mine, None
    return mine, other


def _has_cuda(op: str) -> bool:
    """Or would, in a build that has its CUDA part: that it is missing here is to be seen in the row."""
    return op in _dispatch._WITH_CUDA or _dispatch.reason_unavailable(op, "cuda") is None
