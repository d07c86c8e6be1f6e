"""The forward of a layer with fused calls for its norm steps: its own source, rewritten.

A step is a sum with a norm of an operand straight before it, or a norm of it straight after it, or both:

    x = self.post(x)                 h, n = add_norm(residual, x, post=self.post, at=1, pre=self.pre)
    h = residual + x          ->     residual = h
    residual = h                     x = self.mlp(n)
    x = self.mlp(self.pre(h))

Between a norm and its sum there may be one module (a dropout) or factor. Only this moves: a norm, whose call has no
other effect, over copies of names; and a sum into both arms of an `if` before or after it, with what is up to its norm.
"""

import ast
import copy
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

from .source import Method, Unknown

Tests = tuple[tuple[str, bool], ...]
OURS = "_add", "_add_norm", "_normed"


class Sum(NamedTuple):
    """A residual sum in one place of a forward, and the layer's norms on both sides that are fused with it."""

    text: str
    line: int  # the same in every place that it has been moved to
    tests: Tests  # under which it runs
    post: str | None = None
    pre: str | None = None

    def runs_in(self, layer: Any) -> bool:
        """Whether it may, by those tests that ask the layer alone."""
        try:
            return all(bool(eval(test, {"__builtins__": {}}, {"self": layer})) == truth for test, truth in self.tests)
        except Exception:  # of a tensor without a value, say
            return True


def rewrite(
    forward: Any,
    modules: set[str],
    norms: set[str],
    between: set[str],
    add: Callable[..., Any],
    add_norm: Callable[..., Any],
) -> tuple[FunctionType, list[Sum]]:
    """`forward` with its steps as calls of `add` and `add_norm`, and its residual sums, those that are in none too.

    `modules` are names of attributes that are modules, `norms` of norms, `between` of what may be between a norm and a
    sum.
    """
    method = Method(forward)
    code, tree = method.function.__code__, method.tree
    odd = {*code.co_names, *code.co_varnames, *code.co_freevars} & {*OURS, "locals", "vars", "eval", "exec"}
    if odd or any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree)):
        raise Unknown("its forward looks at its own names")
    if any(isinstance(node, ast.NamedExpr) for node in ast.walk(tree)):
        raise Unknown("its forward gives names values inside of expressions")
    writer = _Writer(tree, set(code.co_cellvars), modules, norms, between)
    tree.body = writer.block(tree.body, last=True)
    return method.made_of(tree, _add=add, _add_norm=add_norm), writer.sums


class _Post(NamedTuple):
    norm: ast.expr  # self.post
    between: ast.expr | None  # the module or the factor behind it
    branch: ast.expr  # what it is called with
    used: int = 0  # how many statements straight before the sum have gone into these


