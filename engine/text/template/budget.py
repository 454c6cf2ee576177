"""How much one rendering of a template may make: characters, items, steps, and processor time of its thread.

A template is a program that came with a model: ``'x' * 10**9`` or three nested loops would end the process or hold
its thread for ever. Every value that can grow is counted before it is made.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.utils import Namespace

_CHARACTERS = 1 << 26
"""What a rendering may make of nothing: some 70 million characters and items."""
_TIMES_INPUT = 64
"""And of each character of what it is given: a long conversation passes through many filters."""
_MOST_GIVEN = 1 << 33
"""Far more than any memory holds: what is given is only measured."""
SECONDS = 10.0
"""Processor time of the rendering thread; the largest templates that are known take a few milliseconds."""
STEP = 8
"""What a turn of a loop, a call, or a place in a list counts for: as much memory as so many characters."""
LONGEST_INT = 1 << 17
"""Bits of a number: arithmetic on longer ones takes seconds."""
_LOOKS = 32
"""Steps between two looks at the clock."""
_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class TooMuchError(jinja2.TemplateError):
    """The template makes more than it may, or takes longer."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a value with all that it holds, each as often as it would be written: characters, items, their depths."""

    characters: int = 0
    items: int = 0
    depths: int = 0

    @property
    def total(self) -> int:
        """What the value counts for."""
        return self.characters + STEP * self.items


class Budget:
    """What is left of a rendering's allowance. ``given`` is what it gets to work with, ``seconds`` its time."""

    def __init__(self, given: Any = "", seconds: float = SECONDS, most: int = _CHARACTERS) -> None:
        self._seconds, self._ends, self._steps = seconds, math.inf, 0
        self.most = self._left = _MOST_GIVEN
        self.most = self._left = most + _TIMES_INPUT * self.measure(given).total
        self._ends = time.thread_time() + seconds

    def charge(self, amount: int) -> None:
        """Take ``amount`` from what is left. Raises :class:`TooMuchError`."""
        self._left -= amount
        if self._left < 0:
            raise TooMuchError(f"it makes more than {self.most:,} characters")

    def step(self) -> None:
        """Count a turn of a loop or a call. Raises :class:`TooMuchError`."""
        self.charge(STEP)
        self._steps += 1
        if self._steps % _LOOKS == 0:
            self._look()

    def _look(self) -> None:
        """At the clock."""
        if time.thread_time() > self._ends:
            raise TooMuchError(f"it takes longer than {self._seconds:g} s")

    def steps(self, values: Iterable[Any]) -> Iterator[Any]:
        """``values``, each of them a step."""
        for value in values:
            self.step()
            yield value

    def measure(self, value: Any) -> Size:
        """How large ``value`` is when it is written; walks as far as what is left. Raises :class:`TooMuchError`."""
        if isinstance(value, str | bytes):
            return Size(len(value))
        characters = items = depths = looks = 0
        waiting = [(value, 1)]
        while waiting:
            one, depth = waiting.pop()
            if isinstance(one, str | bytes):
                characters += len(one)
            elif (inner := _inside(one)) is not None:
                items += len(inner)
                depths += depth * len(inner)
                if characters + STEP * items > self._left:
                    self.charge(characters + STEP * items)
                looks += len(inner) + 1
                if looks > _LOOKS * STEP:
                    looks = 0
                    self._look()
                waiting.extend([(part, depth + 1) for part in inner])
        return Size(characters, items, depths)

    def charge_value(self, value: Any) -> Any:
        """Charge for what was just made, a text or a list; gives ``value`` back."""
        if isinstance(value, str | bytes | list | tuple | dict | set | frozenset):
            self.charge(len(value))
        elif isinstance(value, int) and value.bit_length() > LONGEST_INT:
            raise TooMuchError("it computes with numbers of more than 40,000 digits")
        return value


def _inside(value: Any) -> list[Any] | None:
    """What ``value`` holds and shows when it is written; None for what is not looked into."""
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, Namespace):
        value = getattr(value, "_Namespace__attrs")  # noqa: B009 - Python would mangle the name of ours into it
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return None


_current: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def budget() -> Budget:
    """That of the rendering under way in this thread; a new one outside of any."""
    return _current.get() or Budget()


@contextmanager
def within(allowed: Budget) -> Iterator[None]:
    """What is rendered here takes from ``allowed``."""
    token = _current.set(allowed)
    try:
        yield
    finally:
        _current.reset(token)


def compiling() -> Budget:
    """For what Jinja computes while it compiles; what is larger is left to the rendering."""
    return Budget(most=1 << 16)


def render_within(template: jinja2.Template, variables: Mapping[str, Any], allowed: Budget | None = None) -> str:
    """Render ``template``, whose environment is a ``BoundedEnvironment``. Raises :class:`TooMuchError`."""
    with within(Budget(variables) if allowed is None else allowed):
        return template.render(variables)
