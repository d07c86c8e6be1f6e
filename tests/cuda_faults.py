"""Faults in CUDA kernels, each shown by one named run in the emulator: python tests/cuda_faults.py SUITE [NUMBER...]

A run is a call without torch (tests/cuda_emulator) and its comparison with the reference, a fraction of a second. All
faults of an operator are compiled in one copy of csrc, where `cogview_broken` says which is there: what is between «
and » becomes another expression. SUITE is three_region or local_2d: cuda_faults_*.py beside this file. The product's
tests run them under COGVIEW_TESTS=all.
"""

import ctypes
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import emulated_cuda
import kept_build
from torch import Tensor

GONE = "void()"
AROUND = 128 * 128  # elements: rows of a block, of several heads


class Fault(NamedTuple):
    what: str
    file: str  # of csrc/cuda
    text: str  # « » around what is replaced: an expression
    instead: str
    run: str


class Suite(NamedTuple):
    """The faults of one operator's kernels, and the runs that show them."""

    name: str
    objects: Callable[[Path], list[kept_build.Object]]
    faults: list[Fault]
    runs: dict[str, Callable[[Any, int], str]]  # of a library and a seed: what is wrong, or nothing


def compared(named: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Of results with the truth, to 2 % of its largest value."""
    for name, (actual, truth) in named.items():
        error = (actual.double() - truth).abs().max().item()
        if not error <= 0.02 * max(truth.abs().max().item(), 0.1):
            return f"{name} differs by {error:.3g}"
    return ""


# --- what breaks them ------------------------------------------------------------------------------------------------


def broken(text: str, faults: dict[int, Fault]) -> str:
    """With all faults of a file. Their expressions may be the same, but not overlap."""
    spans: dict[tuple[int, int], dict[int, str]] = {}
    for number, fault in faults.items():
        before, old, after = fault.text.replace("»", "«").split("«")
        found = text.count(before + old + after)
        assert found == 1, f"{fault.file}: {found} times {fault.text}"
        at = text.index(before + old + after) + len(before)
        spans.setdefault((at, at + len(old)), {})[number] = fault.instead
    end = len(text)
    for (first, last), instead in sorted(spans.items(), reverse=True):
        assert last <= end, f"two faults overlap: {text[first:last]}"
        chosen = "".join(f"cogview_broken == {number} ? ({new}) : " for number, new in instead.items())
        text, end = f"{text[:first]}({chosen}({text[first:last]})){text[last:]}", first
    return text


def suite(name: str) -> Suite:
    return importlib.import_module(f"cuda_faults_{name}").SUITE


def library(suite: Suite) -> Any:
    """All faults of a suite in one library, none of them active."""
    csrc = emulated_cuda.KEPT / f"broken-{suite.name}"
    kernels = [x.source for x in suite.objects(emulated_cuda.ROOT / "csrc") if x.source.suffix == ".cu"]
    for path in kept_build.reached(kernels):
        text = path.read_text()
        if mine := {number: fault for number, fault in enumerate(suite.faults, 1) if fault.file == path.name}:
            text = 'extern "C" int cogview_broken;\n' + broken(text, mine)
        if path == kernels[0]:
            text += 'extern "C" __attribute__((visibility("default"))) int cogview_broken;\nint cogview_broken = 0;\n'
        target = csrc / path.relative_to(emulated_cuda.ROOT / "csrc")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return ctypes.CDLL(str(kept_build.build(emulated_cuda.KEPT, csrc.name, suite.objects(csrc))))


def missed(
    suite: Suite, numbers: list[int] | None = None, seed: int = 1, say: Callable[[str], None] = str
) -> list[str]:
    """The runs that fail without a fault, then the faults that their runs do not show."""
    built = library(suite)
    active = ctypes.c_int.in_dll(built, "cogview_broken")
    wrong = []
    for run in dict.fromkeys(suite.faults[k - 1].run for k in numbers) if numbers else suite.runs:
        if message := suite.runs[run](built, seed):
            wrong.append(f"{run}: {message}")
    for k in numbers or range(1, len(suite.faults) + 1):
        fault, active.value = suite.faults[k - 1], k
        message = suite.runs[fault.run](built, seed)
        active.value = 0
        say(f"{k} {fault.what}: {message or 'MISSED'}")
        if not message:
            wrong.append(f"{k} {fault.what} ({fault.run})")
    return wrong


if __name__ == "__main__":
    begin = time.time()
    chosen = [int(x) for x in sys.argv[2:]]
    failures = missed(suite(sys.argv[1]), chosen, say=lambda x: print(x, flush=True))
    print(*failures or ["all caught"], f"{time.time() - begin:.0f} s", sep="\n")
    sys.exit(bool(failures))