class _Writer:
    def __init__(
        self, tree: ast.FunctionDef, captured: set[str], modules: set[str], norms: set[str], between: set[str]
    ) -> None:
        self.me = tree.args.args[0].arg
        self.captured, self.modules, self.norms, self.between = captured, modules, norms, between
        self.copies = {copied[0] for node in ast.walk(tree) if (copied := _copied(node))}
        self.tests: Tests = ()  # that hold where it is writing
        self.sums: list[Sum] = []
        self.normed: dict[str, str] = {}  # what names of results stand for

    def block(self, todo: list[ast.stmt], last: bool) -> list[ast.stmt]:
        """Statements with their steps fused. `last`: nothing of the function comes after them."""
        done: list[ast.stmt] = []
        while todo:
            statement, *todo = todo
            if not _is_sum(getattr(statement, "value", None)) or isinstance(statement, ast.Expr | ast.AugAssign):
                done.append(self.within(statement, last and not todo))
                continue
            post, at = self.post_of(statement, done, todo, last)
            used = done[len(done) - post.used :] if post else []
            if not post and (arms := self.after_arms(statement, done, todo)):
                done, todo = done[:-1], arms
                continue
            if arms := self.into_arms([*used, statement], todo):
                done, todo = done[: len(done) - len(used)], arms
                continue
            pre = self.pre_of(_target(statement), todo)
            if not (post or pre):
                self.note(statement)
                done.append(self.within(statement, last and not todo))
                continue
            done = done[: len(done) - len(used)]
            fused, todo = self.fused(statement, post, at, pre, todo)
            done.append(fused)
        return done

    def within(self, statement: ast.stmt, last: bool) -> ast.stmt:
        """A statement with the steps inside it. In a `try`, names may be read later than they seem to be."""
        if isinstance(statement, ast.If):
            before, text = self.tests, re.sub(rf"\b{self.me}\b", "self", ast.unparse(statement.test))
            decided = _is_pure(statement.test) and _names(statement.test) == {self.me}
            for field, truth in (("body", True), ("orelse", False)):
                self.tests = (*before, (text, truth)) if decided else before
                setattr(statement, field, self.block(getattr(statement, field), last))
            self.tests = before
        elif isinstance(statement, ast.With | ast.For | ast.While):
            statement.body = self.block(statement.body, last and isinstance(statement, ast.With))
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr):
            return _InPlace(self).visit(statement)
        return statement

    def post_of(
        self, statement: Any, done: list[ast.stmt], todo: list[ast.stmt], last: bool
    ) -> tuple[_Post | None, int]:
        """The norm before a sum, and which operand it is of."""
        left, right = statement.value.left, statement.value.right
        for at, operand, other in ((1, right, left), (0, left, right)):
            post = self.peeled(operand, done)
            if not post:
                continue
            overtaken = [other] if post.used or at == 0 else []  # by the norm
            if post.used and at == 1 and not isinstance(other, ast.Name):
                overtaken.append(post.branch)  # by the other operand
            if not any(next(_calls(e), None) for e in overtaken):
                gone = {_target(used) for used in done[len(done) - post.used :]}
                read = any(_reads(todo, name, last) for name in gone - {_target(statement)})
                if not (read or gone & (_names(other) | self.captured)):
                    return post, at
        return None, 1

    def peeled(self, e: ast.expr, before: list[ast.stmt], between: ast.expr | None = None) -> _Post | None:
        """`e` as a norm and what is between it and the sum. A name is what the statement just before gave it."""
        if self.calls(e, self.norms):
            return _Post(e.func, between, e.args[0])  # type: ignore[attr-defined]
        if isinstance(e, ast.Name) and before and _target(before[-1]) == e.id:
            post = self.peeled(before[-1].value, before[:-1], between)  # type: ignore[attr-defined]
            return post and post._replace(used=post.used + 1)
        if between is None and self.calls(e, self.between):
            return self.peeled(e.args[0], before, e.func)  # type: ignore[attr-defined]
        if between is None and isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult):
            for x, factor in ((e.left, e.right), (e.right, e.left)):
                overtaken = factor is e.left and not self.changes_nothing(x)
                if (self.is_mine(factor) and not overtaken) or isinstance(factor, ast.Constant):
                    return self.peeled(x, before, factor)
        return None

    def pre_of(self, target: str | None, todo: list[ast.stmt]) -> tuple[int, ast.Call] | None:
        """The norm after a sum: which statement it is in, and its call."""
        names = {target}
        for index, statement in enumerate(todo if target else ()):
            if copied := _copied(statement):
                (names.add if copied[1] in names else names.discard)(copied[0])
                continue
            if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr):
                return None
            call: Any = next(_calls(statement.value), None)  # the first: nothing before it can have changed h
            found = self.calls(call, self.norms) and isinstance(call.args[0], ast.Name) and call.args[0].id in names
            return (index, call) if found else None
        return None

    def into_arms(self, moved: list[ast.stmt], todo: list[ast.stmt]) -> list[ast.stmt] | None:
        """What is to do with a sum, the end of `moved`, in both arms of the `if` after it, where that is next to its
        norm."""
        copies = next((i for i, statement in enumerate(todo) if not _copied(statement)), len(todo))
        branch = todo[copies] if copies < len(todo) else None
        if not isinstance(branch, ast.If) or not _is_pure(branch.test):
            return None
        target, copied, rest = _target(moved[-1]), todo[:copies], todo[copies + 1 :]
        behind = self.pre_of(target, [*copied, *rest])
        if not (behind or any(self.pre_of(target, [*copied, *arm]) for arm in (branch.body, branch.orelse))):
            return None
        moved = [*moved, *copied]
        if _names(branch.test) & {_target(statement) for statement in moved}:
            return None
        asks = any(isinstance(node, ast.Attribute) for node in ast.walk(branch.test))
        if asks and not all(map(self.changes_nothing, moved)):
            return None
        after = rest[: behind[0] + 1 - copies] if behind else []
        both = copy.deepcopy((moved, after))
        branch.body = [*moved, *branch.body, *after]
        branch.orelse = [*both[0], *branch.orelse, *both[1]]
        return [branch, *rest[len(after) :]]

    def after_arms(self, statement: Any, done: list[ast.stmt], todo: list[ast.stmt]) -> list[ast.stmt] | None:
        """The same with the `if` before it, where an arm ends with a norm of an operand: with the sum, and with an `if`
        that is next to its other norm."""
        branch = done[-1] if done else None
        if not isinstance(branch, ast.If):
            return None
        operands = [e for e in (statement.value.left, statement.value.right) if isinstance(e, ast.Name)]
        if not any(self.peeled(e, arm) for arm in (branch.body, branch.orelse) for e in operands):
            return None
        moved = [statement]
        if self.into_arms([copy.deepcopy(statement)], copy.deepcopy(todo)):
            moved += todo[: next(i for i, after in enumerate(todo) if isinstance(after, ast.If)) + 1]
        branch.orelse = [*branch.orelse, *copy.deepcopy(moved)]
        branch.body = [*branch.body, *moved]
        return [branch, *todo[len(moved) - 1 :]]

    def fused(
        self, statement: Any, post: _Post | None, at: int, pre: tuple[int, ast.Call] | None, todo: list[ast.stmt]
    ) -> tuple[ast.stmt, list[ast.stmt]]:
        """A sum and its norms as one call, and what comes after it."""
        call = self.call(statement.value, post, at, pre[1].func if pre else None)
        if not pre:
            statement.value = call
            return statement, todo
        index, norm = pre
        name = f"_normed{len(self.normed)}"
        self.normed[name] = ast.unparse(norm)
        user: Any = _Replace(norm, ast.Name(name, ast.Load())).visit(todo[index])
        release = ast.copy_location(ast.Delete([ast.Name(name, ast.Del())]), user)
        targets = ast.Tuple([ast.Name(x, ast.Store()) for x in (str(_target(statement)), name)], ast.Store())
        new = ast.copy_location(ast.Assign([targets], call), statement)
        returns = isinstance(user, ast.Return)
        return new, [*todo[:index], user, *([] if returns else [release]), *todo[index + 1 :]]

    def call(self, total: ast.BinOp, post: _Post | None, at: int, pre: ast.expr | None) -> ast.Call:
        operands = [total.left, total.right]
        given: dict[str, Any] = {"pre": pre}
        if post:
            operands[at] = post.branch
            given |= {"post": post.norm, "between": post.between, "at": ast.Constant(at)}
        names = (getattr(given.get(side), "attr", None) for side in ("post", "pre"))
        self.sums.append(Sum("", total.lineno, self.tests, *names))
        keywords = [ast.keyword(name, value) for name, value in given.items() if value is not None]
        operands = [_InPlace(self).visit(operand) for operand in operands]
        function = ast.Name("_add_norm" if pre else "_add", ast.Load())
        return ast.copy_location(ast.Call(function, operands, keywords), total)

    def calls(self, e: Any, names: set[str]) -> bool:
        """Whether e is a call of one of the layer's modules with one argument."""
        one = isinstance(e, ast.Call) and len(e.args) == 1 and not e.keywords and not isinstance(e.args[0], ast.Starred)
        return one and self.is_mine(e.func) and e.func.attr in names

    def changes_nothing(self, e: ast.AST) -> bool:
        """Whether it leaves the layer's attributes alone: its methods may not, its modules do not know it."""
        calls = [node for node in ast.walk(e) if isinstance(node, ast.Call)]
        return all(self.is_mine(call.func) and call.func.attr in self.modules for call in calls)  # type: ignore[attr-defined]

    def is_mine(self, e: Any) -> bool:
        return isinstance(e, ast.Attribute) and isinstance(e.value, ast.Name) and e.value.id == self.me

    def note(self, statement: Any) -> None:
        """A sum with what was put aside, or that takes the place of an operand, is a residual sum."""
        operands = statement.value.left, statement.value.right
        if any(isinstance(e, ast.Tuple | ast.List | ast.Constant) for e in operands):
            return
        if _names(statement.value) & ({*self.copies, _target(statement)} - {None}):
            text = re.sub(r"\b_normed\d+\b", lambda name: self.normed[name[0]], ast.unparse(statement))
            self.sums.append(Sum(text, statement.value.lineno, self.tests))


