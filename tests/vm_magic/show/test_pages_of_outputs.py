"""Every output's page, with hostile text wherever one of its values is a text: it shows it, and does nothing."""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from IPython.core.formatters import DisplayFormatter

from engine.batch.score import Score
from engine.batch.scored_token import ScoredToken
from engine.explain.explainer import Explanation
from engine.model_card.card import ModelCard
from engine.outputs import Reply
from engine.params.sampling_params import SamplingParams
from engine.runtime.activity import RequestActivity
from tests.vm_magic.fakes import FakeServer
from tests.vm_magic.show.html_oracle import faults_of_bundle, read
from vm_magic.commands.history import HistoryView
from vm_magic.panel.activity import row_html
from vm_magic.panel.copying import _COPY, copied_block, copied_code
from vm_magic.panel.pictures import Palette
from vm_magic.panel.style import bad, faint, good
from vm_magic.shell.hooks import add_formatters
from vm_magic.show.cards import CodeText, StatusCard
from vm_magic.show.choice_view import ChoiceRow, ChoiceView
from vm_magic.show.compare_view import VariantShown, compare_bundle
from vm_magic.show.explain_view import ExplainView
from vm_magic.show.grid_view import GridView
from vm_magic.show.load_view import load_bundle
from vm_magic.show.model_card_view import model_card_html
from vm_magic.show.progress import _bundle as progress_bundle
from vm_magic.show.reply_bundle import Format, growing_bundle, reply_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.rerun_view import RerunTable, RerunView
from vm_magic.show.sent_view import sent_bundle
from vm_magic.show.server_view import server_html
from vm_magic.show.tables import Table
from vm_magic.show.token_html import score_html
from vm_magic.show.tool_cards import ToolOutcome

HOSTILE = (
    "<script>alert(1)</script>",
    "</div></details></pre></code></td></table></span><img src=x onerror=alert(1)>",
    "\"'><img src='http://x/y.png'>",
    "!![a](http://x/y.png) [b](javascript:x) ![c][d]\n\n[d]: http://x/y.png",
    "    ```\nfoo\n```\n```\n<script>alert(1)</script>\n```",
    "- ```\n  x\n  ```\n</details>\n\n<b>`",
    "<!-- \x00 ]]> <?php &lt;b&gt; &#60;b&#62; \r\n <svg/onload=x>",
    "[" * 2000 + "]" * 2000,
    "* a\n\n---\n# b\n| c | d |\n|--|--|\n|`|$x$",
)


OURS: dict[str, Any] = {"thinking_cut": None, "state": "running", "params": SamplingParams()}
"""Fields whose values are the engine's own."""


def filled(kind: Any, text: str) -> Any:
    """A value of ``kind`` in which every text is ``text``."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return filled(of[0], text)
    if origin is typing.Literal:
        return of[0]
    if origin is tuple:
        return (filled(of[0], text),) * 2 if of[-1] is Ellipsis else tuple(filled(one, text) for one in of)
    if origin in (dict, Mapping):
        return {"name": text, "arguments": text}
    if origin is not None or kind is Any:
        return text if kind is Any else (filled(of[0], text),) * 2
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [one.name for one in dataclasses.fields(kind) if one.init]
        return kind(**{name: OURS[name] if name in OURS else filled(hints[name], text) for name in names})
    return {str: text, int: 1, float: 0.5, bool: True}.get(kind)


def a_reply(text: str, **more: Any) -> ReplyText:
    call = {"id": "1", "function": {"name": text, "arguments": f'{{"a": {text!r}}}'}}
    outcomes = (ToolOutcome(text, failed=True, seconds=0.5),)
    return ReplyText(text, text, 3, (call, call), outcomes, **more)


def tokens(text: str) -> tuple[ScoredToken, ...]:
    return (ScoredToken(text, -3.0, 2, ((text, -0.1), ("", -2.0))), ScoredToken("", -0.1, 1, ()))


def shown(value: Any) -> dict[str, Any]:
    """What a notebook gets of a command's value."""
    shell = types.SimpleNamespace(display_formatter=DisplayFormatter())
    add_formatters(shell)
    data: dict[str, Any] = shell.display_formatter.format(value)[0]
    return data


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def a_history(text: str) -> HistoryView:
    call = {**CALL, "function": {"name": text, "arguments": text}}
    messages = (
        {"role": "system", "content": text},
        {"role": text, "content": text},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": text},
    )
    return HistoryView(text, messages, (text, text))


