"""A method's own source as a tree, and a tree as a method again."""

import __future__

import ast
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)


class Unknown(Exception):
    """Why a method is left as it is."""


class Method:
    """The function inside `method`'s decorators: `tree` is what runs, `made_of(tree)` is `method` with another one."""

    def __init__(self, method: Any) -> None:
        self.wrappers: list[Any] = []  # outermost first
        while hasattr(method, "__wrapped__"):
            if not any(_holds(cell, method.__wrapped__) for cell in getattr(method, "__closure__", None) or ()):
                raise Unknown("its forward is decorated by what does not hold it in a closure")
            self.wrappers.append(method)
            method = method.__wrapped__
        if not isinstance(method, FunctionType):
            raise Unknown("its forward is no Python function")
        self.function = method
        self.tree, self.imports = _source(method)
        if not _same(self._compiled(self.tree), method.__code__):
            raise Unknown("the source of its forward is not what runs")

    def made_of(self, tree: ast.FunctionDef, **names: Callable[..., Any]) -> FunctionType:
        """With these names known inside, and no others but its own: nothing is put into its module."""
        code = self._compiled(tree, *names)
        own = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        cells = {**own, **{name: CellType(value) for name, value in names.items()}}
        new = _like(self.function, code, [cells[name] for name in code.co_freevars])
        for wrapper in reversed(self.wrappers):
            closure = [CellType(new) if _holds(cell, wrapper.__wrapped__) else cell for cell in wrapper.__closure__]
            inner, new = new, _like(wrapper, wrapper.__code__, closure)
            new.__wrapped__ = inner  # type: ignore[attr-defined]
        return new

    def _compiled(self, tree: ast.FunctionDef, *names: str) -> CodeType:
        """Inside a function of which its free names are locals, so that they stay free, and with its file's imports:
        attributes of what is imported are called in another way."""
        free = [*self.function.__code__.co_freevars, *names]
        outer: Any = ast.parse("def outer():\n  pass\n" + "".join(f"  {name} = None\n" for name in free)).body[0]
        outer.body.append(tree)
        module = ast.fix_missing_locations(ast.Module([*self.imports, outer], []))
        old = self.function.__code__
        code = compile(module, old.co_filename, "exec", flags=old.co_flags & FUTURES, dont_inherit=True)
        for name in ("outer", tree.name):
            code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
        return code


def _source(function: FunctionType) -> tuple[ast.FunctionDef, list[ast.stmt]]:
    """Its tree, and the imports of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
        file = "".join(inspect.findsource(function)[0])
    except (OSError, TypeError):
        raise Unknown("the source of its forward is not at hand") from None
    indented = lines[0][0].isspace()
    tree: Any = ast.parse("".join(["if True:\n", *lines] if indented else lines)).body[0]
    tree = tree.body[0] if indented else tree
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        raise Unknown("its forward is no method")
    tree.decorator_list = []
    return ast.increment_lineno(tree, first - 1 - indented), _imports(file)


@functools.lru_cache(8)
def _imports(file: str) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    scope = list(ast.parse(file).body)
    while scope:
        node: Any = scope.pop()
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            found.append(node)
        for field in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                scope += getattr(node, field, [])
    return found


def _same(a: CodeType, b: CodeType) -> bool:
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    return (
        all(getattr(a, part) == getattr(b, part) for part in parts)
        and len(a.co_consts) == len(b.co_consts)
        and all(
            _same(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else (type(x), x) == (type(y), y)
            for x, y in zip(a.co_consts, b.co_consts, strict=True)
        )
    )


def _holds(cell: CellType, function: Any) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # empty
        return False


def _like(function: FunctionType, code: CodeType, closure: list[CellType]) -> FunctionType:
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, tuple(closure))
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__wrapped__  # type: ignore[attr-defined]
    return new
