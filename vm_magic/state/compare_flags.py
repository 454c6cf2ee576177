"""``--compare KEY=V1,V2`` of ``chat``: what differs between replies that are written side by side."""

import argparse
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError, RequestError
from engine.format.text import shortened
from engine.params.sampling_params import SamplingParams

MAX_VARIANTS = 8
"""Most replies of one comparison."""
_LONGEST_LABEL = 48
_ON_OFF = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


@dataclass(frozen=True)
class Variant:
    """One of the replies: what it has that others have not. ``model`` is a name as typed."""

    label: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    think: bool | None = None
    thinking_token_budget: int | None = None
    system: str | None = None
    model: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What differs, by name, for a table."""
        own = {name: getattr(self, name) for name in ("think", "thinking_token_budget", "system", "model")}
        return {**self.sampling, **{name: value for name, value in own.items() if value is not None}}


def add_compare_flag(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` ``--compare``."""
    parser.add_argument(
        "--compare",
        action="append",
        metavar="KEY=V1,V2",
        help="replies side by side, written at once: temperature=0,0.7 (any sampling value), think=on,off, "
        "model=A,B (this kernel's and the connected server's), system=TEXT once for each text; several multiply. "
        "None joins the conversation until it is kept: a button, or _.keep(1)",
    )


def compare_names(readers: Mapping[str, Callable[[str], Any]]) -> list[str]:
    """The names that ``--compare`` takes, given those of sampling values."""
    return [*readers, "think", "thinking_token_budget", "system", "model"]


def read_variants(texts: Sequence[str], readers: Mapping[str, Callable[[str], Any]]) -> list[Variant]:
    """All combinations of what ``texts`` (``KEY=V1,V2``) say; ``readers`` read sampling values from text.

    Raises ConfigError or RequestError naming what is wrong.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, mark, rest = text.partition("=")
        name = name.strip().replace("-", "_")
        if not mark or not rest.strip():
            raise ConfigError(f"--compare {text}: expected KEY=V1,V2, such as temperature=0,0.7", flag="compare")
        parts = [rest] if name == "system" else [part.strip() for part in rest.split(",")]
        axes.setdefault(name, []).extend(_value(name, part, readers) for part in parts)
    for name, values in axes.items():
        if len(values) < 2:
            fix = f", such as {name}={_shown(values[0])},…"
            fix = "; repeat the flag with another text" if name == "system" else fix
            raise ConfigError(f"--compare {name}: one value is nothing to compare{fix}", flag="compare")
    points = list(itertools.product(*axes.values()))
    if len(points) > MAX_VARIANTS:
        many = f"--compare: {len(points)} combinations; at most {MAX_VARIANTS} fit side by side"
        raise ConfigError(many, flag="compare")
    return _labelled([dict(zip(axes, point, strict=True)) for point in points])


def _labelled(points: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """Variants whose labels differ: of equal ones the second is ``… (2)``."""
    seen: dict[str, int] = {}
    made: list[Variant] = []
    for point in points:
        label = " ".join(f"{name}={_shown(value)}" for name, value in point.items())
        seen[label] = seen.get(label, 0) + 1
        own = {name: point[name] for name in ("think", "thinking_token_budget", "system", "model") if name in point}
        sampling = {name: value for name, value in point.items() if name not in own}
        made.append(Variant(label if seen[label] == 1 else f"{label} ({seen[label]})", sampling, **own))
    return made


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return shortened(" ".join(text.split()), _LONGEST_LABEL)


def _value(name: str, text: str, readers: Mapping[str, Callable[[str], Any]]) -> Any:
    if name in ("system", "model") and text:
        return text
    if name == "think" and text.lower() in _ON_OFF:
        return _ON_OFF[text.lower()]
    read = int if name == "thinking_token_budget" else readers.get(name)
    if read is None and name != "think":
        raise _unknown(name, readers)
    try:
        if read is None:
            raise ValueError
        value = read(text)
        if name in readers:
            SamplingParams().replace(**{name: value})
    except RequestError as error:
        raise RequestError(f"--compare {name}={text}: {error}", param=name) from None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        wanted = "on or off" if read is None else "a whole number" if read is int else "a number"
        raise ConfigError(f"--compare {name}={text}: expected {wanted}", flag="compare") from None
    return value


def _unknown(name: str, readers: Mapping[str, Callable[[str], Any]]) -> ConfigError:
    names = compare_names(readers)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(names)}"
    return ConfigError(f"--compare {name}: not something to compare; {hint}", flag="compare")
