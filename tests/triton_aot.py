"""Triton kernels without a GPU: what a call of an operator would compile for one, and compiling that ahead of time."""

import contextlib
import importlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

PROCESSORS = 132  # of the GPU pretended: work is split for so many


class Compilation(NamedTuple):
    """What Triton compiles a kernel for. Two launches that are alike in this are one compilation."""

    module: str
    kernel: str
    signature: dict[str, str]  # types by parameter
    constants: dict[str, Any]
    attributes: dict[int, Any]  # of parameters by their number: what they are divisible by
    warps: int
    stages: int

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(self.module), self.kernel)

    def dump(self) -> str:
        return json.dumps(self, default=lambda dtype: {"dtype": str(dtype)})

    @classmethod
    def load(cls, text: str) -> "Compilation":
        import triton.language as tl

        module, kernel, signature, constants, attributes, *rest = json.loads(text)
        for name, value in constants.items():
            constants[name] = tl.dtype(value["dtype"]) if isinstance(value, dict) else value
        return cls(module, kernel, signature, constants, {int(k): v for k, v in attributes.items()}, *rest)

    def compile(self, chip: int) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.function.arg_names
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        attributes = {(k,): value for k, value in self.attributes.items()}
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
        function, names = fn.jit_function, fn.jit_function.arg_names
        constants = {names[k]: value for (k,), value in compile["constants"].items()}
        attributes = {k: value for (k,), value in compile["configs"][0].items() if value}
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
