"""A reply as mime types. What a model wrote is untrusted: Markdown is made safe, all else escaped."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from engine.batch.scored_token import ScoredToken, unlikely_text
from engine.outputs import Reply
from vm_magic.show.code_blocks import code_of, has_fence
from vm_magic.show.display_handle import Bundle
from vm_magic.show.growing_markdown import steady
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.safe_markdown import fenced, safe_markdown
from vm_magic.show.token_html import escaped, legend_html, tokens_html, unlikely_html
from vm_magic.show.tool_cards import ToolOutcome, call_card

Format = Literal["markdown", "text", "code", "json"]
LATEST_WORDS = 80
"""Characters of a growing thought that its folded title shows."""


def growing_bundle(reply: ReplyText, format: Format) -> Bundle:
    """The bundle of an unfinished reply: JSON is shown as text until it is whole."""
    if format == "json":
        return reply_bundle(replace(reply, text=fenced(reply.text), layout=()), "code", growing=True)
    return reply_bundle(reply, format, growing=True)


def reply_bundle(
    reply: ReplyText, format: Format, *, mark: str = "", notes: Sequence[str] = (), growing: bool = False
) -> Bundle:
    """Mime types for ``reply``, with ``mark`` after it. In Markdown the model's thinking is folded away.

    ``notes`` are lines below it all, small and faint. They stand in every form that there is then: a picture of JSON,
    which notebooks would prefer, has no place for them.

    The plain form is the answer alone; while there is none, it says that the model thinks. With log-probabilities
    the tokens are shown instead of what Markdown makes of them.
    """
    if notes:
        return _noted(reply_bundle(reply, format, mark=mark), notes)
    text = reply.whole()
    thinking = growing and reply.reasoning != "" and not reply.text and not reply.tool_calls
    now = f"thinking … {reply.num_reasoning_tokens} tokens" if thinking else ""
    plain = "\n".join(filter(None, [text, now]))
    marked = f"{plain} {mark}" if mark else plain
    if reply.tokens:
        return _picture(reply, marked, mark)
    if format == "text":
        return {"text/plain": marked}
    before = "".join(f"{_turn(turn, growing=False)}\n\n" for turn in reply.earlier)
    if format == "json":
        bundle = _json_bundle(reply.text, mark)
        return {**bundle, "text/markdown": before + folded(reply) + bundle["text/markdown"]}
    if format == "code":
        shown = before + folded(reply, growing=thinking) + _below(_code(reply.text, growing=growing), _cards(reply))
        return {
            "text/plain": _below(code_text(reply), mark) or marked,
            "text/markdown": _below(shown, mark and _faint(mark)),
        }
    return {
        "text/plain": marked,
        "text/markdown": before + _below(_turn(reply, growing=growing), mark and _faint(mark)),
    }


def filed_bundle(reply: Reply) -> Bundle:
    """The bundle of a reply that is a cell's value, in the form that it was asked for in."""
    calls = tuple(reply.tool_calls) if reply.finish_reason == "tool_calls" else ()
    shown = ReplyText(reply.text, reply.reasoning or "", reply.usage.reasoning_tokens, calls)
    return reply_bundle(shown, cast("Format", reply.shown_as), notes=reply.notes)


def code_text(reply: ReplyText) -> str:
    """The code of ``reply`` alone; all of it where there is none."""
    code = code_of(reply.text)
    return reply.whole() if code is None else code.text


def _code(text: str, *, growing: bool) -> str:
    """The code of an answer as a block. Words that stand before it are one faint line until it comes."""
    code = code_of(text) if has_fence(text) or not growing else None
    if code is not None:
        return fenced(code.text, code.language)
    if not growing:
        return safe_markdown(text)
    latest = " ".join(text[-LATEST_WORDS:].split())
    return f'<span style="opacity:0.6">… {escaped(latest)}</span>' if latest else ""


