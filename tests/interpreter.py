"""Triton's interpreter without what it does in vain: kernels of many calls take 40 % of the time."""

from dataclasses import replace
from typing import Any


def hasten() -> None:
    """Of this process."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction as Function

    # each sum of integers again in 64 bits, for an assertion that only debugging makes
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

    wrapped: set[int] = set()  # modules in whose names a launch has made the language the interpreter's
    run, call = Function.run, Function.__call__

    def run_fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrapped.clear()  # what a kernel wraps is unwrapped behind it
        return run(self, *args, **kwargs)

    def call_wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function that a kernel calls: it wraps everything again at each call."""
        module = id(self.fn.__globals__)
        if module in wrapped:
            return self.rewrite()(*args, **kwargs)
        wrapped.add(module)
        return call(self, *args, **kwargs)

    Function.run, Function.__call__ = run_fresh, call_wrapped
