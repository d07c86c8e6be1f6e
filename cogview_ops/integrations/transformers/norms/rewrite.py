"""The forward of a layer with fused calls for its norm steps: its own source, rewritten.

A step is a sum with a norm of an operand straight before it, or a norm of it straight after it, or both:

    x = self.post(x)                 h, n = add_norm(residual, x, post=self.post, at=1, pre=self.pre)
    h = residual + x          ->     residual = h
    residual = h                     x = self.mlp(n)
    x = self.mlp(self.pre(h))

Between a norm and its sum there may be one module (a dropout) or factor. Only this moves: a norm, whose call has no other
effect, over copies of names; and a sum, with what follows up to its norm, into both arms of an `if` in between.
"""

import ast
import copy
import re
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

from .source import Method, Unknown

LOOKS_AT_NAMES = {"locals", "vars", "eval", "exec"}


class Step(NamedTuple):
    """The layer's norms on both sides of a sum."""

    post: str | None
    pre: str | None


def rewrite(
    forward: Any, norms: set[str], between: set[str], add: Callable[..., Any], add_norm: Callable[..., Any]
) -> tuple[FunctionType, list[Step], list[str]]:
    """`forward` with its steps as calls of `add` and `add_norm`; these steps; residual sums that are in none.

    `norms` are names of attributes that are norms, `between` of modules that may be between a norm and a sum.
    """
    method = Method(forward)
    code, tree = method.function.__code__, method.tree
    odd = any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree))
    if odd or LOOKS_AT_NAMES & set(code.co_names):
        raise Unknown("its forward looks at its own names")
    writer = _Writer(tree, set(code.co_cellvars), norms, between)
    tree.body = writer.block(tree.body, last=True)
    return method.made_of(tree, _add=add, _add_norm=add_norm), list(writer.steps), writer.others


class _Post(NamedTuple):
    norm: ast.expr  # self.post
    between: ast.expr | None  # the module or the factor behind it
    branch: ast.expr  # what it is called with
    used: int = 0  # how many statements straight before the sum have gone into these