def folded(reply: ReplyText, *, growing: bool = False) -> str:
    """A closed ``<details>`` with the model's thinking and its length, or nothing."""
    if not reply.reasoning:
        return ""
    title = _thinking_title(reply, growing)
    if growing:
        latest = " ".join(reply.reasoning[-LATEST_WORDS:].split())
        title += f' <span style="opacity:0.6">{escaped(latest)}</span>'
    return f"<details><summary>{title}</summary>\n\n{safe_markdown(reply.reasoning.strip())}\n\n</details>\n\n"


def _thinking_title(reply: ReplyText, growing: bool) -> str:
    return f"thinking{' …' if growing else ''} ({reply.thought_size()})"


def _turn(reply: ReplyText, *, growing: bool) -> str:
    """One turn of the model in Markdown: thought, answer, calls."""
    thinking = growing and not reply.text and not reply.tool_calls
    pieces = reply.pieces()
    shown = [_piece(piece, growing=growing and piece is pieces[-1]) for piece in pieces]
    return folded(reply, growing=thinking) + "\n\n".join(filter(None, shown))


def _piece(piece: "str | tuple[Mapping[str, Any], ToolOutcome | None]", *, growing: bool) -> str:
    """A piece of the answer, or a call's card."""
    if isinstance(piece, str):
        return safe_markdown(steady(piece) if growing else piece)
    return call_card(*piece)


def _cards(reply: ReplyText) -> str:
    return "\n\n".join(call_card(call, outcome) for call, outcome in reply.calls())


def _below(text: str, more: str) -> str:
    return "\n\n".join(part for part in (text, more) if part)


def _faint(line: str) -> str:
    """``line`` of ours, small and faint, in Markdown as in HTML."""
    return f'<small style="opacity:0.6">{escaped(line)}</small>'


def with_notes(markdown: str, notes: Sequence[str]) -> str:
    """``markdown`` with ``notes`` below it, a line each."""
    return _below(markdown.rstrip("\n"), "<br>".join(map(_faint, notes))) if notes else markdown


def _noted(bundle: Bundle, notes: Sequence[str]) -> Bundle:
    noted = {"text/plain": "\n".join(filter(None, [bundle["text/plain"], *notes]))}
    if "text/markdown" in bundle:
        noted["text/markdown"] = with_notes(bundle["text/markdown"], notes)
    if "text/html" in bundle:
        noted["text/html"] = f"{bundle['text/html']}<div>{'<br>'.join(map(_faint, notes))}</div>"
    return noted


def _picture(reply: ReplyText, marked: str, mark: str) -> Bundle:
    """Tokens coloured by probability, thoughts folded away, calls as cards."""
    turns = [*reply.earlier, reply]
    tokens = [token for turn in turns for token in turn.tokens]
    body = "".join(_turn_picture(turn) for turn in turns)
    end = _faint(mark) if mark else ""
    return {
        "text/plain": "\n\n".join(filter(None, [marked, unlikely_text(tokens)])),
        "text/html": f"<div>{legend_html()}{body}{end}{unlikely_html(tokens)}</div>",
    }


def _turn_picture(turn: ReplyText) -> str:
    thought, answer = _split(turn.tokens, turn.num_tokens_before_answer if turn.reasoning else 0)
    fold = ""
    if thought:
        title = _thinking_title(turn, growing=not answer)
        fold = f'<details><summary style="cursor:pointer">{title}</summary>{tokens_html(thought)}</details>'
    return fold + (tokens_html(answer) if answer else "") + _cards(turn)


def _split(tokens: Iterable[ScoredToken], place: int) -> tuple[list[ScoredToken], list[ScoredToken]]:
    listed = list(tokens)
    return listed[:place], listed[place:]


def _json_bundle(text: str, mark: str) -> Bundle:
    body = re.sub(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", r"\1", text, flags=re.DOTALL)
    try:
        value = json.loads(body)
        pretty = json.dumps(value, indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):  # a model may nest without end
        note = mark or "(not JSON)"
        return {"text/plain": f"{text} {note}", "text/markdown": f"{fenced(text)}\n\n{_faint(note)}"}
    bundle: Bundle = {"text/plain": pretty, "text/markdown": fenced(pretty, "json")}
    if isinstance(value, dict | list):
        bundle["application/json"] = value
    return bundle
