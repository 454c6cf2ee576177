"""Where the schemas in a JSON schema are, and what its references mean (JSON Schema 2020-12 and draft 7)."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urljoin

from engine.errors import RequestError

Schema = Mapping[str, Any]

ONE = (
    *("additionalProperties", "unevaluatedProperties", "items", "additionalItems", "unevaluatedItems", "contains"),
    *("propertyNames", "not", "if", "then", "else"),
)
CHOICES = ("anyOf", "oneOf")
LISTS = ("allOf", *CHOICES, "prefixItems", "items")
MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords whose values are a schema, a list of schemas, and named schemas."""
_DEEPEST = 200


class Document:
    """A schema, and what its references mean."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self._named: dict[str, Schema] = {}
        self._bases: dict[int, str] = {}
        self._collect(root, "", 0)

    def resolve(self, reference: object, origin: Schema) -> Schema | bool:
        """What a ``$ref`` in ``origin`` means. Raises RequestError."""
        if not isinstance(reference, str):
            raise _leads_nowhere(reference)
        base = self._bases.get(id(origin), "")
        address = base if reference[:1] in ("", "#") else _address(base, reference)
        fragment = unquote(reference.partition("#")[2])
        found = self._named.get(address)
        if fragment.startswith("/"):
            target = _at(found, fragment)
            if target is None and found is not None:
                target = _at(self.root, fragment)  # many write a path from the root beside an $id
        else:
            target = self._named.get(f"{address}#{fragment}") if fragment else found
        if not isinstance(target, Mapping | bool):
            raise _leads_nowhere(reference)
        return target

    def _collect(self, schema: Any, base: str, depth: int) -> None:
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            return
        own, anchor = schema.get("$id"), schema.get("$anchor")
        if isinstance(own, str):
            base = _address(base, own)
        if isinstance(own, str) or depth == 0:
            self._named.setdefault(base, schema)
        if isinstance(anchor, str):
            self._named.setdefault(f"{base}#{anchor}", schema)
        self._bases[id(schema)] = base
        for part in _parts(schema):
            self._collect(part, base, depth + 1)


def _address(base: str, reference: str) -> str:
    """The address of a document, as it stands where it is not one."""
    try:
        return urljoin(base, reference).partition("#")[0]
    except ValueError:
        return reference


def _parts(schema: Schema) -> Iterator[Any]:
    """The schemas directly inside a schema."""
    for key in ONE:
        yield schema.get(key)
    for key in LISTS:
        yield from as_list(schema.get(key))
    for key in MAPS:
        yield from as_map(schema.get(key)).values()


def as_list(value: Any) -> list[Any]:
    """``value`` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_map(value: Any) -> Mapping[str, Any]:
    """``value`` if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _at(container: Any, pointer: str) -> Any:
    """What a JSON pointer leads to; None where it leads nowhere."""
    for part in pointer.split("/")[1:]:
        container = _member(container, part.replace("~1", "/").replace("~0", "~"))
    return container


def _member(container: Any, name: str) -> Any:
    if isinstance(container, list):
        return container[int(name)] if name.isdecimal() and int(name) < len(container) else None
    return as_map(container).get(name)


def _leads_nowhere(reference: object) -> RequestError:
    return RequestError(
        f"bad grammar or schema: the reference {str(reference)[:100]!r} leads nowhere; only those into the schema are "
        "followed.",
        param="structured_outputs",
    )
