"""xgrammar's structural tags as a grammar: ``{"type": "structural_tag", "format": {…}}``, and vLLM's older form.

A format is a tree: texts and JSON in sequences, alternatives and tags, and free text in which triggers
begin tags. llguidance tells one text from the next by its pattern, so free text that is not the
last part must be followed by a constant text, which ends it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import RequestError
from engine.params.structured_outputs import parse_json_text
from engine.text.guide.grammar import whitespace_options
from engine.text.guide.json_schema import written_schema

_FIELDS = {
    "const_string": {"value"},
    "json_schema": {"json_schema", "style"},
    "any_text": set(),
    "sequence": {"elements"},
    "or": {"elements"},
    "tag": {"begin", "content", "end"},
    "triggered_tags": {"triggers", "tags", "at_least_one", "stop_after_first"},
    "tags_with_separator": {"tags", "separator", "at_least_one", "stop_after_first"},
}
"""The known types of formats, and the fields of each."""
Format = Mapping[str, Any]


def structural_tag_grammar(tag: Mapping[str, Any] | str, mark: Callable[[str], str], relaxed: set[str]) -> str:
    """llguidance's grammar of a structural tag. Raises RequestError that names what is not supported.

    ``relaxed`` gets the keywords of schemas that it cannot enforce.
    """
    value = parse_json_text(tag, "structural_tag") if isinstance(tag, str) else tag
    root = value["format"] if isinstance(value, Mapping) and "format" in value else _older_form(value)
    rules = _Rules(mark, relaxed)
    start = rules.sequence([_checked(root)], last=True)
    return "\n".join([f"start: {start}", *rules.lines])


def _older_form(value: Any) -> Format:
    """``{"structures": [{"begin", "schema", "end"}], "triggers": […]}`` as a format."""
    structures, triggers = (
        value.get(key) if isinstance(value, Mapping) else None for key in ("structures", "triggers")
    )
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise _error("must have a format, or structures (a list of begin, schema, end) and triggers (a list of texts)")
    parts = [part if isinstance(part, Mapping) else {} for part in structures]
    tags = [
        {
            "type": "tag",
            "begin": part.get("begin"),
            "content": {"type": "json_schema", "json_schema": part.get("schema") or {}},
            "end": part.get("end") or "",
        }
        for part in parts
    ]
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Rules:
    """The grammar's rules while a format is read. ``mark`` writes a text that may be a single token."""

    def __init__(self, mark: Callable[[str], str], relaxed: set[str]) -> None:
        self.lines = ["TEXT: /(.|\\n)*/"]
        self._mark = mark
        self._relaxed = relaxed

    def sequence(self, parts: list[Format], *, last: bool) -> str:
        """Formats one after another; ``last`` means that nothing follows them."""
        parts = [inner for part in parts for inner in self._flat(part)]
        written, position = [], 0
        while position < len(parts):
            part, following = parts[position], parts[position + 1] if position + 1 < len(parts) else None
            if part["type"] == "any_text" and following and following["type"] == "const_string":
                written.append(self._text_up_to(following["value"]))
                position += 2
            else:
                written.append(self._single(part, last=last and following is None))
                position += 1
        return " ".join(written) or '""'

    def _flat(self, part: Format) -> list[Format]:
        """A part as the list of parts that it consists of: sequences and tags are replaced by theirs."""
        if part["type"] == "sequence":
            return [inner for element in _formats(part, "elements") for inner in self._flat(element)]
        if part["type"] == "tag":
            begin, end = ({"type": "const_string", "value": _text(part, key)} for key in ("begin", "end"))
            return [*self._flat(begin), *self._flat(_checked(part.get("content"))), *self._flat(end)]
        return [] if part["type"] == "const_string" and not _text(part, "value") else [part]

    def _single(self, part: Format, *, last: bool) -> str:
        kind = part["type"]
        if kind in ("any_text", "triggered_tags") and not last:
            raise _error(f"{kind} must be the last part (any_text may also be followed by a const_string or a tag)")
        if kind == "const_string":
            return self._mark(part["value"])
        if kind == "json_schema":
            return self._json(part)
        if kind == "or":
            return _alternatives([self.sequence([each], last=last) for each in _formats(part, "elements")])
        if kind == "triggered_tags":
            return self._triggered(part)
        return self._separated(part) if kind == "tags_with_separator" else "TEXT"

    def _json(self, part: Format) -> str:
        schema = part.get("json_schema")
        if not isinstance(schema, Mapping | bool) or part.get("style", "json") != "json":
            raise _error("json_schema must hold a schema, in the style json")
        schema, left_out = written_schema(schema)
        self._relaxed |= left_out
        schema = {**schema, "x-guidance": whitespace_options()} if isinstance(schema, dict) else schema
        return self._rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def _text_up_to(self, end: str) -> str:
        """Free text and the first ``end``: no text where that is a single token, else one lazy pattern."""
        written = self._mark(end)
        return f"TEXT {written}" if written.startswith("<") else self._rule(f"TEXT {written}", "[lazy]")

    def _triggered(self, part: Format) -> str:
        """Free text in which a trigger begins a tag; where one is demanded it comes first."""
        given = part.get("triggers")
        triggers = [text for text in given if isinstance(text, str) and text] if isinstance(given, list) else []
        tags = _tags(part)
        inside = [self._behind_trigger(tag, triggers) for tag in tags]
        first = _alternatives([self.sequence([tag], last=False) for tag in tags]) if part.get("at_least_one") else ""
        if part.get("stop_after_first"):
            return first or _alternatives([*inside, "TEXT"])
        return f"{first} {_alternatives(inside)}* TEXT".strip()

    def _behind_trigger(self, tag: Format, triggers: list[str]) -> str:
        begin = _text(tag, "begin")
        trigger = next((text for text in triggers if begin.startswith(text)), None)
        if trigger is None:
            raise _error(f"begin must start with one of the triggers, got {begin!r}")
        rest = self.sequence([{**tag, "begin": begin[len(trigger) :]}], last=False)
        return f"{self._text_up_to(trigger)} {rest}"

    def _separated(self, part: Format) -> str:
        """Tags with a text between them."""
        tag = _alternatives([self.sequence([tag], last=False) for tag in _tags(part)])
        separator = self._mark(text) if (text := _text(part, "separator")) else ""
        several = tag if part.get("stop_after_first") else f"{tag} ({separator} {tag})*"
        return several if part.get("at_least_one") else f"({several})?"

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"part_{len(self.lines)}"
        self.lines.append(f"{name}{attributes}: {body}")
        return name


