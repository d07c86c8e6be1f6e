"""`python -m pytest -p tests.triton_count -k "cuda or triton" …`: how many kernels Triton compiles for tests on a GPU.

No GPU is needed. Tests of `impl="triton"` run with all the cases that they have on a GPU, on CPU tensors: an operator's
host code runs on meta tensors of the same layout and what it launches is counted (triton_aot.py), its result comes from
the C++ kernel. `--compilations FILE` writes the list, and

    python -m tests.triton_count FILE --workers 14

compiles it ahead of time, says how long that takes, and keeps the kernels in `--cache` for a GPU with the same Triton.
"""

import os

if __name__ != "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before conftest.py asks for the interpreter

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from triton_aot import Compilation, caught

CHIP = 90

# --- the plugin ------------------------------------------------------------------------------------------------------

_needed: dict[str, int] = {}  # compilations, and how many launches are of each
_lock = threading.Lock()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--compilations", metavar="FILE", help="write the kernels that the tests need to be compiled")


def pytest_configure(config: Any) -> None:
    import common

    from cogview_ops import _dispatch, _registration
    from cogview_ops._manifest import OPERATORS

    implement, unavailable = _registration.implement, common.unavailable
    _registration.implement = lambda name, kernel, devices: implement(name, counted(name, kernel), ("cpu",))
    reason = _dispatch._load_triton()
    assert reason is None, reason
    common.device_of = lambda impl: "cpu"
    common.unavailable = lambda op, impl: None if impl == "triton" and OPERATORS[op].triton else unavailable(op, impl)


def counted(name: str, kernel: Any) -> Any:
    """The C++ kernel of an operator, which also notes what the Triton kernel would launch."""
    import torch
    from torch.utils._pytree import tree_map_only

    def on_meta(x: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device="meta")
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    def run(*arguments: Any) -> Any:
        with _lock, caught(CHIP) as launches:
            kernel(*tree_map_only(torch.Tensor, on_meta, arguments))
            for launch in launches:
                text = launch.compilation.dump()
                _needed[text] = _needed.get(text, 0) + 1
        return getattr(torch.ops.cogview_ops, name)(*arguments)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    kinds = Counter(".".join(json.loads(text)[:2]).removeprefix("cogview_ops.triton.") for text in _needed)
    terminalreporter.section(f"{len(_needed)} Triton compilations for {sum(_needed.values())} launches")
    for kind, count in kinds.most_common():
        terminalreporter.write_line(f"{count:6} {kind}")
    path = config.getoption("compilations")
    if path:
        Path(path).write_text("".join(f"{text}\n" for text in sorted(_needed)))


# --- compiling the list ----------------------------------------------------------------------------------------------


def seconds() -> float:
    """CPU time of this process and of those that it has waited for (ptxas)."""
    return sum(
        x.ru_utime + x.ru_stime for x in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def compile_one(text: str) -> tuple[float, str]:
    """CPU seconds, and what went wrong."""
    before, error = seconds(), ""
    try:
        Compilation.load(text).compile(CHIP)
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    return seconds() - before, error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.triton_count", description="Compile a list of kernels.")
    parser.add_argument("list", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, help="folder for the kernels, as TRITON_CACHE_DIR")
    parser.add_argument("--every", type=int, default=1, help="only every so many of them")
    args = parser.parse_args()
    texts = args.list.read_text().splitlines()[:: args.every]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(args.cache or folder)
        start = time.perf_counter()
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            done = pool.map(compile_one, texts, chunksize=1)
        wall = time.perf_counter() - start
    times = [time for time, _ in done]
    print(f"{len(times)} compilations: {wall:.0f} s with {args.workers} workers; CPU time {sum(times):.0f} s,", end=" ")
    print(f"{sum(times) / len(times):.2f} s each, at most {max(times):.1f} s")
    failed = [f"{error}: {text}" for text, (_, error) in zip(texts, done, strict=True) if error]
    print(f"{len(failed)} failed", *failed, sep="\n")
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
