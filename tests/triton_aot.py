"""Triton kernels without a GPU: what a call of an operator would compile for one, and compiling that ahead of time."""

import contextlib
import importlib
import json
from collections import namedtuple
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

PROCESSORS = 132  # of the GPU pretended: work is split for so many


def encoded(x: Any) -> Any:
    """For JSON, which has neither types nor tuples of names."""
    if hasattr(x, "_fields"):
        return {"type": type(x).__name__, "fields": x._fields, "values": [encoded(value) for value in x]}
    if isinstance(x, (tuple, list)):
        return [encoded(value) for value in x]
    if isinstance(x, dict):
        return {key: encoded(value) for key, value in x.items()}
    return x if x is None or isinstance(x, (str, int, float)) else {"dtype": str(x)}


def decoded(x: Any) -> Any:
    import triton.language as tl

    if isinstance(x, list):
        return tuple(decoded(value) for value in x)
    if not isinstance(x, dict):
        return x
    if "fields" in x:
        return namedtuple(x["type"], x["fields"])(*map(decoded, x["values"]))
    return tl.dtype(x["dtype"]) if "dtype" in x else {key: decoded(value) for key, value in x.items()}


def leaves(signature: dict[str, Any]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Parameters, and of tuples what is in them: names with dots, types, where Triton counts them."""

    def walk(name: str, kind: Any, path: tuple[int, ...]) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
        if not isinstance(kind, tuple):
            yield name, kind, path
            return
        for k, part in enumerate(kind):
            yield from walk(f"{name}.{kind._fields[k]}", part, (*path, k))  # type: ignore[attr-defined]

    for k, (name, kind) in enumerate(signature.items()):
        yield from walk(name, kind, (k,))


class Compilation(NamedTuple):
    """What Triton compiles a kernel for. Two launches that are alike in this are one compilation."""

    module: str
    kernel: str
    signature: dict[str, Any]  # types by parameter, of tuples a tuple
    constants: dict[str, Any]  # by name of `leaves`
    attributes: dict[str, Any]  # likewise, what they are divisible by
    warps: int
    stages: int

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.kernel)

    def dump(self) -> str:
        return json.dumps([encoded(x) for x in self])

    @classmethod
    def load(cls, text: str) -> "Compilation":
        return cls(*map(decoded, json.loads(text)))

    def compile(self, chip: int) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        paths = {name: path for name, _, path in leaves(self.signature)}
        constants = {paths[name]: value for name, value in self.constants.items()}
        attributes = {paths[name]: [list(x) for x in value] for name, value in self.attributes.items()}
        source = ASTSource(self.function, self.signature, constants, attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


class Launch(NamedTuple):
    grid: tuple[int, ...]
    compilation: Compilation


class _Driver:
    """As much of a driver as it takes to find out what to compile."""

    def __init__(self, chip: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", chip, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def caught(chip: int) -> Iterator[list[Launch]]:
    """Launches, which do not happen, of operators called on meta tensors, as on a GPU of this compute capability."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from cogview_ops.triton import configs

    launches: list[Launch] = []
    grids: list[tuple[int, ...]] = []
    run = JITFunction.run

    def observed(self: Any, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
        grids.append(grid)
        if self.device_caches.get(0) and self.device_caches[0][2].arch != chip:
            self.device_caches.clear()  # of another chip
        return run(self, *args, grid=grid, warmup=warmup, **arguments)

    def hook(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        function = fn.jit_function
        names = {path: name for name, _, path in leaves(compile["signature"])}
        constants = {names[path]: value for path, value in compile["constants"].items()}
        attributes = {names[path]: value for path, value in compile["configs"][0].items()}
        options = compile["num_warps"], compile["num_stages"]
        module, name = function.fn.__module__, function.fn.__name__
        found = Compilation(module, name, compile["signature"], constants, attributes, *options)
        launches.append(Launch(grids[-1], found))
        return True  # done: compile nothing, launch nothing

    with (
        mock.patch.object(driver, "_active", _Driver(chip)),
        mock.patch.object(JITFunction, "run", observed),
        mock.patch.object(knobs.runtime, "jit_cache_hook", hook),
        mock.patch.object(configs, "chip", return_value=chip),
        mock.patch.object(configs, "processors", return_value=PROCESSORS),
    ):
        yield launches
