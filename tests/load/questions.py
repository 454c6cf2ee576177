"""What clients ask: a catalogue of requests, and an endless mix of them for each client, decided by a seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Each call as <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML that shows tools, for the models under load."""
MAX_MODEL_LEN = 2048
GREEDY: dict[str, Any] = {"temperature": 0}
_SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.0}
"""All that cells change meanwhile is said, so that a seed decides."""
_PROPERTIES = {"mood": {"enum": ["good", "bad", "neither"]}, "stars": {"type": "integer", "minimum": 0, "maximum": 5}}
SCHEMA = {
    "type": "object", "properties": _PROPERTIES, "required": list(_PROPERTIES), "additionalProperties": False,
}  # fmt: skip
WEIGHTS = {
    "chat": 20, "completion": 15, "response": 10, "message": 10, "prefix": 12, "long": 4, "several": 4, "logprobs": 4,
    "json": 6, "tools": 6, "free": 6, "bad": 8, "service": 4,
}  # fmt: skip
"""Kinds of requests, and how often each comes among the others."""
STREAMED, LEFT = 0.6, 0.12
"""Shares: of the replies that can be streamed, and of the streams that their client leaves."""
_PLAIN = {CHAT: "chat", COMPLETIONS: "completion", RESPONSES: "response", MESSAGES: "message"}


@dataclass(frozen=True)
class Question:
    """A request. ``said`` names those that must be answered alike; None: the reply is only read to its end.

    ``statuses`` are the right ones. A question that is ``wire`` is sent as these bytes.
    """

    name: str
    kind: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    said: str | None = None
    streams: bool = True
    method: str = "POST"
    statuses: tuple[int, ...] = (200,)
    wire: bytes | None = None
    keyed: bool = True

    @property
    def num_choices(self) -> int:
        """How many replies it asks for."""
        return int(self.body.get("n", 1))


@dataclass(frozen=True)
class Visit:
    """One question of one client. ``leaves`` after that many events of the stream; 0: before the first."""

    question: Question
    stream: bool = False
    leaves: int | None = None


def visits(seed: int, client: int, questions: Sequence[Question], *, leaving: bool = True) -> Iterator[Visit]:
    """What one client does, without end."""
    rng = random.Random(seed * 100_003 + client)
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    kinds = sorted(by_kind)
    weights = [WEIGHTS[kind] for kind in kinds]
    while True:
        question = rng.choice(by_kind[rng.choices(kinds, weights)[0]])
        stream = question.streams and rng.random() < STREAMED
        leaves = rng.choice((0, 1, 2, 5)) if stream and leaving and rng.random() < LEFT else None
        yield Visit(question, stream, leaves)


def plain_questions(count: int = 8) -> list[Question]:
    """Greedy ones, each dialog through each API: their answers are known token by token."""
    dialogs: list[tuple[str, list[dict[str, Any]], int]] = []
    rng = random.Random(7)
    for number in range(count):
        dialogs.append((f"short {number}", [_user(_words(rng, rng.randint(2, 24)))], rng.randint(4, 20)))
    for number in range(3):
        turns = [_user(_words(rng, 12)), {"role": "assistant", "content": _words(rng, 9)}] * (number % 3)
        system = {"role": "system", "content": _shared()}
        dialogs.append((f"prefix {number}", [system, *turns, _user(_words(rng, 8))], 8))
    for number in range(2):
        dialogs.append((f"long {number}", [_user(_words(rng, 330 + 90 * number))], 6))
    found = []
    for name, messages, num_tokens in dialogs:
        for path, kind in _PLAIN.items():
            kind = kind if name.startswith("short") else name.partition(" ")[0]
            body = _body(path, messages, num_tokens)
            found.append(Question(f"{name} {path}", kind, path, body, said=f"{name} {path == COMPLETIONS}"))
    return found + [_twin(rng.sample(range(1000, 9000), 16)) for _ in range(3)]


def _twin(beginning: list[int]) -> Question:
    """Ends like its siblings, block by block, after another beginning: whose keys and values are not theirs."""
    name = f"twin {beginning[0]}"
    prompt = [*beginning, *range(2000, 2032), 77]
    return Question(name, "prefix", COMPLETIONS, {"prompt": prompt, "max_tokens": 8, **GREEDY}, said=name)


