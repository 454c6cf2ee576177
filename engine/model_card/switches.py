"""Which way a chat template goes where a switch is not set, read in its syntax tree: nothing is rendered.

A condition is worked out for a switch that is undefined, true or false, whatever else it asks for being unknown.
"""

from collections.abc import Iterator
from typing import Any, Final

from jinja2 import nodes

UNDEFINED: Final = object()
_UNKNOWN: Final = object()
SWITCHES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_mode", "think")
"""Variables by which templates switch thinking, the usual first."""


def default_of(tree: nodes.Template, switch: str) -> Any:
    """The value that ``switch`` has where nobody sets it; None where the template does not tell.

    Either a constant is put in its place, or conditions treat it like true or like false.
    """
    for value in _constants(tree, switch):
        return value
    likes: set[bool] = set()
    for condition in _conditions(tree, switch):
        unset, on, off = (_value(condition, switch, given) for given in (UNDEFINED, True, False))
        if _UNKNOWN in (unset, on, off) or bool(on) == bool(off):
            continue
        likes.add(bool(unset) == bool(on))
    return likes.pop() if len(likes) == 1 else None


def _constants(tree: nodes.Template, switch: str) -> Iterator[Any]:
    """Constants that an undefined ``switch`` is replaced by: ``set`` under a condition, or a ``default``."""
    for one in tree.find_all(nodes.If):
        if _value(one.test, switch, UNDEFINED) is True:
            for inner in one.body:
                if _sets(inner, switch):
                    yield inner.node.value  # type: ignore[attr-defined]
    for choice in tree.find_all(nodes.CondExpr):
        taken = _value(choice.test, switch, UNDEFINED)
        branch, other = (choice.expr1, choice.expr2) if taken is True else (choice.expr2, choice.expr1)
        if taken is not _UNKNOWN and isinstance(branch, nodes.Const) and _is(other, switch):
            yield branch.value
    for call in tree.find_all(nodes.Filter):
        given = call.args[0] if call.name in ("default", "d") and call.args else None
        if _is(call.node, switch) and isinstance(given, nodes.Const):
            yield given.value


def _sets(node: nodes.Node, switch: str) -> bool:
    return isinstance(node, nodes.Assign) and _is(node.target, switch) and isinstance(node.node, nodes.Const)


def _conditions(tree: nodes.Template, switch: str) -> Iterator[nodes.Node]:
    """Conditions that ask for the switch, each with the smallest parts that can be worked out."""
    tests = [one.test for one in tree.find_all(nodes.If)] + [one.test for one in tree.find_all(nodes.CondExpr)]
    for test in tests:
        yield from _parts(test, switch)


def _parts(test: nodes.Node, switch: str) -> Iterator[nodes.Node]:
    """``test``, or where something else decides as well, the parts of it that only ask for the switch."""
    if not any(name.name == switch for name in (test, *test.find_all(nodes.Name)) if isinstance(name, nodes.Name)):
        return
    if _UNKNOWN not in (_value(test, switch, UNDEFINED), _value(test, switch, True), _value(test, switch, False)):
        yield test
    elif isinstance(test, nodes.And | nodes.Or):
        yield from _parts(test.left, switch)
        yield from _parts(test.right, switch)
    elif isinstance(test, nodes.Not):
        yield from _parts(test.node, switch)


def _value(node: nodes.Node | None, switch: str, given: Any) -> Any:
    """What an expression gives where the switch has the value ``given``."""
    if isinstance(node, nodes.Const):
        return node.value
    if isinstance(node, nodes.Name):
        return given if node.name == switch else _UNKNOWN
    if isinstance(node, nodes.Not):
        inner = _value(node.node, switch, given)
        return inner if inner is _UNKNOWN else not _truth(inner)
    if isinstance(node, nodes.And | nodes.Or):
        return _joined(node, switch, given)
    if isinstance(node, nodes.Test):
        return _tested(node, _value(node.node, switch, given))
    if isinstance(node, nodes.Compare) and len(node.ops) == 1 and node.ops[0].op in ("eq", "ne"):
        left, right = _value(node.expr, switch, given), _value(node.ops[0].expr, switch, given)
        return _UNKNOWN if _UNKNOWN in (left, right) else (left == right) == (node.ops[0].op == "eq")
    if isinstance(node, nodes.Filter) and node.name in ("default", "d") and node.args:
        inner = _value(node.node, switch, given)
        return _value(node.args[0], switch, given) if inner is UNDEFINED else inner
    return _UNKNOWN


def _joined(node: nodes.And | nodes.Or, switch: str, given: Any) -> Any:
    """``and`` and ``or`` as far as they can be known: one side may decide alone."""
    decides = isinstance(node, nodes.Or)
    sides = [_value(side, switch, given) for side in (node.left, node.right)]
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


def _is(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
