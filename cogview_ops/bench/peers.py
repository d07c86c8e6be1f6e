"""`python -m cogview_ops.bench peers`: the operators beside other packages that are here; it installs nothing.

In each comparison all compute the same thing: whoever is further from our formula in float64 than we may be, forward or
backward, computes something else and is not timed. Sizes are those of models that use them.

torch-harmonics is not among them. Its NeighborhoodAttentionS2, the nearest to local_attention_2d, is attention on a
sphere: neighbourhoods are discs by great-circle distance, columns close to a circle, keys are weighted by the area of
their cell. It has no planar form, and no options that would make its pattern a window in an image.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import layer_norm as our_layer_norm
from .. import patterns, sandwich_rms_norm
from .. import rms_norm as our_rms_norm
from . import baselines, packages, problems, row_problems, table
from .clock import Clock
from .measure import Rows, direction, made, measured
from .problems import Contestant, Problem, on_gpu
from .words import why


class Peer(NamedTuple):
    module: str
    distribution: str
    gpu: bool  # runs on GPUs alone
    on_cpu: str = ""  # what its users should know of it there


PEERS = {
    "NATTEN": Peer("natten", "natten", False, "on a CPU it runs FlexAttention, by default not compiled"),
    "FlexAttention": Peer("torch.nn.attention.flex_attention", "torch", False),
    "Liger": Peer("liger_kernel", "liger-kernel", True),
    "quack": Peer("quack", "quack-kernels", True),
    "apex": Peer("apex", "apex", True),
}
NOT_COMPARED = (
    "torch-harmonics: not compared, it has no planar form: its neighbourhoods are discs on a sphere that is closed in "
    "longitude, their keys weighted by area"
)


class Comparison(NamedTuple):
    op: str
    shape: str
    build: Callable[..., Problem]


def _against(problem: Problem, ours: Callable[..., Any], **peers: Contestant) -> Problem:
    return replace(problem, ours=ours, baselines=peers, others={})


def _flex_runs(back: bool) -> bool:
    return on_gpu() or not back


def neighborhood(dtype: torch.dtype, back: bool, *, heads=8, grid=(56, 56), dim=32, kernel=(7, 7)) -> Problem:
    """NATTEN's windows."""
    window: dict[str, Any] = {"grid": grid, "kernel_size": kernel, "raster_causal": False, "edge": "shift"}

    def sees(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
        return patterns.local_2d(i, j, **window)

    problem = problems.neighborhood(dtype, back, heads=heads, grid=grid, dim=dim, kernel=kernel).only(["NATTEN"])
    flex = baselines.flex_attention(sees, grid[0] * grid[1]) if _flex_runs(back) else problems.NO_BACKWARD
    return _against(problem, problem.ours, FlexAttention=flex, **problem.baselines)


def three_region(dtype: torch.dtype, back: bool, *, heads=16, seqlen=4096) -> Problem:
    problem = problems.three_region(dtype, back, heads=heads, seqlen=seqlen)
    flex = problem.baselines["FlexAttention"] if _flex_runs(back) else problems.NO_BACKWARD
    return _against(problem, problem.ours, FlexAttention=flex)


def layer_norm(dtype: torch.dtype, back: bool, *, rows=8704, dim=2560) -> Problem:
    """Without PB-relax."""
    problem = row_problems.layer_norm(dtype, back, rows=rows, dim=dim)
    quack: Contestant = "has no derivative" if back else packages.quack_layer_norm(*problem.inputs[1:])
    ours = partial(our_layer_norm, relax=None)
    return _against(problem, ours, Liger=packages.liger_layer_norm, quack=quack, apex=packages.apex_layer_norm)


def rms_norm(dtype: torch.dtype, back: bool, *, rows=8192, dim=4096) -> Problem:
    """Rounded once, after the weight."""
    problem = row_problems.rms_norm(dtype, back, rows=rows, dim=dim)
    liger, quack, apex = packages.liger_plain_rms_norm, packages.quack_rms_norm, packages.apex_rms_norm
    return _against(problem, our_rms_norm, Liger=liger, quack=quack, apex=apex)


def add_rms_norm(dtype: torch.dtype, back: bool, *, rows=8192, dim=4096) -> Problem:
    """h = residual + branch and its RMSNorm."""
    problem = row_problems.sandwich_rms(dtype, back, norms="pre", rows=rows, dim=dim)

    def ours(branch: Tensor, residual: Tensor, weight: Tensor, **how: Any) -> Any:
        return sandwich_rms_norm(branch, residual, pre_weight=weight, norms="pre", **how)

    liger = partial(packages.liger_add_rms_norm, casting="gemma")
    return _against(problem, ours, Liger=liger, quack=packages.quack_add_rms_norm)


def softmax(dtype: torch.dtype, back: bool, *, heads=16, seqlen=1088) -> Problem:
    """With alpha 1 the plain one."""
    problem = row_problems.softmax(dtype, back, heads=heads, seqlen=seqlen, alpha=1.0)
    return _against(problem, problem.ours, Liger=packages.liger_softmax, quack=packages.quack_softmax)


def causal_softmax(dtype: torch.dtype, back: bool, *, heads=16, seqlen=1024) -> Problem:
    """Of scores times alpha."""
    problem = row_problems.softmax(dtype, back, heads=heads, seqlen=seqlen, causal=True, alpha=32.0)
    return _against(problem, problem.ours, apex=packages.apex_causal_softmax(32.0))


COMPARISONS = (
    Comparison("local_attention_2d", "8x56x56x32-7x7-shift", neighborhood),
    Comparison("three_region_attention", "16x4096x64", three_region),
    Comparison("layer_norm", "8704x2560-unrelaxed", layer_norm),
    Comparison("rms_norm", "8192x4096-weight-offset-0", rms_norm),
    Comparison("sandwich_rms_norm", "8192x4096-pre", add_rms_norm),
    Comparison("pb_relax_softmax", "16x1088x1088-alpha-1", softmax),
    Comparison("pb_relax_softmax", "16x1024x1024-causal", causal_softmax),
)


def reason_absent(peer: Peer, gpu: bool) -> str | None:
    """None where a peer can be timed here, else why not."""
    if not packages.installed(peer.module.partition(".")[0]):
        return f"not installed (there is no {peer.module})"
    if peer.gpu and not gpu:
        return "runs on GPUs alone"
    try:
        importlib.import_module(peer.module)
    except Exception as error:  # of another torch, without its compiled part
        return f"cannot be imported: {why(error)}"
    return None


def _version(peer: Peer) -> str:
    try:
        return version(peer.distribution)
    except PackageNotFoundError:  # not here, or built in place
        return ""


def rows(dtype: str, device: str, seconds: float, comparisons: tuple[Comparison, ...] = COMPARISONS) -> Rows:
    """The row of each comparison, forward and with backward, printed as it comes; one with nobody to compare with is
    left out, with a line that says so."""
    clock, found = Clock(device == "cuda"), Rows()
    absent = {name: reason_absent(peer, clock.gpu) for name, peer in PEERS.items()}
    for name, peer in PEERS.items():
        told = _version(peer), absent[name] or ("" if clock.gpu else peer.on_cpu)
        print(f"{name}: {', '.join(filter(None, told))}")
    print(f"{NOT_COMPARED}\n")
    for comparison in comparisons:
        for backward in (False, True):
            row: dict[str, Any] = {"op": comparison.op, "shape": comparison.shape, "dtype": dtype}
            row |= {"direction": direction(backward), **clock.facts()}
            try:
                problem = made(comparison.build, dtype, backward, device)
                peers = {name: absent[name] or function for name, function in problem.baselines.items()}
                if all(isinstance(function, str) for function in peers.values()):
                    reasons = "; ".join(f"{name} {function}" for name, function in peers.items())
                    title = f"{row['op']}, {row['shape']}, {dtype}, {row['direction']}"
                    print(f"{title}: nobody to compare with ({reasons})\n")
                    continue
                row["peers"] = {name: _version(PEERS[name]) for name in peers if absent[name] is None}
                # as near to float64 as ours: an error of five times that could be another window
                row |= measured(replace(problem, baselines=peers), backward, clock, seconds, slack=1.0)
            except RuntimeError as error:  # too little memory, say: the other comparisons may do
                row["failed"] = why(error)
            found.append(row)
            print(table.of(row, []), flush=True)
    return found