class _InPlace(ast.NodeTransformer):
    """Steps that are one expression: `self.pre(a + b)`, `a + self.post(b)`."""

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not (self.writer.calls(node, self.writer.norms) and _is_sum(node.args[0])):
            return self.generic_visit(node)
        total: Any = node.args[0]
        call = self.writer.call(total, *self.writer.post_of(ast.Return(total), [], [], True), node.func)
        return ast.copy_location(ast.Subscript(call, ast.Constant(1), ast.Load()), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        post, at = self.writer.post_of(ast.Return(node), [], [], True) if _is_sum(node) else (None, 1)
        return self.writer.call(node, post, at, None) if post else self.generic_visit(node)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def _is_sum(e: Any) -> bool:
    return isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add)


def _target(statement: Any) -> str | None:
    """The one name that a statement gives a value."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: Any = statement.targets[0]
    else:
        target = statement.target if isinstance(statement, ast.AnnAssign) and statement.value else None
    return target.id if isinstance(target, ast.Name) else None


def _copied(statement: Any) -> tuple[str | None, str | None] | None:
    """(new name, old name) of a copy; of a docstring none; None of anything else."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
        return None, None
    return (_target(statement), value.id) if _target(statement) and isinstance(value, ast.Name) else None


def _names(e: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(e) if isinstance(node, ast.Name)}


