"""What a random model writes in the format of a pydantic model, pydantic reads: fields as programs have them."""

import enum
import json
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID

import pytest
from pydantic import UUID4, BaseModel, ConfigDict, Field, PositiveInt, RootModel, SecretStr, create_model

from engine import LLM, SamplingParams
from engine.params.structured_outputs import StructuredOutput
from tests.scripted_model import SUFFIX

Item = TypeVar("Item")


class Colour(enum.StrEnum):
    red = "red"
    blue = "blue"


class Number(enum.IntEnum):
    one = 1
    two = 2


class Inner(BaseModel):
    x: int
    y: Colour | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    meows: bool


class Dog(BaseModel):
    kind: Literal["dog"]
    barks: int


class Tree(BaseModel):
    value: bool
    children: list["Tree"] = Field(default=[], max_length=1)


class Linked(BaseModel):
    value: Inner
    next: "Linked | None" = None


class Several(BaseModel, Generic[Item]):
    first: Item
    more: Annotated[list[Item], Field(max_length=2)]


class Keywords(BaseModel):
    defs: int = Field(alias="$defs")
    properties: dict[Literal["a"], int]
    ref: bool = Field(alias="$ref")


class Forbidding(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Allowing(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Pair(NamedTuple):
    a: int
    b: bool


FIELDS: dict[str, Any] = {
    "optional": int | None,
    "nested": Inner,
    "list": Annotated[list[Inner], Field(min_length=1, max_length=2)],
    "set": set[int],
    "frozen set": frozenset[Literal["a", "b"]],
    "path": Path,
    "names": dict[Literal["a", "b"], int],
    "names of an enum": dict[Colour, Inner],
    "names by a pattern": dict[Annotated[str, Field(pattern="^[a-c]{2}$")], bool],
    "some": Annotated[dict[str, bool], Field(min_length=1, max_length=2)],
    "tagged": Annotated[Cat | Dog, Field(discriminator="kind")],
    "untagged": Cat | Dog | None,
    "tree": Tree,
    "linked": Linked,
    "generic": Several[Inner],
    "keywords": Keywords,
    "forbidding": Forbidding,
    "allowing": Allowing,
    "decimal": Annotated[Decimal, Field(ge=0, le=100)],
    "moments": tuple[datetime, date, time],
    "duration": timedelta,
    "ids": tuple[UUID, UUID4],
    "addresses": tuple[IPv4Address, IPv6Address],
    "whole": Annotated[int, Field(ge=3, lt=9)],
    "fraction": Annotated[float, Field(gt=0, lt=1)],
    "multiple": Annotated[int, Field(multiple_of=5, ge=0, le=100)],
    "positive": PositiveInt,
    "text": Annotated[str, Field(min_length=2, max_length=4)],
    "pattern": Annotated[str, Field(pattern=r"^\d{3}-\w+\b$")],
    "look ahead": Annotated[str, Field(pattern=r"^[a-z]+\s?[A-Z]*$", max_length=9)],
    "enums": tuple[Colour, Number, Literal["x", 1, None, True]],
    "pair": Pair,
    "bytes": bytes,
    "secret": SecretStr,
    "roots": RootModel[Annotated[list[Inner], Field(max_length=2)]],
}
CLOSERS = ('"', "}", "]", '"}', "]}", "0", "1", "Z", ":", "-")
NUM_SEEDS = 2


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=1024, gpu_memory_utilization=0.2) as made:
        yield made


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_written_in_a_models_format_is_read_by_it(llm: LLM, name: str) -> None:
    model: type[BaseModel] = create_model("Asked", value=(FIELDS[name], ...))
    # A model without sense would write its strings and numbers to the end of the context.
    bias = {llm.tokenize(text)[0]: 8.0 for text in CLOSERS}
    params = SamplingParams(temperature=1, max_tokens=250, logit_bias=bias)
    streams = [
        llm.submit_prompt(SUFFIX, params.replace(seed=seed), structured_outputs=StructuredOutput.from_schema(model))
        for seed in range(NUM_SEEDS)
    ]
    outputs = [stream.result().outputs[0] for stream in streams]
    whole = [output.text for output in outputs if output.finish_reason == "stop"]
    assert whole, outputs[0].text
    for text in whole:
        if name == "decimal" and isinstance(json.loads(text)["value"], str):
            continue  # of decimals as text pydantic's schema says only that they are text
        model.model_validate_json(text)
