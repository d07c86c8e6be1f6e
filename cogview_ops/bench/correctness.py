"""Results first: what is wrong, or cannot run here, is never timed."""

import math
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .problems import Problem
from .words import why

# relative error in the 2-norm against float64; a baseline may be worse: it rounds scores to its dtype
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BASELINE_SLACK = 5.0


def contestants(
    problem: Problem,
    backward: bool,
    kernels: dict[str, Callable[..., Any]] | None = None,
    slack: float = BASELINE_SLACK,
    patience: float = math.inf,
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Calls to time, "ours" last, and the reasons why others are not: wrong here, or cannot run here. `kernels` are
    others of our own, which must be as good as "ours"; a baseline's error may be `slack` times as
    large, and its first call take `patience` seconds."""
    own = {**(kernels or {}), "ours": problem.ours}
    run = partial(results, problem.inputs, backward)
    sampled = tuple(problem.sample(x).double() for x in problem.inputs)
    expected = results(sampled, backward, problem.truth or partial(problem.ours, impl="reference"))
    tolerance = TOLERANCE[problem.inputs[0].dtype]
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, function in (problem.baselines | problem.others | own).items():
        if isinstance(function, str):
            failed[name] = function
            continue
        begin = perf_counter()
        try:
            got = run(function)
        except Exception as error:
            failed[name] = why(error)
            continue
        took = perf_counter() - begin
        if name not in own and took > patience:
            failed[name] = f"left out, a call takes {took:.0f} s"
            continue
        if name not in problem.others:
            wrong = mismatch(got, expected, problem, tolerance * (1 if name in own else slack))
            if wrong:
                failed[name] = wrong
                continue
        calls[name] = partial(run, function)
    return calls, failed


def results(inputs: tuple[Tensor, ...], backward: bool, function: Callable[..., Any]) -> tuple[Tensor, ...]:
    """Outputs, and with backward the gradients of all inputs."""
    inputs = tuple(x.detach().requires_grad_(backward) for x in inputs)
    out = function(*inputs)
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    if not backward:
        return outs
    # the gradient of the output is the first input: any values would do, of that shape
    return outs + torch.autograd.grad(outs, inputs, [inputs[0].detach()] * len(outs))


def mismatch(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], problem: Problem, tolerance: float) -> str | None:
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        error = float((problem.sample(x.detach()).double() - y.detach()).norm() / y.detach().norm())
        if not error <= tolerance:
            return f"result {i} is off by {error:.1e} of its norm, allowed {tolerance:.0e}"
    return None
