"""What is shown of a reply keeps the order in which the model wrote it."""

from engine.outputs import CompletionDelta
from engine.text.parse.output_parser import make_output_parser
from vm_magic.show.reply_bundle import growing_bundle, reply_bundle
from vm_magic.show.reply_text import ReplyReader, ReplyText
from vm_magic.show.tool_cards import ToolOutcome

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": %d}}\n</tool_call>'


def read(text: str) -> ReplyText:
    tools = [{"type": "function", "function": {"name": "f"}}]
    reader = ReplyReader(make_output_parser(reasoning_parser=None, tool_call_parser="hermes", tools=tools))
    reader.read([CompletionDelta(0, text, [1], finish_reason="stop")])
    return reader.shown


def test_text_behind_a_call_is_shown_behind_its_card() -> None:
    shown = read(f"Before.{CALL % 1}Between.{CALL % 2}Behind.")
    assert shown.whole() == "Before.\nf(a=1)\nBetween.\nf(a=2)\nBehind."
    for bundle in (reply_bundle(shown, "markdown"), growing_bundle(shown, "markdown")):
        page = bundle["text/markdown"]
        places = [page.index(word) for word in ("Before.", "<div style", "Between.", "Behind.")]
        assert places == sorted(places)
        assert page.count("<div style") == 2
        assert page.index("Between.") < page.rindex("<div style") < page.index("Behind.")


def test_calls_without_a_known_place_stand_below_the_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    shown = ReplyText("Text.", tool_calls=(call,), outcomes=(ToolOutcome("done"),))
    assert shown.pieces() == ["Text.", (call, ToolOutcome("done"))]
