"""What a tool parser is, and the tools' schemas that types are taken from."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.text.parse.scan.output_sink import MakeCallId, OutputSink, random_call_id
from engine.text.parse.scan.scanner import MarkupError, Scanner, Steps
from engine.text.template.recognition import Recognised


class ToolSchemas:
    """The functions of a request: ``[{"type": "function", "function": {"name": …, "parameters": …}}]``."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        functions = [tool["function"] if isinstance(tool.get("function"), Mapping) else tool for tool in tools or ()]
        self._parameters = {str(function.get("name")): function.get("parameters") or {} for function in functions}

    @property
    def names(self) -> frozenset[str]:
        """Names of the declared functions."""
        return frozenset(self._parameters)

    def declares(self, function: str, parameter: str) -> bool:
        """Whether a function has a parameter of this name."""
        return parameter in self._properties(function)

    def kinds(self, function: str, parameter: str) -> frozenset[str]:
        """JSON types that a parameter may have; empty where nothing is declared."""
        properties = self._properties(function)
        if parameter not in properties:
            return frozenset()
        return frozenset(_kinds(properties[parameter], self._parameters[function], 0))

    def _properties(self, function: str) -> Mapping[str, Any]:
        root = self._parameters.get(function)
        properties = root.get("properties") if isinstance(root, Mapping) else None
        return properties if isinstance(properties, Mapping) else {}


_NAMES = {"int": "integer", "float": "number", "double": "number", "bool": "boolean", "str": "string", "text": "string"}
_NAMES |= {"dict": "object", "map": "object", "list": "array", "tuple": "array", "none": "null"}
_DEEPEST = 8
_NAME = re.compile(r"[\w.:/@$+-]{1,256}")
"""The characters that OpenAI allows, and those that other makers of tools add."""


def _kinds(schema: Any, root: Any, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return set()
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
    found = {_NAMES.get(str(name).lower(), str(name).lower()) for name in names}
    if not found:
        found |= {_kind_of(value) for value in [*(schema.get("enum") or ()), *_constant(schema)]}
    if not found and "properties" in schema:
        found.add("object")
    for word in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(word) or ():
            found |= _kinds(choice, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        found |= _kinds(target, root, depth + 1)
    if schema.get("nullable") is True and found:
        found.add("null")
    return found


def _constant(schema: Mapping[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else []


def _kind_of(value: Any) -> str:
    text = json.dumps(value)
    first = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    return first.get(text[0], "integer" if isinstance(value, int) else "number")


def is_function_name(text: str) -> bool:
    """Whether a call can name a function so."""
    return bool(_NAME.fullmatch(text))


def function_name(text: object, declared: frozenset[str] | None = None) -> str:
    """``text`` as a function's name, one of ``declared`` if given. Raises MarkupError for any other text."""
    name = text.strip() if isinstance(text, str) else ""
    if not is_function_name(name) or (declared is not None and name not in declared):
        raise MarkupError("name")
    return name


@dataclass(frozen=True, slots=True)
class DemandedForm:
    """How a grammar writes calls that ``tool_choice`` demands.

    A call is ``{"name": …, arguments_key: {…}}`` between the texts of ``begin`` and ``end``, in which each mark is an
    item, since it may be a single token. Several calls are separated by ``separator``.
    """

    arguments_key: str
    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    separator: str = "\n"


@dataclass(frozen=True, kw_only=True)
class FormatFacts(Recognised):
    """What differs between formats of tool calls, besides their marks.

    ``make_call_id`` makes ids for calls that have none. ``demanded`` is the form of demanded calls; None: vLLM's
    (:mod:`engine.text.parse.tool_parsers.forced`), which all parsers read when a call is demanded. ``bare_opening`` is
    what a call without a mark begins with, ``NAME`` in it the function's.
    """

    make_call_id: MakeCallId = random_call_id
    demanded: DemandedForm | None = None
    bare_opening: str = ""


class ToolParser(Protocol):
    """One way to write tool calls; implementations inherit :class:`FormatFacts`.

    ``starts`` are the marks that a call begins with, ``ends`` those that it ends with. ``bare`` holds
    characters that, at the beginning of an answer, may begin a call without a mark. ``strays`` are marks
    without a meaning after a call, ends among them.
    """

    @property
    def make_call_id(self) -> MakeCallId:
        """See :class:`FormatFacts`."""

    @property
    def demanded(self) -> DemandedForm | None:
        """See :class:`FormatFacts`."""

    @property
    def bare_opening(self) -> str:
        """See :class:`FormatFacts`."""

    def in_template(self, template: str) -> bool:
        """See :class:`Recognised`."""

    def in_vocab(self, vocab: Collection[str]) -> bool:
        """See :class:`Recognised`."""

    @property
    def starts(self) -> tuple[str, ...]:
        """Marks that begin calls."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks that end calls: text before one of them was not cut off."""

    @property
    def strays(self) -> tuple[str, ...]:
        """Marks that are dropped after a call."""

    @property
    def bare(self) -> str:
        """First characters of calls without a mark."""

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """Read calls after ``start`` (empty for a bare one).

        Raises MarkupError where the text is not a call: before ``sink.call``, all of it becomes content;
        after it, the part not yet read does.
        """
