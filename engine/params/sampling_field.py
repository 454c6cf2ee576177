"""What is known of one sampling parameter: its kind and range, and where it is listed, sent, set and shown.

The descriptions themselves stand at the fields of :class:`engine.params.sampling_params.SamplingParams`.
Request bodies, flags, live settings, the panel and ``explain`` read them there.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from engine.errors import RequestError
from engine.format.text import shortened

Group = Literal["choice", "penalty", "length", "seed"]
GROUPS: tuple[Group, ...] = ("choice", "penalty", "length", "seed")
"""Groups of the common parameters, in the order in which people read them."""
Wire = Literal["all", "completions", "own"]
_METADATA = "parameter"
_T = TypeVar("_T")


@dataclass(frozen=True)
class ValueKind:
    """What the values of a parameter are.

    ``type`` is how flags and request bodies take them; ``json`` the Python types of a setting's value, which
    ``setting`` names. ``read`` gives a value as it is kept, or raises TypeError, ValueError or AttributeError where
    it is not one: it ``must`` be one. ``optional``: None is kept too.
    """

    type: Any
    must: str
    json: tuple[type, ...]
    setting: str
    read: Callable[[Any], Any]
    optional: bool = False

    def takes_setting(self, value: object) -> bool:
        """Whether ``value`` is of the right type for a setting; its range is not looked at."""
        return isinstance(value, self.json) and (bool in self.json or not isinstance(value, bool))


_MOST = 3.4028234663852886e38
"""What float32, in which logits are computed with, can hold."""


def _number(value: Any) -> float:
    """``value``, which may be numpy's, as Python's own: an int stays one. Raises OverflowError beyond float32."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    kept: float = int(value) if isinstance(value, Integral) else float(value)
    if kept not in (math.inf, -math.inf) and abs(kept) > _MOST:
        raise OverflowError
    return kept


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    return int(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _items(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read_all(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable | None):
            raise TypeError
        return () if value is None else tuple(read(item) for item in value)

    return read_all


def _biases(value: Any) -> dict[int, float]:
    return {int(token): _number(float(bias)) for token, bias in (value or {}).items()}


_texts = _items(_text)
NUMBER = ValueKind(float, "be a number", (int, float), "a number", _number)
WHOLE = ValueKind(int, "be a whole number", (int,), "a whole number", _whole)
WHOLE_OR_NONE = replace(WHOLE, must="be a whole number or None", optional=True)
SWITCH = ValueKind(bool, "be True or False", (bool,), "true or false", _switch)
TEXTS = ValueKind(list[str], "be a list of texts", (list,), "a list", _texts)
TEXT_OR_TEXTS = ValueKind(
    str | list[str],
    "be a list of texts, or one text",
    (str, list),
    "a text or a list of texts",
    lambda value: _texts([value] if isinstance(value, str) else value),
)
TOKEN_IDS = ValueKind(list[int], "be a list of token ids", (list,), "a list", _items(_whole))
BIASES = ValueKind(
    dict[str, float],
    "map token ids to numbers",
    (dict,),
    "a JSON object of token ids and biases",
    _biases,
)


@dataclass(frozen=True)
class Range:
    """Bounds of a value, inside too (``low`` not, if ``low_open``). ``must`` says it where the numbers would not.

    Without ``high`` any finite number will do.
    """

    low: float | None = None
    high: float | None = None
    low_open: bool = False
    must: str = ""

    def __contains__(self, value: float) -> bool:
        above = self.low is None or self.low < value or (value == self.low and not self.low_open)
        return above and (value < math.inf if self.high is None else value <= self.high)  # NaN is nowhere

    def __str__(self) -> str:
        if self.must:
            return self.must
        if self.low is None or self.high is None:
            return f"be at most {self.high}" if self.low is None else f"be at least {self.low}"
        return f"be in {'(' if self.low_open else '['}{self.low}, {self.high}]"


@dataclass(frozen=True)
class ChatFlag:
    """The flag of ``chat``, ``complete`` and ``grid``; its name is the parameter's. ``read``: its text as a value."""

    help: str
    short: str = ""
    read: Callable[[str], Any] | None = None

    def names(self, parameter: str) -> tuple[str, ...]:
        """What may be typed for ``parameter``."""
        return (*([self.short] if self.short else []), f"--{parameter.replace('_', '-')}")


@dataclass(frozen=True)
class Slider:
    """The panel's slider."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class SamplingField:
    """All facts about one parameter but its name, type and default, which are the dataclass field's.

    ``group``: it is a common one; ``explain`` always shows it. ``live``: a changed setting reaches requests that run
    already, from their next token on. ``settable``: ``set``, the panel and ``%config`` take it.
    ``wire``: which request bodies have it under its own name: ``all`` that generate, ``completions`` and chats, or
    ``own`` where each body says it in its own way. ``generation_config`` is its name in
    ``generation_config.json``, if it has one; ``server_default``: vLLM takes it from there as a server's default.
    ``constraint``: it belongs to :class:`engine.params.structured_outputs.Constraints`.
    """

    kind: ValueKind
    _: KW_ONLY
    ranges: tuple[Range, ...] = ()
    group: Group | None = None
    flag: ChatFlag | None = None
    slider: Slider | None = None
    live: bool = False
    settable: bool = True
    wire: Wire = "all"
    generation_config: str = ""
    server_default: bool = False
    constraint: bool = False

    def check(self, name: str, value: Any) -> Any:
        """``value`` as it is kept. Raises RequestError, naming the parameter, for a wrong kind or range."""
        if value is None and self.kind.optional:
            return None
        try:
            kept = self.kind.read(value)
        except RequestError:
            raise
        except OverflowError:
            raise refuse(name, f"stay within float32's range (up to {_MOST:.1e})", _quoted(value)) from None
        except (AttributeError, TypeError, ValueError):
            raise refuse(name, self.kind.must, _quoted(value)) from None
        for bounds in self.ranges:
            if kept not in bounds:
                raise refuse(name, str(bounds), _quoted(kept))
        return kept


def _quoted(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "a number of thousands of digits"


def parameter(default: _T, known: SamplingField) -> _T:
    """A dataclass field with its default and what is ``known`` of it."""
    made: Any = (
        field(default_factory=dict, metadata={_METADATA: known})
        if isinstance(default, dict)
        else field(default=default, metadata={_METADATA: known})
    )
    return made  # type: ignore[no-any-return]


def known_of(made: Any) -> SamplingField | None:
    """What :func:`parameter` noted at a dataclass field, None for other fields."""
    return made.metadata.get(_METADATA)  # type: ignore[no-any-return]


def refuse(name: str, must: str, value: object) -> RequestError:
    """The error for a value of ``name`` that is not what it ``must`` be."""
    return RequestError(f"{name} must {must}, got {shortened(str(value), 60)}.", param=name)
