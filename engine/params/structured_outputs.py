"""What a request's output must look like: a grammar, a thinking budget, an end to repetition.

:class:`Constraints` is what a user may say, checked here. While tokens are chosen the engine asks a
:class:`engine.core.token_guide.TokenGuide`, made by ``engine.text.guide.structured_output_manager``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from engine.errors import RequestError
from engine.params.tool_choice import demanded_names, tool_functions

MAX_PATTERN_SIZE = 1024
"""Longest pattern, in tokens, that repetition detection looks for."""


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """Output must be calls of ``tools`` (OpenAI's objects), in the format of the engine's tool-call parser.

    ``names`` are those that may be called, empty for all; ``parallel`` allows several calls.
    """

    tools: tuple[Mapping[str, Any], ...]
    names: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """The tools' ``function`` objects, all with a name."""
        return tool_functions(self.tools)

    @property
    def callable_functions(self) -> list[Mapping[str, Any]]:
        """The functions that may be called."""
        return [function for function in self.functions if not self.names or function["name"] in self.names]

    @classmethod
    def from_request(
        cls,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: str | Mapping[str, Any] | None,
        parallel: bool = True,
    ) -> Self | None:
        """OpenAI's ``tools`` and ``tool_choice``; None where no call is demanded (``auto``, ``none``, nothing)."""
        names = demanded_names(tool_choice, tools or ())
        return None if names is None else cls(tuple(tools or ()), names, parallel and not names)


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """A grammar for the answer; exactly one kind is given. Field names are vLLM's ``structured_outputs``.

    ``json`` is a schema (object or text), ``choice`` a list of texts, ``grammar`` Lark, or GBNF where it holds ``::=``,
    ``structural_tag`` an object with a ``format``, or with ``structures`` and ``triggers``. Raises RequestError.
    """

    json: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Mapping[str, Any] | str | None = None
    tool_calls: ToolCalls | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs takes exactly one of {', '.join(_KINDS[:-1])}, got {', '.join(given) or 'none'}.",
                param="structured_outputs",
            )
        texts = self.choice if isinstance(self.choice, list | tuple) else ()
        if self.choice is not None and (not texts or not all(isinstance(text, str) for text in texts)):
            raise RequestError("choice must be a list of at least one text.", param="structured_outputs")
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(f"{name} must be a string.", param="structured_outputs")

    @property
    def kind(self) -> str:
        """Which kind is given."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @classmethod
    def from_schema(cls, schema: Any) -> Self | None:
        """For what :func:`plain_schema` takes; None for None."""
        schema = plain_schema(schema)
        if schema is None:
            return None
        return cls(json_object=True) if schema is True else cls(json=schema)

    @classmethod
    def from_structured_outputs(cls, value: Self | Mapping[str, Any]) -> Self:
        """vLLM's request field, or what was made of one already. Unknown keys are refused."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"structured_outputs must be an object, got {value!r}.", param="structured_outputs")
        known = {f.name for f in fields(cls)} - {"tool_calls"}
        for name in value:
            if name not in known:
                raise RequestError(f"structured_outputs: {name!r} is not known.", param="structured_outputs")
        return cls(**value)

    @classmethod
    def from_response_format(cls, value: Mapping[str, Any] | None) -> Self | None:
        """OpenAI's ``response_format``: ``text`` (None), ``json_object``, ``json_schema`` or ``structural_tag``."""
        kind = None if value is None else value.get("type")
        if value is None or kind == "text":
            return None
        if kind == "json_object":
            return cls(json_object=True)
        if kind == "json_schema":
            described = value.get("json_schema")
            schema = described.get("schema") if isinstance(described, Mapping) else value.get("schema")
            if not isinstance(schema, Mapping):
                raise RequestError("response_format json_schema needs a schema object.", param="response_format")
            return cls(json=schema)
        if kind == "structural_tag":
            return cls(structural_tag=value)
        raise RequestError(
            f"response_format must be of type text, json_object, json_schema or structural_tag, got {kind!r}.",
            param="response_format",
        )


