"""What ``--json`` may name."""

from pathlib import Path
from typing import Any

import pydantic
import pytest

from engine.errors import RequestError
from vm_magic.state.schemas import read_schema


class Person(pydantic.BaseModel):
    name: str
    age: int


NAMES: dict[str, Any] = {"d": {"type": "string"}, "t": '{"a": 1}', "Person": Person, "number": 3, "text": "{"}


def test_a_schema_is_text_a_variable_a_model_a_file_or_any_object(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"b": 2}')
    assert read_schema(' {"type": "object"}', {}) == {"type": "object"}
    assert read_schema("d", NAMES) == {"type": "string"}
    assert read_schema("t", NAMES) == {"a": 1}
    assert read_schema("Person", NAMES)["required"] == ["name", "age"]  # type: ignore[index]
    assert read_schema(str(tmp_path / "s.json"), NAMES) == {"b": 2}
    assert read_schema("object", NAMES) is True
    assert read_schema("object", {"object": {"mine": 1}}) == {"mine": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nobody", "no such variable or file.*object"),
        ("number", "int is not a schema"),
        ("text", "--json text: not valid JSON"),
        ('{"a":', "--json: not valid JSON"),
    ],
)
def test_anything_else_says_what_would_do(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_schema(text, NAMES)


def test_a_file_must_hold_an_object(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(RequestError, match="a schema is a JSON object, not list"):
        read_schema(str(tmp_path / "s.json"), {})
