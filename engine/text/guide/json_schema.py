"""A JSON schema as llguidance takes it: closed objects, references of its own, no keyword that it would refuse.

Objects that say nothing about other properties are closed, as in vLLM's back end: a model that may invent properties
goes on inventing. Only schemas are rewritten: a property named ``properties`` and the values of ``const`` and ``enum``
stay as they are. What the grammar cannot enforce is left out and told (:attr:`SchemaWriter.relaxed`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.text.guide.ascii_regex import ascii_classes, ascii_regex
from engine.text.guide.schema_references import CHOICES, LISTS, MAPS, ONE, Document, Schema, as_list, as_map

_NOT_WRITTEN = ("$defs", "definitions", "$id", "$anchor", "$schema", "$comment", "x-guidance", "nullable")
_OTHERS = ("additionalProperties", "unevaluatedProperties")
_VALUES = ("const", "default")
"""Keywords whose null is a value; others say nothing with it."""
_YEAR = "^(?:[1-9]...|0[1-9]..|00[1-9].|000[1-9])"
_FORMATS = {
    **dict.fromkeys(("email", "hostname", "ipv4", "ipv6", "uri", "uuid")),
    "date": _YEAR,
    "time": "^.{6}[0-5]",
    "duration": "^(?:[0-9]{0,6}[^0-9])*$",
    "date-time": _YEAR + ".{13}[0-5]",
    **{f"uuid{version}": f"^.{{14}}{version}.{{4}}[89abAB]" for version in range(1, 9)},
}
"""The formats that llguidance knows; all others are annotations, as JSON Schema has it. Their patterns leave out what
most languages cannot read, the year 0, leap seconds and endless numbers, and say which version a UUID has."""


@dataclass(frozen=True, slots=True)
class _Declared:
    """What is said of an object's properties in some place: names and patterns; ``is_open``: others may follow."""

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    is_open: bool = False

    def __or__(self, more: "_Declared") -> "_Declared":
        return _union((self, more))

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns or self.is_open)


_NOTHING = _Declared()
_MOST_DEFINITIONS = 5000
"""Each definition stands once for each object that it may be a part of: schemas that refer to one another in place need
very many."""


def _union(said: Iterable[_Declared]) -> _Declared:
    names: dict[str, None] = {}
    patterns: dict[str, None] = {}
    is_open = False
    for one in said:
        names |= dict.fromkeys(one.names)
        patterns |= dict.fromkeys(one.patterns)
        is_open |= one.is_open
    return _Declared(tuple(names), tuple(patterns), is_open)


class SchemaWriter:
    """Writes schemas whose references all point into one list of definitions, each with a name of its own.

    ``definitions`` belong beside the schemas, at the root of the document. ``relaxed`` are keywords that were left out.
    """

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self.relaxed: set[str] = set()
        self._names: dict[tuple[int, bool, _Declared | None], str] = {}
        self._documents: list[Document] = []

    def write(self, schema: Schema, *, closes: bool = True) -> dict[str, Any]:
        """``schema``; its references mean itself. Without ``closes`` objects are as open as it says.

        Raises RequestError for a reference that leads nowhere and for a part that is not a schema.
        """
        document = Document(schema)
        self._documents.append(document)  # definitions go by identity, so their schemas must live
        writing = _Writing(self, document, closes)
        written = writing.schema(schema, _NOTHING)
        while writing.waiting:  # one behind the other: many that refer to the next are not deep
            name, target, beside = writing.waiting.pop()
            self.definitions[name] = writing.schema(target, beside)
        assert isinstance(written, dict), "an object stays one"
        return written

    def name_of(self, target: Schema | bool, closes: bool, beside: _Declared | None) -> tuple[str, bool]:
        """The name of a definition, and whether it is new."""
        key = (id(target), closes, beside)
        fresh = key not in self._names
        if len(self._names) > _MOST_DEFINITIONS:
            raise _error("too many schemas refer to one another")
        return self._names.setdefault(key, f"d{len(self._names)}"), fresh


