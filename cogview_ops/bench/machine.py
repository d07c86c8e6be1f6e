"""The machine: its name, what it can do at most (measured), and how much memory a call takes."""

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from .. import __version__, _dispatch
from .._report import processor

# Freed pages stay in the process: otherwise every call of every contestant would pay for page faults.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**38)}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what threads of OpenMP do while they wait


def keep_freed_pages() -> None:
    """Begins this command anew, with Python's own options, with the allocator of ALLOCATOR, unless it has it; of glibc,
    so on Linux alone."""
    if sys.platform == "linux" and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


@cache
def facts() -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "device": f"{processor()}, {torch.get_num_threads()} threads",
        "cpu": _dispatch._C.active_cpu() if _dispatch._C else None,
        "compiler": _dispatch._C.compiler() if _dispatch._C else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cogview_ops": __version__,
        "commit": _commit(),
        "waiting": {name: os.environ[name] for name in WAITING if name in os.environ},
    }


def facts_of(device: torch.device) -> dict[str, Any]:
    """The same of what runs there."""
    return facts() | ({"device": torch.cuda.get_device_name()} if device.type == "cuda" else {})


def now(device: torch.device) -> float:
    """Seconds, once all is done that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def _commit() -> str | None:
    """COGVIEW_OPS_COMMIT, or of the checkout, with "-dirty" where what is timed has changed since; None outside one."""
    if given := os.environ.get("COGVIEW_OPS_COMMIT"):
        return given

    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()
        except OSError:  # there is no git
            return ""

    if Path(git("rev-parse", "--show-toplevel") or "/") != root:  # installed, maybe within somebody's own checkout
        return None
    dirty = git("status", "--porcelain", "csrc", "cogview_ops", "benchmarks/*.py", "setup.py")
    commit = git("rev-parse", "--short=10", "HEAD")
    return commit + ("-dirty" if dirty else "") if commit else None


def slug(device: str) -> str:
    """File name of a device's results."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower()))


def best_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times[1:])


def ceilings(dtype: torch.dtype, matmul: bool = True, exp: bool = True) -> dict[str, float]:
    """What this CPU does a second, measured: bytes copied, FLOPs of products in that dtype, exponentials."""
    rates = {"memory": copy_bandwidth()}
    if matmul:
        rates["matmul"] = matmul_rate(dtype)
    if exp:
        rates["exp"] = exp_rate()
    return rates


@cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy much larger than the caches."""
    source = torch.ones(2**27)
    target = torch.ones_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source))


@cache
def read_bandwidth() -> float:
    """Bytes read per second by a sum over far more than the caches hold."""
    source = torch.ones(2**28)
    return source.nbytes / best_seconds(source.sum)


@cache
def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOPs per second of torch's square matrix product."""
    a, b = torch.ones(2, size, size, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out))


@cache
def exp_rate() -> float:
    """Exponentials per second of torch.exp (the faster one: torch.exp2 has two thirds of it) in float32, in cache."""
    x = torch.linspace(-8, 0, 2**16 * torch.get_num_threads())
    out = torch.empty_like(x)

    def many() -> None:
        for _ in range(100):
            torch.exp(x, out=out)

    return 100 * x.numel() / best_seconds(many)


def peak_extra_bytes(call: Callable[[], Any]) -> int | None:
    """Growth of the process's resident memory at its peak during one call, results included; Linux only.

    Free pages are given back before, so whatever the call touches counts, whoever allocated it: torch, a kernel's own
    scratch or a library's.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")  # the peak starts again from now
    except OSError:  # a container that forbids it
        return None
    before = _kilobytes(status, "VmRSS")
    call()
    return 1024 * max(_kilobytes(status, "VmHWM") - before, 0)


def _kilobytes(status: Path, field: str) -> int:
    return int(status.read_text().split(f"{field}:")[1].split()[0])
