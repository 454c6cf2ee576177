"""Small changes to a function: another comparison, one more or less, a statement left out."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Add, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
Change = Callable[[], None]
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SIGNS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*",
    ast.FloorDiv: "//", ast.Div: "/", ast.Mod: "%", ast.And: "and", ast.Or: "or", ast.BitAnd: "&", ast.BitOr: "|",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change to the code of one function. ``change`` is in words, ``source`` the line it stands in."""

    file: Path
    line: int
    function: str
    first_line: int
    change: str
    source: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line} {self.function}: {self.change}    {self.source}"


def mutants_of(file: Path) -> Iterator[Mutant]:
    """All mutants of a file's functions; what stands outside of functions, and assertions, are left alone."""
    text = file.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    places = [(f, p) for f in _functions(tree) for p in range(len(list(_nodes(f))))]
    seen: set[tuple[int, int, str]] = set()
    for function, place in places:
        node = list(_nodes(function))[place]
        for number, (change, _) in enumerate(_changes(node)):
            key = (node.lineno, node.col_offset, change)
            if key not in seen:
                seen.add(key)
                code = _mutated(tree, function, place, number, file)
                first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
                yield Mutant(file, node.lineno, function.name, first, change, lines[node.lineno - 1].strip(), code)


def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions and methods, the outermost of nested ones only."""
    found: list[ast.FunctionDef] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found.append(node)
        else:
            found += _functions(node)
    return found


def _nodes(function: ast.FunctionDef) -> Iterator[Any]:
    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Assert):
            return
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    for statement in function.body:
        yield from (node for node in walk(statement) if hasattr(node, "lineno"))


def _mutated(tree: ast.Module, function: ast.FunctionDef, place: int, number: int, file: Path) -> CodeType:
    changed = copy.deepcopy(tree)
    twin = next(f for f in _functions(changed) if (f.lineno, f.name) == (function.lineno, function.name))
    _, change = list(_changes(list(_nodes(twin))[place]))[number]
    change()
    ast.fix_missing_locations(changed)
    return _code_of(compile(changed, str(file), "exec"), function)


def _code_of(code: CodeType, function: ast.FunctionDef) -> CodeType:
    first = min([function.lineno, *(one.lineno for one in function.decorator_list)])
    waiting = [code]
    while waiting:
        one = waiting.pop()
        if (one.co_name, one.co_firstlineno) == (function.name, first):
            return one
        waiting += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
    raise AssertionError(f"{function.name} is not in its own module")


def _changes(node: Any) -> Iterator[tuple[str, Change]]:
    """What can be changed of a node: in words, and how to change it in place."""
    yield from _in_expressions(node) if isinstance(node, ast.expr) else _in_statements(node)


def _in_expressions(node: Any) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            if (other := _SWAPPED.get(type(operator))) is not None:
                yield _words(operator, other), lambda i=i, other=other: node.ops.__setitem__(i, other())
    elif isinstance(node, ast.BinOp | ast.BoolOp) and (other := _SWAPPED.get(type(node.op))) is not None:
        yield _words(node.op, other), lambda: setattr(node, "op", other())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} -> {value}", lambda: setattr(node, "value", value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "without not", lambda: _become(node, node.operand)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "without -", lambda: setattr(node, "op", ast.UAdd())
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield f"{node.id} -> {_NAMES[node.id]}", lambda: setattr(node, "id", _NAMES[node.id])
    elif isinstance(node, ast.IfExp):
        yield "always the first", lambda: setattr(node, "test", ast.Constant(True))
        yield "always the second", lambda: setattr(node, "test", ast.Constant(False))


def _in_statements(node: Any) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "return None", lambda: setattr(node, "value", ast.Constant(None))
    if isinstance(node, ast.If | ast.While):
        yield f"{type(node).__name__.lower()} False", lambda: setattr(node, "test", ast.Constant(False))
    if isinstance(node, ast.If):
        yield "if True", lambda: setattr(node, "test", ast.Constant(True))
    if isinstance(node, ast.AugAssign) and (other := _SWAPPED.get(type(node.op))) is not None:
        yield _words(node.op, other), lambda: setattr(node, "op", other())
    if isinstance(node, ast.Break | ast.Continue | ast.AugAssign | ast.Delete) or _is_deed(node):
        yield "left out", lambda: _become(node, ast.Pass())
    if isinstance(node, ast.Assign) and not _is_none(node.value):
        yield "= None", lambda: setattr(node, "value", ast.Constant(None))


def _is_deed(node: Any) -> bool:
    return isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _words(operator: ast.AST, other: type) -> str:
    return f"{_SIGNS[type(operator)]} -> {_SIGNS[other]}"


def _become(node: Any, other: Any) -> None:
    """Turn a node into another one, in place."""
    line = (node.lineno, node.col_offset)
    node.__class__ = other.__class__
    node.__dict__.clear()
    node.__dict__.update(other.__dict__)
    node.lineno, node.col_offset = line