def other_questions() -> list[Question]:
    """What else a port is asked: grammars, tools, several replies, log-probabilities, settings of the notebook."""
    hi, count = [_user("How was it?")], [_user("Count to three.")]
    tool = {"name": "rate", "description": "Rate it.", "parameters": SCHEMA}
    anthropic_tool = {"name": "rate", "description": "Rate it.", "input_schema": SCHEMA}
    named: dict[str, Any] = {"name": "rating", "schema": SCHEMA}
    chat = {"messages": hi, "max_tokens": 60, **GREEDY}
    function = {"type": "function", "function": tool}
    found = [
        _known("json chat", "json", CHAT, {**chat, "response_format": {"type": "json_schema", "json_schema": named}}),
        _known("regex", "json", CHAT, {**chat, "structured_outputs": {"regex": "[ab]{4}-[0-9]{3}"}}),
        _known("choice", "json", COMPLETIONS, {
            "prompt": "Is it?", "max_tokens": 9, **GREEDY, "structured_outputs": {"choice": ["yes", "no", "perhaps"]}}),
        _known("json response", "json", RESPONSES, {
            "input": "How?", "max_output_tokens": 60, **GREEDY, "store": False,
            "text": {"format": {"type": "json_schema", **named}}}),
        _known("tools chat", "tools", CHAT, {**chat, "tools": [function], "tool_choice": "required"}),
        _known("tools named", "tools", CHAT, {
            **chat, "tools": [function], "tool_choice": {"type": "function", "function": {"name": "rate"}}}),
        _known("tools response", "tools", RESPONSES, {
            "input": "How?", "max_output_tokens": 60, **GREEDY, "tools": [{"type": "function", **tool}],
            "tool_choice": "required", "store": False}),
        _known("tools message", "tools", MESSAGES, {
            **chat, "tools": [anthropic_tool], "tool_choice": {"type": "any"}}),
        _known("three", "several", CHAT, {"messages": count, "max_tokens": 9, "n": 3, "seed": 11, **_SAMPLED}),
        _known("two", "several", COMPLETIONS, {
            "prompt": "One, two,", "max_tokens": 8, "n": 2, "seed": 5, **_SAMPLED}),
        _known("logprobs chat", "logprobs", CHAT, {
            "messages": count, "max_tokens": 10, **GREEDY, "logprobs": True, "top_logprobs": 3}),
        _known("logprobs text", "logprobs", COMPLETIONS, {
            "prompt": "A list:", "max_tokens": 10, **GREEDY, "logprobs": 2, "echo": True}),
        Question("free chat", "free", CHAT, {"messages": hi, "max_tokens": 20}),
        Question("free text", "free", COMPLETIONS, {"prompt": "Once", "max_tokens": 12, "presence_penalty": 0.5}),
        Question("free response", "free", RESPONSES, {"input": "Tell me.", "max_output_tokens": 16, "store": False}),
        Question("free message", "free", MESSAGES, {"messages": hi, "max_tokens": 14, "stop_sequences": ["e"]}),
    ]  # fmt: skip
    return found + bad_questions() + service_questions()


def bad_questions() -> list[Question]:
    """Requests that are refused, each in its own way."""
    hi = [_user("Hi")]
    bodies: list[tuple[str, dict[str, Any], int]] = [
        (CHAT, {}, 400),
        (CHAT, {"messages": "Hi"}, 400),
        (CHAT, {"messages": hi, "temperature": -1}, 400),
        (CHAT, {"messages": hi, "max_tokens": 0}, 400),
        (CHAT, {"messages": hi, "top_p": 7}, 400),
        (CHAT, {"messages": hi, "n": 0}, 400),
        (CHAT, {"messages": hi, "model": "another"}, 404),
        (CHAT, {"messages": hi, "stop": 3}, 400),
        (CHAT, {"messages": hi, "logit_bias": {"99999999": 1}}, 400),
        (CHAT, {"messages": hi, "chat_template": "{{ messages }}"}, 400),
        (CHAT, {"messages": hi, "tools": [{"type": "function"}]}, 400),
        (CHAT, {"messages": hi, "response_format": {"type": "json_schema"}}, 400),
        (CHAT, {"messages": hi, "structured_outputs": {"regex": "("}}, 400),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 2 * MAX_MODEL_LEN}]}, 400),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400),
        (COMPLETIONS, {"prompt": []}, 400),
        (COMPLETIONS, {"prompt": [10**7]}, 400),
        (COMPLETIONS, {"prompt": "Hi", "best_of": 4}, 400),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 10**6}, 400),
        (RESPONSES, {"input": 3}, 400),
        (RESPONSES, {"input": "Hi", "previous_response_id": "resp_gone"}, 404),
        (MESSAGES, {"messages": hi}, 400),
        (MESSAGES, {"messages": hi, "max_tokens": "many"}, 400),
        ("/v1/embeddings", {"input": "Hi"}, 404),
    ]
    found = [
        Question(f"bad {number}", "bad", path, body, streams=status != 404, statuses=(status,))
        for number, (path, body, status) in enumerate(bodies)
    ]
    return [
        *found,
        Question("not JSON", "bad", CHAT, streams=False, statuses=(400,), wire=b'{"messages": ['),
        Question("no key", "bad", CHAT, {"messages": hi}, streams=False, statuses=(401,), keyed=False),
        Question("wrong method", "bad", CHAT, method="GET", streams=False, statuses=(405,)),
    ]


def service_questions() -> list[Question]:
    """What is asked beside replies."""
    paths = ("/v1/models", "/health", "/version", "/load", "/metrics")
    return [
        *(Question(path, "service", path, method="GET", streams=False) for path in paths),
        Question("tokenize", "service", "/tokenize", {"prompt": "Hello there"}, streams=False),
        Question("count", "service", "/v1/messages/count_tokens", {"messages": [_user("Hi")]}, streams=False),
    ]


def _known(name: str, kind: str, path: str, body: dict[str, Any]) -> Question:
    return Question(name, kind, path, body, said=name)


def _body(path: str, messages: list[dict[str, Any]], num_tokens: int) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"prompt": " ".join(message["content"] for message in messages), "max_tokens": num_tokens, **GREEDY}
    if path == RESPONSES:
        return {"input": messages, "max_output_tokens": num_tokens, "store": False, **GREEDY}
    return {"messages": messages, "max_tokens": num_tokens, **GREEDY}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@cache
def _shared() -> str:
    return _words(random.Random(3), 110)


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(_VOCABULARY) + (str(rng.randint(0, 99)) if rng.random() < 0.3 else "")
                    for _ in range(count))  # fmt: skip


_VOCABULARY = [
    *("the", "river", "light", "stone", "because", "never", "green", "table", "music", "under", "seven", "window"),
    *("garden", "slowly", "answer", "paper", "winter", "question", "morning", "silver", "between", "letter", "yellow"),
    *("engine", "harbour", "quickly", "number", "story", "cloud", "bridge"),
]