_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag", "tool_calls")


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """At most ``max_tokens`` tokens of thought, then its end is written for the model; 0: no thinking, -1: no limit.

    A request that asks for no limit keeps none: live settings do not override it.
    """

    max_tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < -1:
            raise RequestError(
                f"thinking_token_budget must be a non-negative integer or -1 for unlimited, got {self.max_tokens!r}.",
                param="thinking_token_budget",
            )

    @property
    def limit(self) -> int | None:
        """Most tokens of thought, None for any number."""
        return None if self.max_tokens == -1 else self.max_tokens

    @classmethod
    def from_request(cls, value: int | None) -> Self | None:
        """vLLM's ``thinking_token_budget``; None says nothing."""
        return None if value is None else cls(value)


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """Detects repeating token sequences and ends them.

    A pattern of ``min_pattern_size`` to ``max_pattern_size`` tokens repeats if it comes ``min_count`` times in a row.
    The names and checks are vLLM's; ``max_pattern_size`` 0 turns detection off. Inside a thought only the
    thought is ended, and the answer follows (``thinking_cut`` says so); elsewhere the reply ends with
    ``finish_reason`` ``repetition``.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        sizes = (self.max_pattern_size, self.min_pattern_size, self.min_count)
        fine = all(isinstance(size, int) and not isinstance(size, bool) and size < 2**31 for size in sizes)
        if not fine or not 0 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN_SIZE:
            raise RequestError(
                "repetition_detection: 0 <= min_pattern_size <= max_pattern_size <= "
                f"{MAX_PATTERN_SIZE} must hold; set both to 0 to turn it off.",
                param="repetition_detection",
            )
        if self.max_pattern_size and self.min_count < 2:
            raise RequestError("repetition_detection: min_count must be at least 2.", param="repetition_detection")

    @classmethod
    def from_request(cls, value: Self | Mapping[str, Any] | None) -> Self | None:
        """vLLM's request field, or what was made of one already; None says nothing. Unknown keys are refused."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"repetition_detection must be an object, got {value!r}.", param="repetition_detection")
        for name in value:
            if name not in ("max_pattern_size", "min_pattern_size", "min_count"):
                raise RequestError(f"repetition_detection: {name!r} is not known.", param="repetition_detection")
        return cls(**value)


THOUGHT_REPETITION = RepetitionDetection(max_pattern_size=256, min_pattern_size=16, min_count=8)
"""Applies inside thoughts where a request says nothing: at least 128 tokens that repeat exactly, eight times over.
Shorter patterns repeat at their multiples too, so one token 128 times is found as well."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """Everything that constrains one request's output. None: nothing asked for.

    ``calls`` may be made in place of an answer as ``structured`` says it must be.
    """

    structured: StructuredOutput | None = None
    thinking: ThinkingBudget | None = None
    repetition: RepetitionDetection | None = None
    calls: ToolCalls | None = None

    @classmethod
    def from_request(
        cls,
        *,
        structured_outputs: StructuredOutput | Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        thinking_token_budget: int | None = None,
        repetition_detection: RepetitionDetection | Mapping[str, Any] | None = None,
    ) -> Self | None:
        """From request fields as they come; None if nothing is constrained. Raises RequestError.

        A demanded call wins over ``response_format``, as in vLLM: clients send both in every turn.
        """
        calls = ToolCalls.from_request(tools, tool_choice, parallel_tool_calls)
        formats = [
            None if structured_outputs is None else StructuredOutput.from_structured_outputs(structured_outputs),
            StructuredOutput.from_response_format(response_format) if calls is None else None,
            None if calls is None else StructuredOutput(tool_calls=calls),
        ]
        found = [one for one in formats if one is not None]
        if len(found) > 1:
            raise RequestError(
                "structured_outputs and response_format, or a demanded tool call, exclude each other: give one.",
                param="structured_outputs",
            )
        made = cls(
            found[0] if found else None,
            ThinkingBudget.from_request(thinking_token_budget),
            RepetitionDetection.from_request(repetition_detection),
        )
        return None if made == cls() else made

    def with_possible_calls(
        self, tools: Sequence[Mapping[str, Any]] | None, tool_choice: object, *, parallel: bool
    ) -> Self:
        """With the calls that a request leaves to the model; a structural tag says itself what may be called."""
        if self.structured is None or self.structured.kind in ("tool_calls", "structural_tag"):
            return self
        if not tools or tool_choice not in (None, "auto"):
            return self
        return replace(self, calls=ToolCalls(tuple(tools), (), parallel))

    def joined(self, other: Self) -> Self:
        """Both together. Raises RequestError where they ask for the same."""
        found: dict[str, Any] = {}
        for part in fields(self):
            values = [one for one in (getattr(self, part.name), getattr(other, part.name)) if one is not None]
            if len(values) > 1:
                raise RequestError(
                    f"{_FIELD_NAMES[part.name]} was given twice, in SamplingParams and beside it: give one.",
                    param=_FIELD_NAMES[part.name],
                )
            found |= dict.fromkeys([part.name], values[0]) if values else {}
        return replace(self, **{**dict.fromkeys(_FIELD_NAMES), **found})


_FIELD_NAMES = {
    "structured": "structured_outputs",
    "thinking": "thinking_token_budget",
    "repetition": "repetition_detection",
    "calls": "tools",
}
"""What a request calls the parts of :class:`Constraints`."""


def plain_schema(schema: Any) -> Mapping[str, Any] | bool | None:
    """A JSON schema from a mapping or a pydantic model; True (any JSON object) and None stay. Raises RequestError."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if schema is None or schema is True or isinstance(schema, Mapping):
        return schema
    raise RequestError(f"schema: give a JSON schema (a dict), a pydantic model or True, got {schema!r}", param="schema")


def parse_json_text(text: str, what: str) -> Any:
    """JSON from a request's text. Raises RequestError naming ``what``."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{what} is not valid JSON: {error}.", param="structured_outputs") from None