def _reads(statements: list[ast.stmt], name: str | None, last: bool) -> bool:
    """Whether a name is read before it is given another value; where that is not seen, it is."""
    for statement in statements:
        if _target(statement) == name and name not in _names(statement.value):  # type: ignore[attr-defined]
            return False
        if name in _names(statement):
            return True
    return not last


def _is_pure(e: ast.expr) -> bool:
    """Neither has an effect nor can see one of a sum."""
    allowed = ast.Name, ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp
    parts = ast.expr_context, ast.cmpop, ast.boolop, ast.unaryop
    return all(isinstance(node, (*allowed, *parts)) for node in ast.walk(e))


def _calls(e: ast.expr | None) -> Iterator[ast.expr]:
    """The calls of an expression in the order in which they are made; among them whatever may make one at times."""
    if isinstance(e, ast.Call):
        for part in (e.func, *e.args, *(keyword.value for keyword in e.keywords)):
            yield from _calls(part)
        yield e
    elif isinstance(e, ast.Attribute | ast.Starred):
        yield from _calls(e.value)
    elif isinstance(e, ast.Subscript):
        yield from (*_calls(e.value), *_calls(e.slice))
    elif isinstance(e, ast.BinOp):
        yield from (*_calls(e.left), *_calls(e.right))
    elif isinstance(e, ast.UnaryOp):
        yield from _calls(e.operand)
    elif isinstance(e, ast.Tuple | ast.List):
        for part in e.elts:
            yield from _calls(part)
    elif not isinstance(e, ast.Name | ast.Constant | None):
        yield e