def a_score(text: str) -> Score:
    scored = tokens(text)
    return Score(text, (1, 2), (text, ""), tuple(token.logprob for token in scored), scored)


def a_server(text: str, key: str | None) -> str:
    server = FakeServer(text, 8000, text, key, {})
    server.hub_url = text
    return server_html(server)


PAGES: dict[str, Callable[[str], Mapping[str, Any]]] = {
    "status": lambda text: shown(filled(StatusCard, text)),
    "table": lambda text: shown(filled(Table, text)),
    "code": lambda text: shown(CodeText(text, "python", "a note")),
    "history": lambda text: shown(a_history(text)),
    "no history": lambda text: shown(HistoryView(text, (), (text,))),
    "grid": lambda text: shown(GridView(text, (text, text), ((text, text),), text)),
    "choices": lambda text: shown(
        ChoiceView(
            text,
            (text,) * 4,
            (ChoiceRow((text,), text, ((text, 0.5),), 0.5), ChoiceRow((text,), "", (), 0.0, error=text)),
            text,
        )
    ),
    "rerun": lambda text: shown(filled(RerunView, text)),
    "reruns": lambda text: shown(filled(RerunTable, text)),
    "explain": lambda text: shown(ExplainView(filled(Explanation, text))),
    "inspect": lambda text: {"text/html": model_card_html(filled(ModelCard, text))},
    "score": lambda text: {"text/html": score_html(a_score(text))},
    "load": lambda text: load_bundle(text, text),
    "progress": lambda text: progress_bundle(text, 1, 2),
    "context": lambda text: sent_bundle([text, text], text, server=text),
    "compare": lambda text: compare_bundle(
        [VariantShown(text, a_reply(text), text, text, over) for over in (True, False)] * 2, "markdown"
    ),
    "compare as JSON": lambda text: compare_bundle(
        [VariantShown(text, a_reply(text), over=over) for over in (True, False)], "json"
    ),
    "port": lambda text: {"text/html": a_server(text, "k") + a_server(text, None)},
    "panel, a request": lambda text: {"text/html": row_html(filled(RequestActivity, text), Palette())},
    "panel, words": lambda text: {"text/html": bad(text) + good(text) + faint(text)},
    "panel, text to copy": lambda text: {"text/html": copied_code(text, text) + copied_block(text, text)},
    "a reply in Out": lambda text: shown(Reply(text, reasoning=text, notes=(text,))),
}
for _format in typing.get_args(Format):
    PAGES[f"chat as {_format}"] = lambda text, form=_format: reply_bundle(
        a_reply(text, earlier=(a_reply(text),)), form, mark=text, notes=(text, text)
    )
    PAGES[f"growing chat as {_format}"] = lambda text, form=_format: growing_bundle(a_reply(text), form)
    PAGES[f"growing thought as {_format}"] = lambda text, form=_format: growing_bundle(ReplyText("", text, 3), form)
PAGES["chat with probabilities"] = lambda text: reply_bundle(a_reply(text, tokens=tokens(text)), "markdown", mark=text)


@pytest.mark.parametrize("page", PAGES, ids=lambda name: name.replace(" ", "-"))
def test_an_output_shows_whatever_its_texts_hold_and_runs_nothing_of_it(page: str) -> None:
    for text in HOSTILE:
        data = PAGES[page](text)
        assert data.keys() & {"text/html", "text/markdown", "text/plain"}
        assert faults_of_bundle(data, handlers=[_COPY]) == [], text


def test_the_oracle_finds_what_would_run() -> None:
    for text in HOSTILE[:3]:
        assert read(f"<div>{text}</div>").problems
    for text in HOSTILE[3:6]:
        assert faults_of_bundle({"text/markdown": text})
