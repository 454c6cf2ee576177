"""Text and calls keep the order in which the model wrote them, and a call's pieces stand together."""

from itertools import groupby

import pytest

from engine.text.parse.output_parser import (
    ContentDelta,
    ParsedDelta,
    ParsedEvent,
    ReasoningDelta,
    ToolCallDelta,
    make_output_parser,
)
from engine.text.parse.scan.output_sink import OutputSink
from tests.engine.text.parse.test_parser_fuzz import ALIASES, SAMPLES, THOUGHTS, TOOLS

UNMARKED = {"llama3_json": "<|python_tag|>", "xlam": "[TOOL_CALLS]"}
"""Forms whose sample begins at a bare brace: in the middle of an answer a call needs its mark."""
THINKING = {"openai", "muse_spark", "gemma4"}
"""Forms read with their reasoning parser: channels, and thoughts that no prompt has to open."""


def events_of(name: str, text: str, pieces: list[str]) -> list[ParsedEvent]:
    """The events of all deltas, neighbours joined."""
    parser = make_output_parser(
        reasoning_parser=THOUGHTS[name] if name in THINKING else None,
        tool_call_parser=name,
        tools=TOOLS,
        make_call_id=lambda index, _: f"call_{index}",
    )
    whole = ParsedDelta()
    for delta in [*map(parser.feed, pieces), parser.finish("stop")]:
        assert all(isinstance(event, ToolCallDelta) or event.text for event in delta.events)
        whole += delta
    assert "".join(pieces) == text
    return whole.events


def kinds(events: list[ParsedEvent]) -> list[str]:
    """``content``, ``reasoning`` or the call's number, runs of one kind once."""
    names = [str(event.index) if isinstance(event, ToolCallDelta) else type(event).__name__ for event in events]
    return [name for name, _ in groupby(names)]


def around(name: str) -> str:
    """A sample with text before and after it."""
    if name == "openai":
        final = "<|start|>assistant<|channel|>final<|message|>"
        return f"{final}before<|end|><|start|>assistant{SAMPLES[name]}{final}behind"
    if name == "muse_spark":
        user = "<|start|>assistant to=user<|message|>"
        return f"{user}before<|eom|>{SAMPLES[name].partition('<|eom|>')[2]}<|eom|>{user}behind"
    return f"before {UNMARKED.get(name, '')}{SAMPLES[name]} behind"


@pytest.mark.parametrize("name", [*SAMPLES, *ALIASES])
def test_text_before_and_after_a_call_keeps_its_place(name: str) -> None:
    text = around(ALIASES.get(name, name))
    whole = events_of(name, text, [text])
    assert events_of(name, text, list(text)) == whole
    assert [event.text.strip() for event in whole if isinstance(event, ContentDelta)] == ["before", "behind"]
    order = [kind for kind in kinds(whole) if kind != "ReasoningDelta"]
    assert (order[0], order[-1]) == ("ContentDelta", "ContentDelta")
    assert order[1:-1] == [str(index) for index in range(len(order) - 2)] != []


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_stands_between_the_pieces_of_a_call_wherever_it_breaks_off(name: str) -> None:
    text = around(name)
    begin, end = text.index("before") + len("before"), text.index("behind")
    for size in range(begin, end):
        broken = text[:size] + text[end:]
        events = events_of(name, broken, [broken])
        assert events_of(name, broken, list(broken)) == events
        calls = [kind for kind in kinds(events) if kind.isdigit()]
        assert calls == [str(index) for index in range(len(calls))], broken


def test_reasoning_between_answers_keeps_its_place() -> None:
    text = "One.<|channel>thought\nHm.<channel|>Two.<|tool_call>call:f{}<tool_call|>Three."
    events = events_of("gemma4", text, [text])
    assert events == [
        ContentDelta("One."),
        ReasoningDelta("Hm."),
        ContentDelta("Two."),
        ToolCallDelta(0, "call_0", "f", "{}"),
        ContentDelta("Three."),
    ]


def test_a_delta_is_its_events() -> None:
    sink = OutputSink(max_calls=None, make_call_id=lambda index, _: f"call_{index}")
    assert not sink.drain()
    sink.content("a")
    sink.content("b")
    emit = sink.call("f")
    emit("{")
    emit("}")
    sink.content("c")
    delta = sink.drain()
    assert delta.events == [ContentDelta("ab"), ToolCallDelta(0, "call_0", "f", "{}"), ContentDelta("c")]
    assert (delta.reasoning, delta.content, delta.tool_calls) == ("", "abc", [delta.events[1]])
    assert delta
    assert not ParsedDelta()
    assert not ParsedDelta.of()


def test_joining_and_dropping_leave_the_parts_as_they_are() -> None:
    first, last = ParsedDelta.of("Hm", "a"), ParsedDelta.of("", "b", [ToolCallDelta(0, "id", "f", "{}")])
    both = first + last
    assert both.events == [ReasoningDelta("Hm"), ContentDelta("ab"), ToolCallDelta(0, "id", "f", "{}")]
    assert both.without_reasoning() == ParsedDelta.of("", "ab", [ToolCallDelta(0, "id", "f", "{}")])
    assert (first, last) == (
        ParsedDelta.of("Hm", "a"),
        ParsedDelta.of("", "b", [ToolCallDelta(0, "id", "f", "{}")]),
    )
