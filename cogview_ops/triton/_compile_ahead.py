"""Compiling for many sizes at once: what calls would compile is caught, and worker processes, which do not touch the
GPU, compile it into Triton's cache."""

import importlib
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult, Pool
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource

SECONDS = 20  # what takes longer is given up
SPILLS = 8  # and so is what spills more registers of a thread


class Compilation(NamedTuple):
    module: str
    kernel: str
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    warps: int
    stages: int

    def compiled(self, target: Any) -> Any:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options={"num_warps": self.warps, "num_stages": self.stages})


Found = dict[str, Compilation]


@contextmanager
def caught() -> Iterator[Found]:
    """Of what is launched meanwhile, what is not compiled yet; that is neither compiled nor launched."""
    found: Found = {}

    def hook(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        function, (attributes, *_) = fn.jit_function.fn, compile["configs"]
        what = compile["signature"], compile["constants"], attributes, compile["num_warps"], compile["num_stages"]
        it = Compilation(function.__module__, function.__name__, *what)
        found[repr(it)] = it
        return True

    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = None


def compile_ahead(it: Compilation, target: Any) -> str:
    """In a worker. What went wrong, by name: Triton's exceptions do not pass between processes."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        it.compiled(target)
    except Exception as error:
        return type(error).__name__
    finally:
        signal.alarm(0)
    return ""


class Compiler:
    """Asks workers for compilations, each once, and tells whether what comes of them fits the GPU."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.target = pool, triton.runtime.driver.active.get_current_target()
        self.asked: dict[str, AsyncResult[str]] = {}
        self.fit: dict[str, bool] = {}

    def ask(self, found: Found) -> None:
        for name, it in found.items():
            if name not in self.asked:
                self.asked[name] = self.pool.apply_async(compile_ahead, (it, self.target))

    def fits(self, found: Found) -> bool:
        """Waits for all of them."""
        return sum([self._fits(name, it) for name, it in found.items()]) == len(found)

    def _fits(self, name: str, it: Compilation) -> bool:
        if name not in self.fit:
            self.fit[name] = False
            try:
                if not self.asked[name].get(SECONDS + 10):  # in time also where its worker has died
                    binary = it.compiled(self.target)
                    binary._init_handles()
                    self.fit[name] = binary.n_spills <= SPILLS
            except (multiprocessing.TimeoutError, triton.OutOfResources):
                pass
        return self.fit[name]
