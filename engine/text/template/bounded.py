"""Jinja's sandbox with bounds: what a template writes, makes on the way and computes, and for how long.

The sandbox keeps a template from the process's objects; here it is kept from its memory and its time too
(:mod:`engine.text.template.budget`). Templates behave as ever below the bounds.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

from engine.text.template.budget import LONGEST_INT, TooMuchError, budget

_COUNTED, _MADE, _JOINED = "counted by vm-magic", "made by vm-magic", "joined by vm-magic"
"""Filters that no template can name, for they hold spaces."""
_WIDTHS = re.compile(r"%(?:\([^)]{0,200}\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")
_NUMBER = re.compile(r"\d+")
_STRUCTURE = frozenset(
    [
        "attr",
        "batch",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "groupby",
        "items",
        "last",
        "length",
        "list",
        "map",
        "max",
        "min",
        "random",
        "reject",
        "rejectattr",
        "reverse",
        "round",
        "select",
        "selectattr",
        "slice",
        "sort",
        "sum",
        "unique",
    ]
)
"""Filters that pass values on; the others write them as text."""
_LONGEST_WORD = 1 << 16
"""Characters that filters with searches of more than linear time take."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates are rendered with :func:`~engine.text.template.budget.render_within`."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "//", "/"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, optimized=False, **options)
        self.filters = _Filters({name: _bounded(name, function) for name, function in self.filters.items()})
        dict.update(self.filters, {_COUNTED: _Counted, _MADE: _made, _JOINED: _joined})

    def concat(self, parts: Iterable[str]) -> str:
        """The texts of a template, macro or block as one."""
        kept, charge = [], budget().charge
        for part in parts:
            charge(len(part) + 1)
            kept.append(part)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, weighed before it is computed."""
        _weigh(operator, left, right)
        return budget().charge_value(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
        """Call ``__obj``: a step, and methods of texts and numbers are weighed before."""
        allowed = budget()
        allowed.step()
        if isinstance(__obj, LoopContext) and args:
            args = (_Counted(args[0]), *args[1:])
        elif __obj is generate_lorem_ipsum:
            _refuse_above(1000, [*args, *kwargs.values()])
        elif isinstance(owner := getattr(__obj, "__self__", None), str | bytes | int | float):
            args = _weighed_call(owner, __obj.__name__, args, kwargs)
        elif owner is int or owner is str or owner is bytes:
            _refuse_above(_LONGEST_WORD, [len(one) for one in args if isinstance(one, str | bytes)])
        return allowed.charge_value(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` in Jinja's sandbox, with the widths that it is given weighed."""
        plain = super().wrap_str_format(value)
        if plain is None:
            return None
        text = str(value.__self__)

        def weighed(*args: Any, **kwargs: Any) -> str:
            formatter = _Weigher(self)
            mapping = kwargs if value.__name__ == "format" else args[0] if args else {}
            formatter.vformat(text, args if value.__name__ == "format" else (), mapping)
            return plain(*args, **kwargs)

        return functools.update_wrapper(weighed, plain)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counters().visit(source), *args, **kwargs)


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that are given to the environment later are bounded too."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _bounded(name, function))


class _Counters(NodeTransformer):
    """Puts the counters into a template's tree: around what is looped over, made of parts, and joined with ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        """Each turn is a step."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        """The parts are weighed before they become one."""
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802 - Jinja's name
        """A list that holds a list twice is twice as long when it is written."""
        self.generic_visit(node)
        return _filtered(node, _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802 - Jinja's name
        """As a list."""
        self.generic_visit(node)
        return _filtered(node, _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802 - Jinja's name
        """As a list, where it is not what is assigned to."""
        self.generic_visit(node)
        return _filtered(node, _MADE) if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Counted:
    """What a loop goes over, each turn a step."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __iter__(self) -> Any:
        return budget().steps(iter(self._values))

    def __len__(self) -> int:
        return len(self._values)


def _made(value: Any) -> Any:
    allowed = budget()
    allowed.charge(allowed.measure(value).total)
    return value


def _joined(parts: Sequence[Any]) -> str:
    allowed, texts = budget(), []
    for part in parts:
        allowed.charge(allowed.measure(part).total)
        texts.append(str(part))
    return "".join(texts)