class _Writer:
    def __init__(self, tree: ast.FunctionDef, captured: set[str], norms: set[str], between: set[str]) -> None:
        self.me = tree.args.args[0].arg
        self.captured, self.norms, self.between = captured, norms, between
        self.copies = {copied[0] for node in ast.walk(tree) if (copied := _copied(node))}
        self.steps: dict[Step, None] = {}  # an order, and each once where an `if` has two copies
        self.others: list[str] = []
        self.normed: dict[str, str] = {}  # what names of results stand for

    def block(self, todo: list[ast.stmt], last: bool) -> list[ast.stmt]:
        """Statements with their steps fused. `last`: nothing of the function comes after them."""
        done: list[ast.stmt] = []
        while todo:
            statement, *todo = todo
            value: Any = getattr(statement, "value", None)
            if not _is_sum(value) or not (_target(statement) or isinstance(statement, ast.Return)):
                done.append(self.within(statement, last and not todo))
                continue
            post, at = self.post_of(statement, done, todo, last)
            used = post.used if post else 0
            done, moved = done[: len(done) - used], [*done[len(done) - used :], statement]
            if arms := self.into_arms(moved, todo):
                todo = arms
                continue
            pre = self.pre_of(_target(statement), todo)
            if not (post or pre):
                self.note(statement)
                done += [*moved[:-1], self.within(statement, last and not todo)]
                continue
            fused, todo = self.fused(statement, post, at, pre, todo)
            done.append(fused)
        return done

    def within(self, statement: ast.stmt, last: bool) -> ast.stmt:
        """A statement with the steps inside it; in a `try`, names may be read later than they seem to be."""
        if isinstance(statement, ast.If | ast.With):
            statement.body = self.block(statement.body, last)
        if isinstance(statement, ast.For | ast.While):
            statement.body = self.block(statement.body, False)
        if isinstance(statement, ast.If | ast.For | ast.While):
            statement.orelse = self.block(statement.orelse, last)
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr):
            return _InPlace(self).visit(statement)
        return statement

    def post_of(
        self, statement: Any, done: list[ast.stmt], todo: list[ast.stmt], last: bool
    ) -> tuple[_Post | None, int]:
        """The norm before a sum, and which operand it is of."""
        left, right = statement.value.left, statement.value.right
        for at, operand, other in ((1, right, left), (0, left, right)):
            post = self.peeled(operand, done)
            if post is None:
                continue
            gone = {_target(used) for used in done[len(done) - post.used :]} if post.used else set()
            still = gone - {_target(statement)}  # which the sum does not give another value
            if not gone:
                return post, at
            read_later = any(_reads(todo, name, last) for name in still)
            if not (gone & (_names(other) | self.captured) or read_later or next(_calls(other), None)):
                return post, at
        return None, 1

    def peeled(self, e: ast.expr, before: list[ast.stmt], between: ast.expr | None = None) -> _Post | None:
        """`e` as a norm and what is between it and the sum. A name is what the statement just before gave it."""
        if self.calls(e, self.norms):
            return _Post(e.func, between, e.args[0])
        if isinstance(e, ast.Name) and before and _target(before[-1]) == e.id:
            post = self.peeled(before[-1].value, before[:-1], between)  # type: ignore[attr-defined]
            return post and post._replace(used=post.used + 1)
        if between is None and self.calls(e, self.between):
            return self.peeled(e.args[0], before, e.func)
        if between is None and isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult):
            for x, factor in ((e.left, e.right), (e.right, e.left)):
                if self.is_mine(factor) or isinstance(factor, ast.Constant):
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
            call: Any = next(_calls(statement.value), None)  # nothing has been called that could change h
            found = self.calls(call, self.norms) and isinstance(call.args[0], ast.Name) and call.args[0].id in names
            return (index, call) if found else None
        return None

    def into_arms(self, moved: list[ast.stmt], todo: list[ast.stmt]) -> list[ast.stmt] | None:
        """`moved`, which ends with a sum, in both arms of the `if` after it, if its norm is there or behind it."""
        target = _target(moved[-1])
        if not (target and todo and isinstance(todo[0], ast.If) and _is_pure(todo[0].test)):
            return None
        branch, rest = todo[0], todo[1:]
        behind = self.pre_of(target, rest)
        if not (behind or self.pre_of(target, branch.body) or self.pre_of(target, branch.orelse)):
            return None
        if _names(branch.test) & {_target(statement) for statement in moved}:
            return None
        count = behind[0] + 1 if behind else 0
        both = copy.deepcopy((moved, rest[:count]))
        branch.body = [*moved, *branch.body, *rest[:count]]
        branch.orelse = [*both[0], *branch.orelse, *both[1]]
        return [branch, *rest[count:]]

    def fused(
        self, statement: Any, post: _Post | None, at: int, pre: tuple[int, ast.Call] | None, todo: list[ast.stmt]
    ) -> tuple[ast.stmt, list[ast.stmt]]:
        """A sum and its norms as a call, and what comes after it."""
        call = self.call(statement.value, post, at, pre[1].func if pre else None)
        if not pre:
            statement.value = call
            return statement, todo
        name = f"_normed{len(self.steps)}"
        index, norm = pre
        self.normed[name] = ast.unparse(norm)
        user = _Replace(norm, ast.Name(name, ast.Load())).visit(todo[index])
        release = [] if isinstance(user, ast.Return) else [ast.Delete([ast.Name(name, ast.Del())])]
        targets = ast.Tuple([ast.Name(_target(statement), ast.Store()), ast.Name(name, ast.Store())], ast.Store())
        new = ast.copy_location(ast.Assign([targets], call), statement)
        return new, [*todo[:index], user, *[ast.copy_location(x, user) for x in release], *todo[index + 1 :]]

    def call(self, total: ast.BinOp, post: _Post | None, at: int, pre: ast.expr | None) -> ast.Call:
        operands = [_InPlace(self).visit(x) for x in (total.left, total.right)]
        given: dict[str, ast.expr | None] = {"pre": pre}
        if post:
            operands[at] = _InPlace(self).visit(post.branch)
            given |= {"post": post.norm, "between": post.between, "at": ast.Constant(at)}
        self.steps[Step(*(getattr(given.get(side), "attr", None) for side in ("post", "pre")))] = None
        keywords = [ast.keyword(name, value) for name, value in given.items() if value is not None]
        return ast.copy_location(ast.Call(ast.Name("_add_norm" if pre else "_add", ast.Load()), operands, keywords), total)

    def calls(self, e: Any, names: set[str]) -> bool:
        """Whether e is a call of one of the layer's modules with one argument."""
        one = isinstance(e, ast.Call) and len(e.args) == 1 and not e.keywords and not isinstance(e.args[0], ast.Starred)
        return one and self.is_mine(e.func) and e.func.attr in names

    def is_mine(self, e: Any) -> bool:
        return isinstance(e, ast.Attribute) and isinstance(e.value, ast.Name) and e.value.id == self.me

    def note(self, statement: ast.stmt) -> None:
        """A sum with what was put aside, or to what it is added to, is a residual sum."""
        if _names(statement.value) & {*self.copies, _target(statement)}:  # type: ignore[attr-defined]
            text = ast.unparse(statement)
            self.others.append(re.sub(r"\b_normed\d+\b", lambda name: self.normed[name[0]], text))


class _InPlace(ast.NodeTransformer):
    """Steps that are one expression: `self.pre(a + b)`, `a + self.post(b)`."""

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self.writer.calls(node, self.writer.norms) and _is_sum(node.args[0]):
            total: Any = node.args[0]
            post, at = self.writer.post_of(ast.Return(total), [], [], True)
            call = self.writer.call(total, post, at, node.func)
            return ast.copy_location(ast.Subscript(call, ast.Constant(1), ast.Load()), node)
        return self.generic_visit(node)

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
        target = getattr(statement, "target", None) if isinstance(statement, ast.AnnAssign) else None
    return target.id if isinstance(target, ast.Name) and getattr(statement, "value", None) else None


def _copied(statement: Any) -> tuple[str | None, str | None] | None:
    """(new name, old name) of a copy; (None, None) of a docstring; None of anything else."""
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
    """Neither has an effect nor sees one."""
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