def _checked(value: Any) -> Format:
    """``value`` if it is a format of a known type, with known fields only."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise _error(f"a format must be an object of type {', '.join(_FIELDS)}, got {kind or value!r}")
    for name, given in value.items():
        if name != "type" and name not in _FIELDS[kind] and given:
            raise _error(f"{name!r} of {kind} is not supported")
    return value  # type: ignore[no-any-return]


def _formats(part: Format, key: str) -> list[Format]:
    found = part.get(key)
    if not isinstance(found, list) or not found:
        raise _error(f"{key} of {part['type']} must be a list of at least one format")
    return [_checked(each) for each in found]


def _tags(part: Format) -> list[Format]:
    """The tags of a part; their type may be left out."""
    found = part.get("tags")
    found = found if isinstance(found, list) else []
    tags = [{"type": "tag", **tag} if isinstance(tag, Mapping) else tag for tag in found]
    return _formats({**part, "tags": tags}, "tags")


def _text(part: Format, key: str) -> str:
    found = part.get(key)
    if not isinstance(found, str):
        raise _error(f"{key} must be a string, got {found!r}")
    return found


def _alternatives(written: list[str]) -> str:
    return "(" + " | ".join(written) + ")"


def _error(message: str) -> RequestError:
    return RequestError(f"structural_tag: {message[:200]}.", param="structured_outputs")