def _written(value: Any) -> Any:
    """What stands in ``{{ }}``: a list is weighed before it becomes text."""
    if not isinstance(value, str):
        _made(value)
    return value


def _weigh(operator: str, left: Any, right: Any) -> None:
    allowed = budget()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > LONGEST_INT and operator != "+":
            raise TooMuchError("it computes with numbers of more than 40,000 digits")
    elif operator == "*":
        for repeated, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(repeated, str | bytes | list | tuple):
                allowed.charge((allowed.measure(repeated).total + 1) * max(times, 0))
    elif operator == "+" and isinstance(left, list | tuple | str | bytes) and isinstance(right, type(left)):
        shorter = left if len(left) < len(right) else right  # what is added to a long list, step by step
        allowed.charge(allowed.measure(shorter).total + max(len(left), len(right)))
    elif operator == "%" and isinstance(left, str | bytes):
        _weigh_percent(left, right if isinstance(right, tuple | dict) else (right,))


def _weigh_percent(form: str | bytes, values: Any) -> None:
    """Charge for ``form % values``: values, widths and precisions."""
    text = form if isinstance(form, str) else form.decode("latin-1")
    allowed, num_used = budget(), 1
    for width, precision in _WIDTHS.findall(text):
        for number in filter(None, (width, precision)):
            if number == "*":
                raise TooMuchError("it pads with % to a width that it computes")
            allowed.charge(int(number) if len(number) < 20 else allowed.most)
        num_used += 1
    # A value by name may be written as often as there are marks.
    allowed.charge(allowed.measure(values).total * (num_used if isinstance(values, dict) else 1) + len(text))


