"""Every chat template of two packages renders a conversation with calls as transformers renders it."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import RequestError
from engine.text.template.chat_template import ChatTemplate
from tests.engine.text.template.template_packages import (
    LLAMA_CPP,
    TRL,
    TemplatePackage,
    template_names,
    template_source,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "description": "How many"},
            },
            "required": ["city"],
        },
    },
}
CITIES = ("Oslo-1", "Bergen-2")
KINDS = ("calls", "text", "thought", "system", "parallel")

ONLY_WITH_NONE = {"deepseek_r1_distill", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}
"""They show calls only where content is None. transformers 5.24 leaves such a content out, and the template fails."""
WANTS_PARTS = {"idefics3", "smolvlm", "llava_next"}
"""They loop over a content's parts, and over the letters of a string; we give them parts."""
REFUSE_THOUGHT_WITH_TEXT = {"gptoss", "openai-gpt-oss-120b"}
"""They refuse a call with a text and a thought; to us it comes from such a model's own reply, so we leave that out."""


def conversation(kind: str, *, content: str | None, as_text: bool, as_parts: bool = False) -> list[dict[str, Any]]:
    """Two rounds: question, call, result, answer; and a third question, or the second round before its answer.

    ``content`` is that of messages with calls; None: there is none.
    """
    found: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}] if kind == "system" else []
    for round, city in enumerate(CITIES):
        message: dict[str, Any] = {"role": "assistant", "content": "I look." if kind in ("text", "all") else content}
        if kind in ("thought", "all"):
            message["reasoning"] = f"I think of {city}."
        numbers = range(2 if kind == "parallel" else 1)
        calls = [{"city": city, "days": 3 + number} for number in numbers]
        message["tool_calls"] = [
            {
                "id": f"call0000{number}",
                "type": "function",
                "function": {"name": "get_weather", "arguments": json.dumps(call) if as_text else call},
            }
            for number, call in enumerate(calls)
        ]
        results = [
            {"role": "tool", "tool_call_id": f"call0000{number}", "name": "get_weather", "content": f"sun {number}"}
            for number in numbers
        ]
        question = {"role": "user", "content": f"How is the weather there, question {round}?"}
        found += [question, message, *results, {"role": "assistant", "content": f"It is sunny, answer {round}."}]
    if kind in ("thought", "all"):  # thoughts are shown where the model has yet to answer
        found.pop()
    else:
        found.append({"role": "user", "content": "Thanks."})
    if as_parts:
        for one in found:
            one["content"] = [{"type": "text", "text": one["content"]}] if isinstance(one["content"], str) else None
    return found


@cache
def their_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(SPECIAL.values())}
    hf = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=hf, **SPECIAL)


def theirs(source: str, messages: list[dict[str, Any]], *, keeps_none: bool = False) -> str | None:
    """What transformers makes of ``messages``, None where the template fails."""
    given: dict[str, Any] = {"tools": [TOOL], "chat_template": source, "add_generation_prompt": True}
    try:
        if keeps_none:
            return str(render_jinja_template([messages], **given, **SPECIAL)[0][0])
        return str(their_tokenizer().apply_chat_template(messages, tokenize=False, **given))
    except Exception:  # noqa: BLE001 - templates fail with any of Python's errors
        return None


def ours(source: str, messages: list[dict[str, Any]]) -> str | None:
    try:
        return ChatTemplate(source, special_tokens=SPECIAL).render(messages, tools=[TOOL])
    except RequestError:
        return None


def forms(name: str, source: str, kind: str) -> Iterator[str | None]:
    """What transformers makes of the conversation in all forms, those first in which the calls are what they are."""
    parts = name in WANTS_PARTS
    given = (
        theirs(
            source,
            conversation(kind, content=content, as_text=as_text, as_parts=parts),
            keeps_none=name in ONLY_WITH_NONE,
        )
        for content, as_text in product(("", None), (False, True))
    )
    rendered = list(given)
    yield from sorted(rendered, key=lambda text: not shows_calls(text, source))


def shows_calls(text: str | None, source: str) -> bool:
    """Whether the calls' arguments stand in ``text`` as JSON or in the template's own form."""
    if text is None or not all(city in text for city in CITIES):
        return False
    return '\\"city' not in text and "'city'" not in text and ("None" not in text or "None" in source)


def differing(package: TemplatePackage, kind: str) -> dict[str, str]:
    """Templates with which our prompt is not transformers', and how it differs."""
    found = {}
    for name in template_names(package):
        source = template_source(package, name)
        wanted, *others = forms(name, source, kind)
        allowed = {wanted} if shows_calls(wanted, source) else {wanted, *others}
        for content, as_text in product(("", None), (False, True)):  # whatever the client sends
            made = ours(source, conversation(kind, content=content, as_text=as_text))
            if made not in allowed:
                found[name] = f"content {content!r}, arguments as text: {as_text}: {made!r}"
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("package", [TRL, LLAMA_CPP], ids=lambda package: package.requirement)
def test_every_template_renders_calls_as_transformers_does(package: TemplatePackage, kind: str) -> None:
    names = template_names(package)
    assert len(names) > 30
    assert differing(package, kind) == {}


@pytest.mark.parametrize("package", [TRL, LLAMA_CPP], ids=lambda package: package.requirement)
def test_a_thought_beside_a_text_and_a_call_is_left_out_only_where_the_template_refuses_it(
    package: TemplatePackage,
) -> None:
    found = differing(package, "all")
    assert found.keys() == REFUSE_THOUGHT_WITH_TEXT & set(template_names(package))
    for name, made in found.items():
        assert all(city in made for city in CITIES)
        assert theirs(template_source(package, name), conversation("all", content="", as_text=False)) is None
