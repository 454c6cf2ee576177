"""Containers, dataclasses, exceptions, functions, classes and modules of Python itself."""

import dataclasses
import inspect
import itertools
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vm_magic.summaries.text import bounded, count, fitting, names_text, short_repr

_LOOKED_AT = 10_000
"""Items whose types are counted."""
_MOST_ITEMS = 30
_MOST_CAUSES = 5


def container(value: Any, limit: int) -> str:
    """A large dict, list, tuple, set or bytes: its size, the types in it, its first items."""
    name = type(value).__name__
    if isinstance(value, bytes | bytearray):
        return f"{name} of {count(len(value), 'byte')}\nfirst bytes: {bytes(value[:200])!r}"
    if isinstance(value, Mapping):
        kinds = f"keys {_kinds(value.keys())}; values {_kinds(value.values())}"
        head = f"{name} of {len(value):,} entries ({kinds})"
        lines = (f"{short_repr(key)}: {short_repr(item)}" for key, item in value.items())
    else:
        head = f"{name} of {count(len(value), 'item')} ({_kinds(value)})"
        lines = (short_repr(item) for item in value)
    return "\n".join([head, *fitting(lines, limit - len(head), "", len(value), _MOST_ITEMS)])


def _kinds(values: Iterable[Any]) -> str:
    """``int 3, str 1``."""
    counted = Counter(type(one).__name__ for one in itertools.islice(values, _LOOKED_AT))
    if len(counted) == 1:
        return next(iter(counted))
    return ", ".join(f"{name} {number:,}" for name, number in counted.most_common(5))


def dataclass(value: Any, limit: int) -> str:
    """The name and each field."""
    fields = dataclasses.fields(value)
    lines = (f"  {field.name}={short_repr(getattr(value, field.name, None), 200)}" for field in fields)
    head = f"{type(value).__name__}:"
    return "\n".join([head, *fitting(lines, limit - len(head), "fields", len(fields))])


def exception(value: BaseException, limit: int) -> str:
    """Type and message, what caused it, and where it was raised; no frame's values."""
    lines: list[str] = []
    seen: set[int] = set()
    one: BaseException | None = value
    while one is not None and id(one) not in seen and len(seen) < _MOST_CAUSES:
        seen.add(id(one))
        said = "".join(traceback.format_exception_only(one)).strip()
        place = traceback.extract_tb(one.__traceback__)[-1:] if one.__traceback__ else []
        where = "".join(f" (in {frame.name}, line {frame.lineno})" for frame in place)
        lines.append(f"{'caused by ' if lines else ''}{bounded(said, limit // 2)}{where}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\n".join(lines)


def function(value: Any, limit: int) -> str:
    """Signature and docstring, then the source where there is one."""
    name = getattr(value, "__qualname__", getattr(value, "__name__", "function"))
    return _with_source(f"{name}{_signature(value)}", value, limit)


def class_(value: type, limit: int) -> str:
    """Bases, how it is made, docstring and methods, then the source where there is one."""
    bases = names_text([base.__name__ for base in value.__bases__ if base is not object], 5)
    head = f"class {value.__qualname__}{f'({bases})' if bases else ''}, made by {value.__name__}{_signature(value)}"
    methods = [name for name, one in vars(value).items() if callable(one) and not name.startswith("_")]
    if methods:
        head += f"\nmethods: {names_text(methods, 30)}"
    return _with_source(head, value, limit)


def module(value: Any, limit: int) -> str:
    """Docstring and public names."""
    version = getattr(value, "__version__", None)
    head = f"module {value.__name__}{f' {version}' if isinstance(version, str) else ''}"
    names = getattr(value, "__all__", None) or [name for name in vars(value) if not name.startswith("_")]
    return "\n".join([head, *_doc(value, limit // 2), f"names: {names_text([*names], 60)}"])


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value))
    except (ValueError, TypeError):
        return "(…)"


def _doc(value: Any, limit: int) -> list[str]:
    text = inspect.getdoc(value)
    return [bounded(text.strip(), limit)] if text else []


def _with_source(head: str, value: Any, limit: int) -> str:
    try:
        source = inspect.getsource(value).rstrip()
    except (OSError, TypeError):
        return "\n".join([head, *_doc(value, limit - len(head))])
    return f"{head}\nsource:\n{bounded(source, max(limit - len(head) - 10, 100))}"
