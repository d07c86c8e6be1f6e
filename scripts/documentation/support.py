"""What each operator takes on each device, as the code itself answers: the manifest, and calls of every operator with
every option, run on this CPU or asked of what the CUDA C++ kernels take."""

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import cogview_ops
from cogview_ops import _checks, _cuda_limits, _dispatch, _manifest

from .calls import CALLS, Call

YES, NO = "✓", "–"
HEAD_DIMS = (1, 16, 32, 48, 64, 80, 96, 128, 192, 256)
OPTIONS = "| option | CPU | CUDA C++ | Triton |", "|---|---|---|---|"
GPUS = {"H100": 227, "A100": 163, "L40S, RTX 4090": 99}  # KB of shared memory that a block may have


class Asked(Exception):
    """What the CUDA C++ kernels say to a call: None or why not."""


def ask_cuda(op: str, impl: str, x: Tensor, limits: Callable[[], str | None] | None = None) -> str:
    raise Asked(limits() if limits else None)


def cuda(call: Call, dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> str | None:
    """Nothing runs: the tensors have no storage, and the question comes before the choice of a kernel."""
    with mock.patch.object(_dispatch, "select", ask_cuda), torch.device("meta"):
        try:
            call.run(dtype, head_dim, "cuda", options)
        except Asked as answer:
            return answer.args[0]
    raise AssertionError("a call that chooses no kernel")


def cpu(call: Call, dtype: torch.dtype, head_dim: int, options: dict[str, Any]) -> str | None:
    """Runs it, with its derivative where it has one. Other errors than of the dtype are those of calls.py."""
    try:
        out = call.run(dtype, head_dim, "cpp", options)
    except TypeError as error:
        return str(error)
    if wanted := [x for x in out if x.requires_grad]:
        torch.autograd.backward(wanted, [torch.ones_like(x) for x in wanted])
    return None


def tables() -> str:
    if lacking := missing():
        raise LookupError(f"documentation/calls.py has no call with {', '.join(lacking)}")
    parts = ["## Kernels", kernels(), "## Dtypes and head_dim", dtypes(), "## Largest windows in CUDA C++", windows()]
    return "\n\n".join([*parts, "## Options", options()])


def kernels() -> str:
    rows = ["| operator | made of | derivative | CPU | CUDA C++ | Triton |", "|---|---|---|---|---|---|"]
    for operator in _manifest.OPERATORS.values():
        own = operator.made_of == "kernels"
        made = {"kernels": "its own kernels", "operators": "other operators", "torch": "plain torch"}[operator.made_of]
        there = [YES if one else NO for one in (own, operator.cuda, operator.triton)]
        cells = there if own else [{"operators": "as its parts", "torch": YES}[operator.made_of]] * 3
        page = f"[`{operator.name}`](operators/{stem(operator.name)}.md)"
        rows.append(f"| {page} | {made} | {YES if operator.differentiable else NO} | {' | '.join(cells)} |")
    return "\n".join(rows)


def stem(name: str) -> str:
    """Of the operator's file, and its page."""
    return inspect.unwrap(getattr(cogview_ops, name)).__module__.rpartition(".")[2]


def dtypes() -> str:
    """Only what has limits differs: attention in CUDA C++."""
    names = [str(dtype).removeprefix("torch.") for dtype in _checks.FLOATS]
    head = f"| operator | kernels | {' | '.join(names)} | head_dim |"
    rows = [head, "|---|---|" + "---|" * (len(names) + 1)]
    for operator in _manifest.KERNELS:
        call = CALLS[operator.name]
        asked = {"CPU": cpu} | ({"CUDA C++": cuda} if operator.cuda else {})
        for kind, answer in asked.items():
            takes = [YES if answer(call, dtype, 64, {}) is None else NO for dtype in _checks.FLOATS]
            rows.append(f"| `{operator.name}` | {kind} | {' | '.join(takes)} | {head_dims(call, answer)} |")
        if operator.triton:
            rows.append(f"| `{operator.name}` | Triton | {' | '.join(YES for _ in names)} | {triton_dims(call)} |")
    return "\n".join(rows)


def head_dims(call: Call, answer: Any) -> str:
    if not call.has_heads:
        return ""
    taken = [dim for dim in HEAD_DIMS if answer(call, torch.bfloat16, dim, {}) is None]
    return "any" if len(taken) == len(HEAD_DIMS) else ", ".join(map(str, taken))


def triton_dims(call: Call) -> str:
    from cogview_ops.triton.configs import ANY

    return f"to {min(max(row) for row in ANY.values())}" if call.has_heads else ""


def options() -> str:
    """Of each operator with kernels, each of its options."""
    parts = []
    for operator in _manifest.KERNELS:
        rows = [f"| {name} | {' | '.join(answers)} |" for name, answers in taken(operator).items()]
        parts.append("\n".join([f"### {operator.name}", "", *OPTIONS, *rows]))
    return "\n\n".join(parts)


def taken(operator: _manifest.Operator) -> dict[str, list[str]]:
    """By option, what CPU, CUDA C++ and Triton say. Triton's kernels have no limits of their own."""
    call, found = CALLS[operator.name], {}
    for name, how in call.options.items():
        answers = [cpu(call, torch.bfloat16, 64, how), cuda(call, torch.bfloat16, 64, how) if operator.cuda else NO]
        answers.append(None if operator.triton else NO)
        found[name] = [YES if one is None else one for one in answers]
    return found


def windows() -> str:
    """Rows of the largest windows of local attention in CUDA C++."""
    columns = _cuda_limits.COLUMNS
    kinds = {"clip": _cuda_limits.CLIPPED, "shift": _cuda_limits.SHIFTED}
    head = f"| GPU | edge | head_dim | {' | '.join(f'to {n} columns' for n in columns)} |"
    rows = [head, "|---|---|---|" + "---:|" * len(columns)]
    for gpu, room in GPUS.items():
        for edge, table in kinds.items():
            for dim in _cuda_limits.HEAD_DIMS:
                most = [_cuda_limits.most_rows(table, dim, n, room * 1024) for n in columns]
                rows.append(f"| {gpu} | {edge} | {dim} | {' | '.join(str(n) if n else NO for n in most)} |")
    return "\n".join(rows)


def limits(*names: str) -> str:
    """For their pages: dtypes and head_dims of some operators, and the options that not all of their kernels take."""
    head, rule, *rows = dtypes().splitlines()
    parts = ["\n".join([head, rule, *(row for row in rows if any(f"`{name}`" in row for name in names))])]
    for name in names:
        operator = _manifest.OPERATORS[name]
        there = [True, operator.cuda, operator.triton]
        rows = [
            f"| {option} | {' | '.join(answers)} |"
            for option, answers in taken(operator).items()
            if any(has and one != YES for has, one in zip(there, answers, strict=True))
        ]
        if rows:
            parts.append("\n".join([f"What not all kernels of `{name}` take:", "", *OPTIONS, *rows]))
    return "\n\n".join([*parts, "All else is taken by all: [the whole table](../support.md)."])


def missing() -> list[str]:
    """Options of operators that no call has."""
    found = []
    for name in CALLS:
        tried = set().union(*CALLS[name].options.values()) | set(CALLS[name].always)
        for parameter in inspect.signature(getattr(cogview_ops, name)).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in tried | {"impl"}:
                found.append(f"{name}: {parameter.name}")
    return found