def _weighed_call(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Charge for a method of a text or number before it is called; gives the arguments to call it with."""
    allowed, given = budget(), [*args, *kwargs.values()]
    numbers = [one for one in given if isinstance(one, int)]
    if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
        allowed.charge(max([0, *numbers]))
    elif name == "expandtabs":
        allowed.charge(owner.count("\t" if isinstance(owner, str) else b"\t") * max([8, *numbers]))
    elif name == "replace" and len(given) > 1:
        _weigh_replace(owner, given[0], given[1])
    elif name == "join" and args:
        parts = list(allowed.steps(args[0]))
        allowed.charge(allowed.measure(parts).total + len(owner) * len(parts))
        return (parts, *args[1:])
    elif name == "translate" and isinstance(owner, str) and args and isinstance(args[0], Mapping):
        longest = max([1, *(len(one) for one in args[0].values() if isinstance(one, str))])
        allowed.charge(len(owner) * longest)
    elif name == "from_bytes":
        _refuse_above(_LONGEST_WORD, [len(one) for one in given if isinstance(one, bytes | str)])
    return args


def _weigh_replace(text: str | bytes, old: Any, new: Any) -> None:
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        budget().charge(len(text) + text.count(old) * len(new))  # type: ignore[arg-type]


class _Weigher(SandboxedFormatter):
    """Goes through a format as ``str.format`` does and charges for what it would write."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Nothing; charges for the value and its widths."""
        allowed = budget()
        allowed.charge(allowed.measure(value).total)
        for number in _NUMBER.findall(format_spec):
            allowed.charge(int(number) if len(number) < 20 else allowed.most)
        return format_spec if not isinstance(value, int | float | str) else str(value)[:64]

    def convert_field(self, value: Any, conversion: Any) -> Any:  # noqa: ARG002 - the base's arguments
        """The value as it is: what ``!r`` writes is of its size."""
        return value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``name``: a step, weighed before it is called, and charged for what it gives."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0
    weigh = _WEIGHED.get(name, _weigh_written if name not in _STRUCTURE else None)

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        allowed = budget()
        allowed.step()
        if weigh is not None and len(args) > leading:
            first = weigh(args[leading], [*args[leading + 1 :]], kwargs)
            args = (*args[:leading], first, *args[leading + 1 :])
        if name == "join" and len(args) > leading:
            given = args[leading + 2] if len(args) > leading + 2 else kwargs.get("attribute")
            args = (*args[:leading], _weigh_join(args[0], args[leading], args[leading + 1 :], kwargs, given),
                    *args[leading + 1 :])  # fmt: skip
        return allowed.charge_value(function(*args, **kwargs))

    return bounded


def _weigh_written(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """For a filter that writes: its value and its arguments."""
    allowed = budget()
    if not isinstance(value, str):
        allowed.charge(allowed.measure(value).total)
    allowed.charge(sum(allowed.measure(one).total for one in [*args, *kwargs.values()]))
    return value


def _weigh_join(owner: Any, value: Any, rest: Sequence[Any], kwargs: Mapping[str, Any], attribute: Any) -> list[Any]:
    """The parts of ``value | join`` as a list, weighed."""
    allowed, parts = budget(), list(budget().steps(value))
    environment = getattr(owner, "environment", owner)
    written = parts if attribute is None else list(map(make_attrgetter(environment, attribute), parts))
    between = rest[0] if rest else kwargs.get("d", "")
    allowed.charge(allowed.measure(written).total + len(str(between)) * len(parts))
    return parts


def _weigh_padded(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """center, indent: a width for each line."""
    text = value if isinstance(value, str) else str(_written(value))
    widths = [len(one) if isinstance(one, str) else int(one) for one in [*args, *kwargs.values()] if one is not None]
    budget().charge(max([0, *widths]) * (text.count("\n") + 1) + len(text))
    return value


def _weigh_wrapped(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """wordwrap: at worst a line for each character."""
    longest = max([1, *(len(one) for one in [*args, *kwargs.values()] if isinstance(one, str))])
    budget().charge(len(value if isinstance(value, str) else str(_written(value))) * longest)
    return value


def _weigh_replaced(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """As the method."""
    given = [*args, *(kwargs[name] for name in ("old", "new") if name in kwargs)]
    if len(given) > 1:
        _weigh_replace(str(_written(value)), str(_written(given[0])), str(_written(given[1])))
    return value


def _weigh_formatted(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    _weigh_percent(str(_written(value)), dict(kwargs) if kwargs else tuple(args))
    return value


def _weigh_json(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """tojson: what is indented stands in lines, the deeper the longer."""
    allowed = budget()
    size = allowed.measure(value)
    named = [kwargs[name] for name in ("indent", "separators") if name in kwargs]
    given = [len(one) if isinstance(one, str) else one for one in [*args, *named]]
    width = max([1, *(one for one in given if isinstance(one, int))])
    longest = max([0, *(allowed.measure(one).characters for one in given if isinstance(one, list | tuple))])
    allowed.charge(size.characters + width * size.depths + longest * size.items)
    return value


def _weigh_counts(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """batch, slice, round: numbers that say how many parts or digits."""
    _refuse_above(1000, [*args, *kwargs.values()])
    return value


def _weigh_sum(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """sum: lists that are added to ``start`` one by one, each time all that there was."""
    parts = list(budget().steps(value))
    if any(isinstance(one, list | tuple) for one in [*args, *kwargs.values()]):
        budget().charge(budget().measure(parts).total * (len(parts) + 1))
    return parts


def _weigh_searched(value: Any, args: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """urlize, pprint, xmlattr, striptags: searches and layouts that take more than linear time."""
    _refuse_above(_LONGEST_WORD, [budget().measure(value).total])
    return _weigh_written(value, args, kwargs)


def _refuse_above(most: int, numbers: Iterable[Any]) -> None:
    if any(isinstance(number, int) and abs(number) > most for number in numbers):
        raise TooMuchError(f"a number or a text is larger than the {most:,} that are taken there")


_WEIGHED: dict[str, Callable[[Any, list[Any], Mapping[str, Any]], Any]] = {
    **dict.fromkeys(("center", "indent"), _weigh_padded),
    **dict.fromkeys(("batch", "slice", "round"), _weigh_counts),
    **dict.fromkeys(("urlize", "pprint", "xmlattr", "striptags"), _weigh_searched),
    "wordwrap": _weigh_wrapped,
    "replace": _weigh_replaced,
    "format": _weigh_formatted,
    "tojson": _weigh_json,
    "sum": _weigh_sum,
}