def written_schema(schema: Schema | bool, *, closes: bool = True) -> tuple[dict[str, Any] | bool, frozenset[str]]:
    """A whole document, and the keywords that were left out. Raises RequestError."""
    if isinstance(schema, bool):
        return schema, frozenset()
    writer = SchemaWriter()
    document = writer.write(schema, closes=closes)
    if writer.definitions:
        document["$defs"] = writer.definitions
    return document, frozenset(writer.relaxed)


class _Writing:
    """Writes the schemas of one document.

    ``beside``: what other schemas say of the same object, in which it is closed; None: they close it.
    """

    def __init__(self, writer: SchemaWriter, document: Document, closes: bool) -> None:
        self._writer = writer
        self._document = document
        self._closes = closes
        self._known: dict[int, _Declared] = {}
        self.waiting: list[tuple[str, Schema | bool, _Declared | None]] = []
        """Definitions with a name that are still to be written."""

    def schema(self, schema: Any, beside: _Declared | None) -> dict[str, Any] | bool:
        """One schema."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise _error(f"a schema must be an object, true or false, got {str(schema)[:60]!r}")
        inside, closed = self._closing(schema, beside)
        written: dict[str, Any] = {}
        for key, value in schema.items():
            if key not in _NOT_WRITTEN and (value is not None or key in _VALUES):
                _check_shape(key, value)
                self._keyword(written, schema, key, value, inside.get(key))
        if closed is not None and written.get("additionalProperties") is None:
            written["properties"] = dict.fromkeys(closed.names, True) | written.get("properties", {})
            if closed.patterns:
                written["patternProperties"] = dict.fromkeys(closed.patterns, True) | written.get(
                    "patternProperties", {}
                )
            written["additionalProperties"] = False
        self._finish(written)
        return {"anyOf": [written, {"type": "null"}]} if schema.get("nullable") is True else written

    def _closing(self, schema: Schema, beside: _Declared | None) -> tuple[dict[str, _Declared], _Declared | None]:
        """Where an object is closed: in the schemas of a keyword (by keyword), or here, with these properties.

        An object is closed once: a schema in ``allOf`` would forbid what another one declares.
        """
        own, parts = self._own(schema), self._parts(schema)
        if beside is None or own.is_open or schema.get("additionalProperties") is not None:
            return {}, None
        if not self._closes and schema.get("unevaluatedProperties") is not False:
            return {}, None
        sources = [key for key, said in parts if said]
        if not beside and not _declares(schema) and len(sources) <= 1:
            return {key: _NOTHING for key, _ in parts}, None
        choices = [key for key in sources if key in CHOICES]
        said = beside | own
        for key, part in parts:
            if key not in choices or len(choices) > 1:
                said |= part
        if said.is_open or not (said or choices or _declares(schema)):
            return {}, None
        return ({choices[0]: said}, None) if len(choices) == 1 else ({}, said)

    def _own(self, schema: Schema) -> _Declared:
        """What the schema itself says of properties."""
        names = [*as_map(schema.get("properties")), *(each for each in as_list(schema.get("required")))]
        said = next((schema[key] for key in _OTHERS if schema.get(key) is not None), False)
        return _Declared(
            tuple(dict.fromkeys(name for name in names if isinstance(name, str))),
            tuple(ascii_classes(name) for name in as_map(schema.get("patternProperties"))),
            said is not False,
        )

    def _parts(self, schema: Schema) -> list[tuple[str, _Declared]]:
        """What the schemas of a keyword say of properties, each of ``allOf`` for itself."""
        return [(key, _union(map(self._declared, schemas))) for key, schemas in self._in_place(schema)]

    def _in_place(self, schema: Schema) -> list[tuple[str, list[Any]]]:
        """The schemas that describe the same value, by keyword, each of ``allOf`` for itself."""
        found = [("allOf", [part]) for part in as_list(schema.get("allOf"))]
        found += [(key, as_list(schema.get(key))) for key in CHOICES]
        if "$ref" in schema:
            found.append(("$ref", [self._document.resolve(schema["$ref"], schema)]))
        return found

    def _declared(self, schema: Any) -> _Declared:
        """What a schema says of properties, with all that it refers to in place; found out once for each."""
        if not isinstance(schema, Mapping):
            return _NOTHING
        if id(schema) not in self._known:
            target = self._document.resolve(schema["$ref"], schema) if "$ref" in schema else None
            if isinstance(target, Mapping) and id(target) not in self._known:
                self._known[id(target)] = self._reached(target)
            self._known[id(schema)] = self._reached(schema)
        return self._known[id(schema)]

    def _reached(self, schema: Schema) -> _Declared:
        """The same, by going through them: those that refer to one another say the same."""
        found, left, seen = [], [schema], {id(schema)}
        while left:
            one = left.pop()
            if id(one) in self._known:
                found.append(self._known[id(one)])
                continue
            own = self._own(one)
            if _declares(one) or own.is_open:
                found.append(own)
            for part in reversed([part for _, schemas in self._in_place(one) for part in schemas]):
                if isinstance(part, Mapping) and id(part) not in seen:
                    seen.add(id(part))
                    left.append(part)
        return _union(found)

    def _keyword(self, written: dict[str, Any], schema: Schema, key: str, value: Any, beside: _Declared | None) -> None:
        if key == "$ref":
            written[key] = self._reference(self._document.resolve(value, schema), beside)
        elif key == "pattern" and isinstance(value, str):
            self._pattern(written, value)
        elif key == "format":
            self._format(written, value)
        elif key == "uniqueItems":
            self._writer.relaxed |= {key} if value else set()
        elif key == "propertyNames":
            self._names(written, schema, value)
        elif key in ("prefixItems", "items") and isinstance(value, list):
            written["prefixItems"] = [self.schema(part, _NOTHING) for part in value]
            if key == "items" and "additionalItems" in schema:
                written["items"] = self.schema(schema["additionalItems"], _NOTHING)
        elif key == "unevaluatedProperties":
            self._unevaluated(written, schema, value)
        elif key != "additionalItems":  # said by items, where it says anything
            self._schemas(written, schema, key, value, beside)

    def _schemas(self, written: dict[str, Any], schema: Schema, key: str, value: Any, beside: _Declared | None) -> None:
        """A keyword that holds schemas, or that stays as it is."""
        if key in CHOICES:
            self._choices(written, schema, key, [self.schema(part, beside) for part in value])
        elif key in MAPS:
            parts = {name: self.schema(part, _NOTHING) for name, part in value.items()}
            if key == "patternProperties":
                parts = {ascii_classes(name): part for name, part in parts.items()}
            written[key] = {**written.get(key, {}), **parts}
        elif key in ONE:  # items too, where it is not a list
            written.setdefault(key, self.schema(value, _NOTHING))
        elif key in LISTS:
            written[key] = [*written.get(key, []), *(self.schema(part, beside) for part in value)]
        else:
            written[key] = value

    def _reference(self, target: Schema | bool, beside: _Declared | None) -> str:
        name, fresh = self._writer.name_of(target, self._closes, beside)
        if fresh:
            self.waiting.append((name, target, beside))
        return f"#/$defs/{name}"

    def _format(self, written: dict[str, Any], name: Any) -> None:
        if not isinstance(name, str) or name not in _FORMATS:
            return
        written["format"] = "uuid" if name.startswith("uuid") else name
        if pattern := _FORMATS[name]:
            written["allOf"] = [*written.get("allOf", []), {"pattern": pattern}]

    def _pattern(self, written: dict[str, Any], pattern: str) -> None:
        regex = ascii_regex(pattern, anchored=False)
        written["pattern"] = regex.text
        if regex.also:
            more = [{"pattern": f"^(?:{whole})$"} for whole in regex.also]
            written["allOf"] = [*written.get("allOf", []), *more]
        self._writer.relaxed |= {f"{each} in a pattern" for each in regex.lost}
        self._writer.relaxed |= {"(?!…) in a pattern"} if regex.never else set()

    def _names(self, written: dict[str, Any], schema: Schema, names: Any) -> None:
        """Names from a list, or by a pattern, can be said otherwise; what else is asked of them is left out."""
        if isinstance(names, Mapping) and "$ref" in names:
            names = self._document.resolve(names["$ref"], names)
        if names is True or names == {"type": "string"} or names == {}:
            return
        asked = as_map(names)
        allowed = asked.get("enum", [asked["const"]] if "const" in asked else None)
        values = schema.get("additionalProperties")
        pattern = asked.get("pattern")
        declared = as_map(schema.get("properties")) or as_map(schema.get("patternProperties"))
        if declared or not (isinstance(allowed, list) or isinstance(pattern, str)):
            self._writer.relaxed.add("propertyNames")
            return
        what = True if values is None else self.schema(values, _NOTHING)
        if isinstance(allowed, list):
            written["properties"] = {name: what for name in allowed if isinstance(name, str)}
        else:
            written["patternProperties"] = {ascii_classes(str(pattern)): what}
        written["additionalProperties"] = False

    def _choices(self, written: dict[str, Any], schema: Schema, key: str, parts: list[Any]) -> None:
        """``anyOf``, and ``oneOf`` as that: llguidance tells few apart."""
        if key == "oneOf" and "discriminator" not in schema and not _differ(as_list(schema[key]), self._document):
            self._writer.relaxed.add("oneOf")
        if "anyOf" in written:
            written["allOf"] = [*written.get("allOf", []), {"anyOf": parts}]
        else:
            written["anyOf"] = parts

    def _unevaluated(self, written: dict[str, Any], schema: Schema, value: Any) -> None:
        """Of a single schema it is ``additionalProperties``; false closes objects as is done anyway."""
        if value is False or value is True or "additionalProperties" in schema:
            return
        if any(key in schema for key in ("allOf", "$ref", *CHOICES)):
            self._writer.relaxed.add("unevaluatedProperties")
        else:
            written["additionalProperties"] = self.schema(value, _NOTHING)

    def _finish(self, written: dict[str, Any]) -> None:
        if self._closes and "prefixItems" in written:
            written.setdefault("items", False)
        required = {name for name in as_list(written.get("required")) if isinstance(name, str)}
        if not set(as_map(written.get("properties"))) <= required:
            for key in ("minProperties", "maxProperties"):
                if written.pop(key, None) is not None:
                    self._writer.relaxed.add(key)


def _differ(parts: list[Any], document: Document) -> bool:
    """Whether no value can satisfy two of the schemas, as far as their types or constant properties say."""
    found = [as_map(document.resolve(part["$ref"], part) if "$ref" in as_map(part) else part) for part in parts]
    kinds = [part.get("type") for part in found]
    if all(isinstance(kind, str) for kind in kinds):
        kinds = ["number" if kind == "integer" else kind for kind in kinds]
        if len(set(kinds)) == len(kinds):
            return True
    constants = [
        {name: repr(as_map(each)["const"]) for name, each in as_map(part.get("properties")).items()
         if "const" in as_map(each) and name in as_list(part.get("required"))}
        for part in found
    ]  # fmt: skip
    return any(
        all(name in each for each in constants) and len({each[name] for each in constants}) == len(constants)
        for name in (constants[0] if constants else ())
    )


def _declares(schema: Schema) -> bool:
    return any(isinstance(schema.get(key), Mapping) for key in ("properties", "patternProperties"))


def _check_shape(key: str, value: Any) -> None:
    if key in MAPS and not isinstance(value, Mapping):
        raise _error(f"{key} must be an object of schemas, got {str(value)[:60]!r}")
    if key in LISTS and key not in ONE and not isinstance(value, list):
        raise _error(f"{key} must be a list of schemas, got {str(value)[:60]!r}")


def _error(message: str) -> RequestError:
    return RequestError(f"bad grammar or schema: {message}.", param="structured_outputs")
