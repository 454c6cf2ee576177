"""Demanded calls: written under the grammar of a parser's family, read back by that parser."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine.core.token_guide import MakeGuide, TokenGuide
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints, ToolCalls
from engine.text.guide.structured_output_manager import StructuredOutputManager
from engine.text.guide.tool_grammar import tool_grammar
from engine.text.parse.output_parser import make_output_parser
from engine.text.parse.tool_parsers import TOOL_PARSERS
from engine.text.parse.tool_parsers.base import DemandedForm
from engine.text.tokens.tokenizer import Tokenizer

ARGUMENTS: dict[str, dict[str, Any]] = {
    "weather": {"city": 'Köln "am" Rhein\n{[</tool_call>', "days": 3, "tags": ["a", None]},
    "clock": {"zone": "UTC", "exact": True},
}
"""What each function can be called with: nothing else satisfies its schema."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"const": value} for key, value in arguments.items()},
                "required": list(arguments),
                "additionalProperties": False,
            },
        },
    }
    for name, arguments in ARGUMENTS.items()
]
CHOICES: dict[str, Any] = {"required": "required", "named": {"type": "function", "function": {"name": "weather"}}}
PROMPTS = {"openai": "<|start|>assistant<|channel|>final<|message|>"}
"""Where a parser reads calls behind the end of a thought only."""


def generate(guide: TokenGuide, tokenizer: Tokenizer, rng: random.Random) -> str:
    """A text that the grammar allows, its tokens drawn at random; it ends as soon as it may, one time out of two."""
    words = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    end = min(tokenizer.eos_token_ids)
    token_ids: list[int] = []
    while len(token_ids) < 2000:
        assert guide.fill_bitmask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        inner = [token for token in allowed if token != end]
        if end in allowed and (not inner or rng.random() < 0.5):
            return tokenizer.decode(token_ids, skip_special_tokens=False)
        token_ids.append(rng.choice(inner))
        if guide.advance(token_ids[-1]) is not None:
            assert guide.error is None
            return tokenizer.decode(token_ids, skip_special_tokens=False)
    raise AssertionError("the grammar did not come to an end")


@pytest.fixture(scope="module")
def demanded_texts(tokenizer: Tokenizer) -> Callable[[str, str], list[str]]:
    """Texts under the grammar of a parser's name and a choice; made once for all names of one form."""
    made: dict[tuple[DemandedForm | None, str], list[str]] = {}

    def texts(name: str, choice: str) -> list[str]:
        key = (TOOL_PARSERS[name].demanded, choice)
        if key not in made:
            make = make_guide(tokenizer, name, choice)
            made[key] = [generate(make(), tokenizer, random.Random(seed)) for seed in range(4)]
        return made[key]

    return texts


def make_guide(tokenizer: Tokenizer, name: str, choice: str) -> MakeGuide:
    manager = StructuredOutputManager(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, tool_call_parser=name)
    constraints = Constraints.from_request(tools=TOOLS, tool_choice=CHOICES[choice])
    make = manager.prepare(constraints, [1], SamplingParams())
    assert make is not None
    return make


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_a_demanded_call_is_read_back_by_the_parser_of_its_grammar(
    demanded_texts: Callable[[str, str], list[str]], name: str, choice: str
) -> None:
    for text in demanded_texts(name, choice):
        written = ["weather" if value == "Köln" else "clock" for value in re.findall(r"Köln|UTC", text)]
        assert written
        for pieces in ([text], list(text)):
            parser = make_output_parser(
                reasoning_parser=None,
                tool_call_parser=name,
                tools=TOOLS,
                tool_choice=CHOICES[choice],
                prompt_suffix=PROMPTS.get(name, ""),
            )
            deltas = [*map(parser.feed, pieces), parser.finish("stop")]
            calls = [call for delta in deltas for call in delta.tool_calls]
            assert [call.name for call in calls if call.name] == written, text
            read = ["".join(call.arguments for call in calls if call.index == index) for index in range(len(written))]
            assert [json.loads(arguments) for arguments in read] == [ARGUMENTS[each] for each in written], text
            assert "".join(delta.content for delta in deltas) == ""


@pytest.mark.parametrize(
    ("name", "family", "begin"),
    [
        *((name, "hermes", '"<tool_call>" "\\n" object') for name in ("qwen2_5", "json_tools", "granite4", "ernie45")),
        ("llama4_json", "llama3_json", "call: object"),
    ],
)
@pytest.mark.parametrize("choice", CHOICES)
def test_every_name_of_a_family_has_its_grammar(name: str, family: str, begin: str, choice: str) -> None:
    calls = ToolCalls.from_request(TOOLS, CHOICES[choice], None)
    assert calls is not None
    grammar = tool_grammar(TOOL_PARSERS[name].demanded, calls, json.dumps, set())
    assert begin in grammar
    assert grammar == tool_grammar(TOOL_PARSERS[family].demanded, calls, json.dumps, set())


@pytest.mark.parametrize("name", ["granite4", "ernie45", "llama4_json"])
def test_a_demanded_call_is_written_as_the_family_writes_it(tokenizer: Tokenizer, name: str) -> None:
    make = make_guide(tokenizer, name, "required")
    text = generate(make(), tokenizer, random.Random(0))
    form = (
        r'\{"name": "\w+", "parameters": \{'
        if name == "llama4_json"
        else r'<tool_call>\n\{"name": "\w+", "arguments": \{'
    )
    assert re.match(form, text), text
