"""What type checkers and `import cogview_ops` see of the package."""

import importlib.util
import inspect
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_overloads

import pytest
from common import python

import cogview_ops
from cogview_ops import (
    local_attention_2d,
    pb_relax_attention,
    three_region_attention,
    three_region_attention_decode,
    three_region_attention_varlen,
)

EXAMPLE = Path(__file__).with_name("typed_example.py")


def test_example_runs() -> None:
    runpy.run_path(str(EXAMPLE))


def test_example_is_clean_in_pyright_strict() -> None:
    """What is checked, and how, is in pyproject.toml."""
    if not importlib.util.find_spec("basedpyright"):
        pytest.skip("basedpyright is not installed")
    run = python("-m", "basedpyright", "--pythonpath", sys.executable)
    assert "0 errors, 0 warnings" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    "function",
    [
        local_attention_2d,
        pb_relax_attention,
        three_region_attention,
        three_region_attention_decode,
        three_region_attention_varlen,
    ],
)
def test_overloads_have_every_option(function: Any) -> None:
    module = inspect.getmodule(function)
    assert isinstance(module, ModuleType)
    more = {three_region_attention_decode: "_DecodeOptions", three_region_attention_varlen: "_VarlenOptions"}
    assert len(get_overloads(function)) == 3
    for overload in get_overloads(function):
        options = getattr(module, more.get(function, "_Options"))
        seen = set(inspect.signature(overload).parameters) - {"options"} | set(options.__annotations__)
        assert seen == set(inspect.signature(function).parameters)


def test_submodules_are_reachable() -> None:
    """After `import cogview_ops` alone; an operator has the name of its file."""
    names = sorted(path.stem for path in Path(cogview_ops.__file__).parent.glob("[a-z]*.py"))
    assert {"modules", "patterns", "reference", "info"} < set(names)
    run = python("-c", f"import cogview_ops as c; print([type(getattr(c, x)).__name__ for x in {names}])")
    assert run.stdout.strip() == str(["function" if name in cogview_ops.__all__ else "module" for name in names])


def test_names_that_do_not_exist_are_attribute_errors() -> None:
    assert not hasattr(cogview_ops, "nothing")
