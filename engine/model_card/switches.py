"""Which way a chat template goes where a switch is not set, read in its syntax tree: nothing is rendered.

A condition is worked out for a switch that is undefined, true or false, whatever else it asks for being unknown.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from jinja2 import nodes

UNDEFINED: Final = object()
_UNKNOWN: Final = object()
EFFORTS = ("reasoning_effort", "thinking_mode")
"""Variables by which templates choose how much a model thinks, by a word."""
SWITCHES = ("enable_thinking", "thinking", "think", *EFFORTS)
"""Variables by which templates switch thinking, the usual first; all but :data:`EFFORTS` are true or false."""


def default_of(tree: nodes.Template, switch: str) -> Any:
    """The value that ``switch`` has where nobody sets it; None where the template does not tell.

    Either a constant is put in its place, or conditions treat it like true or like false.
    """
    for value in _constants(tree, switch):
        return value
    likes: set[bool] = set()
    for condition in _conditions(tree, switch):
        unset, on, off = (_value(condition, {switch: given}) for given in (UNDEFINED, True, False))
        if _truth(on) != _truth(off):
            likes.add(_truth(unset) == _truth(on))
    return likes.pop() if len(likes) == 1 else None


def own_variables(tree: nodes.Template) -> frozenset[str]:
    """Variables that the template sets itself, without asking whether they were given."""
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests = [one for one in tree.find_all(nodes.Test) if one.name in ("defined", "undefined")]
    defaults = [one for one in tree.find_all(nodes.Filter) if one.name in ("default", "d")]
    asked = {one.node.name for one in (*tests, *defaults) if isinstance(one.node, nodes.Name)}
    return frozenset(stored - asked - set(SWITCHES))


def _constants(tree: nodes.Template, switch: str) -> Iterator[Any]:
    """Constants that an undefined ``switch`` is replaced by: ``set`` under a condition, or a ``default``."""
    unset = dict.fromkeys(SWITCHES, UNDEFINED)
    for one in tree.find_all(nodes.If):
        if switch in _names(one.test) and _value(one.test, unset) is True:
            yield from _set_in(one.body, switch, unset)
    for choice in tree.find_all(nodes.CondExpr):
        taken = _value(choice.test, {switch: UNDEFINED})
        branch, other = (choice.expr1, choice.expr2) if taken is True else (choice.expr2, choice.expr1)
        if taken is not _UNKNOWN and isinstance(branch, nodes.Const) and _is(other, switch):
            yield branch.value
    for call in tree.find_all(nodes.Filter):
        given = call.args[0] if call.name in ("default", "d") and call.args else None
        if _is(call.node, switch) and isinstance(given, nodes.Const):
            yield given.value


def _set_in(body: Iterable[nodes.Node], switch: str, unset: Mapping[str, Any]) -> Iterator[Any]:
    """Constants that ``switch`` is set to in ``body``, on the way that is taken where nothing is set."""
    for node in body:
        if isinstance(node, nodes.Assign) and _is(node.target, switch) and isinstance(node.node, nodes.Const):
            yield node.node.value
        elif isinstance(node, nodes.If):
            taken = _value(node.test, unset)
            if taken is not _UNKNOWN and not node.elif_:
                yield from _set_in(node.body if _truth(taken) else node.else_, switch, unset)


def _conditions(node: nodes.Node, switch: str) -> Iterator[nodes.Node]:
    """Conditions that ask for the switch, each with the smallest parts that can be worked out.

    What is passed by where the switch is not set (``if … is defined``) tells nothing of that case.
    """
    if isinstance(node, nodes.If | nodes.CondExpr):
        yield from _parts(node.test, switch)
        taken = _value(node.test, {switch: UNDEFINED})
        passed = [] if taken is _UNKNOWN else _branches(node)[1 if _truth(taken) else 0]
    else:
        passed = []
    for child in node.iter_child_nodes():
        if not any(child is one for one in passed):
            yield from _conditions(child, switch)


def _branches(node: nodes.If | nodes.CondExpr) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """What follows where the condition holds, and what else."""
    if isinstance(node, nodes.If):
        return node.body, [*node.elif_, *node.else_]
    return [node.expr1], [] if node.expr2 is None else [node.expr2]


def _parts(test: nodes.Node, switch: str) -> Iterator[nodes.Node]:
    """``test``, or where something else decides as well, the parts of it that only ask for the switch."""
    if switch not in _names(test):
        return
    if all(_value(test, {switch: given}) is not _UNKNOWN for given in (UNDEFINED, True, False)):
        yield test
    elif isinstance(test, nodes.And | nodes.Or):
        yield from _parts(test.left, switch)
        yield from _parts(test.right, switch)
    elif isinstance(test, nodes.Not):
        yield from _parts(test.node, switch)


def _value(node: nodes.Node | None, given: Mapping[str, Any]) -> Any:
    """What an expression gives where names have the values ``given``; others are not known."""
    if isinstance(node, nodes.Const):
        return node.value
    if isinstance(node, nodes.Name):
        return given.get(node.name, _UNKNOWN)
    if isinstance(node, nodes.Not):
        inner = _value(node.node, given)
        return inner if inner is _UNKNOWN else not _truth(inner)
    if isinstance(node, nodes.And | nodes.Or):
        return _joined(node, given)
    if isinstance(node, nodes.Test):
        return _tested(node, _value(node.node, given))
    if isinstance(node, nodes.Compare) and len(node.ops) == 1 and node.ops[0].op in ("eq", "ne"):
        left, right = _value(node.expr, given), _value(node.ops[0].expr, given)
        return _UNKNOWN if _UNKNOWN in (left, right) else (left == right) == (node.ops[0].op == "eq")
    if isinstance(node, nodes.Filter) and node.name in ("default", "d") and node.args:
        inner = _value(node.node, given)
        return _value(node.args[0], given) if inner is UNDEFINED else inner
    return _UNKNOWN


def _joined(node: nodes.And | nodes.Or, given: Mapping[str, Any]) -> Any:
    """``and`` and ``or`` as far as they can be known: one side may decide alone."""
    decides = isinstance(node, nodes.Or)
    sides = [_value(side, given) for side in (node.left, node.right)]
    known = [_truth(side) for side in sides if side is not _UNKNOWN]
    if decides in known:
        return decides
    return _UNKNOWN if _UNKNOWN in sides else not decides


def _tested(node: nodes.Test, value: Any) -> Any:
    if value is _UNKNOWN:
        return _UNKNOWN
    known = {
        "defined": value is not UNDEFINED,
        "undefined": value is UNDEFINED,
        "none": value is None,
        "true": value is True,
        "false": value is False,
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
    }
    return known.get(node.name, _UNKNOWN)


def _truth(value: Any) -> bool:
    return value is not UNDEFINED and bool(value)


def _names(node: nodes.Node) -> set[str]:
    """The variables that an expression asks for."""
    own = {node.name} if isinstance(node, nodes.Name) else set()
    return own | {name.name for name in node.find_all(nodes.Name)}


def _is(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
