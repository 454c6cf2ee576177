"""A model card: facts with their sources, what is wrong, and the text that one sends with a bug report."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool | tuple[str, ...]
"""What a fact says, in a form that JSON has."""
_WIDTH = 116
_MARGIN = "    "
"""Four spaces: where the text is pasted into Markdown, all below the title is code and stays as it is."""
_LONGEST_NAME = 24


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was understood. ``source`` is a file (relative to the model's folder) and a key in it, or what
    else says so: a flag, mlx-lm, this device.
    """

    name: str
    value: Value
    source: str

    @property
    def text(self) -> str:
        """The value for people."""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        return ", ".join(self.value) if isinstance(self.value, tuple) else str(self.value)


@dataclass(frozen=True, slots=True)
class Section:
    """Facts about one part of a model."""

    title: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class ModelCard:
    """What was understood of the model ``name``, from its files alone; ``str()`` is a text to send.

    ``problems`` would be refused by a load or change tokens; ``remarks`` are worth knowing. ``file``: the one file that
    the model is, empty for a folder.
    """

    name: str
    sections: tuple[Section, ...]
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    file: str = ""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """All facts, section after section."""
        return tuple(fact for section in self.sections for fact in section.facts)

    def section(self, title: str) -> Mapping[str, Fact]:
        """The facts of one section by their names; empty where nothing is known."""
        return {fact.name: fact for section in self.sections if section.title == title for fact in section.facts}

    def shown_source(self, fact: Fact) -> str:
        """A fact's source for people: the name of the only file there is would be repeated in every line."""
        return fact.source.removeprefix(f"{self.file}: ") if self.file else fact.source

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: facts by section and name, each with its value and source."""
        facts = {
            section.title: {
                fact.name: {
                    "value": list(fact.value) if isinstance(fact.value, tuple) else fact.value,
                    "source": fact.source,
                }
                for fact in section.facts
            }
            for section in self.sections
        }
        return {
            "model": self.name,
            "file": self.file or None,
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "facts": facts,
        }

    def __str__(self) -> str:
        title = f"Model card of {self.name}" + (f", from {self.file}" if self.file else "")
        return "\n".join([title, "", *_findings(self), *_sections(self)]).rstrip()

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


def _findings(card: ModelCard) -> Iterator[str]:
    for title, lines in (("problems", card.problems), ("remarks", card.remarks)):
        yield f"{_MARGIN}{title}" if lines else f"{_MARGIN}{title}: none"
        for line in lines:
            yield from _wrapped(line, f"{_MARGIN}  - ", f"{_MARGIN}    ")
        yield ""


def _sections(card: ModelCard) -> Iterator[str]:
    for section in card.sections:
        yield f"{_MARGIN}{section.title}"
        width = min(_LONGEST_NAME, max(len(fact.name) for fact in section.facts))
        for fact in section.facts:
            source = f"  [{card.shown_source(fact)}]"
            yield from _wrapped(
                f"{fact.text}{source}", f"{_MARGIN}  {fact.name:<{width}}  ", _MARGIN + " " * (width + 4)
            )
        yield ""


def _wrapped(text: str, first: str, later: str) -> list[str]:
    """``text`` in lines; words that are longer than a line stay whole, so that they can be searched for."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    ) or [first.rstrip()]
