"""Grammars, thinking budgets and repetition detection through scheduler, sampler and detokenizer, on a scripted model."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.constraints import Constraints, RepetitionDetection
from engine.errors import RequestError
from engine.outputs import CompletionOutput
from engine.stream import RequestStream
from tests.engine.parity.oracle import assert_nothing_is_held, shrink_pool
from tests.scripted_model import SUFFIX, THINK_END

GREEDY = SamplingParams(temperature=0, max_tokens=300, skip_special_tokens=False)
ANSWER = 'The answer is {"a": 1, "b": [true, null]}.'
THOUGHT = "<think>\nFirst this, then that, and then the end of it.\n</think>\n\n"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string"}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ScriptedLLM = Callable[..., LLM]


def submit(llm: LLM, params: SamplingParams = GREEDY, prompt: str = SUFFIX, **fields: Any) -> RequestStream:
    return llm.submit(prompt, params, constraints=Constraints.from_request(**fields))


def run(llm: LLM, params: SamplingParams = GREEDY, prompt: str = SUFFIX, **fields: Any) -> CompletionOutput:
    return submit(llm, params, prompt, **fields).result().outputs[0]


FORMATS: list[tuple[dict[str, Any], str, Callable[[str], bool]]] = [
    (
        {"structured_outputs": {"choice": ["yes", "no", "größer"]}},
        "Well, no",
        lambda text: text in ("yes", "no", "größer"),
    ),
    ({"structured_outputs": {"regex": r"[a-c]{3}-\d+"}}, "abc", lambda text: bool(re.fullmatch(r"[a-c]{3}-\d+", text))),
    ({"structured_outputs": {"json": SCHEMA}}, ANSWER, lambda text: json.loads(text).keys() == {"a", "b"}),
    ({"structured_outputs": {"json_object": True}}, ANSWER, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"grammar": 'root ::= "<" [a-z]+ ">"'}}, "<abc>", lambda text: text == "<abc>"),
    ({"response_format": {"type": "json_object"}}, ANSWER, lambda text: isinstance(json.loads(text), dict)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        '{"a": 12, "b": ["x", "y\\n"]}',
        lambda text: json.loads(text) == {"a": 12, "b": ["x", "y\n"]},
    ),
    (
        {
            "response_format": {
                "type": "structural_tag",
                "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
                "triggers": ["<f"],
            }
        },
        "I say <f>12</f> twice",
        lambda text: text == "I say <f>12</f> twice",
    ),
]


@pytest.mark.parametrize(
    ("fields", "script", "fits"), FORMATS, ids=[next(iter(f[0].values())).__repr__()[:40] for f in FORMATS]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_reply_fits_its_grammar_and_ends_with_it(
    scripted_llm: ScriptedLLM, fields: dict[str, Any], script: str, fits: Callable[[str], bool], temperature: float
) -> None:
    llm = scripted_llm(script)
    output = run(llm, GREEDY.replace(temperature=temperature, seed=1), **fields)
    text = output.text.removesuffix("<|im_end|>")
    assert fits(text), text
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert_nothing_is_held(llm)
