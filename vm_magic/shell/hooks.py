"""What IPython calls of ours while a cell is typed, read and shown: completion, question marks, rich forms."""

import re
from collections.abc import Callable, Collection
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.inputtransformer2 import cell_magic

from engine.format.text import harmless

MATCHER_ID = "vm_magic"
_OURS = re.compile(r"(?:^|.*[\s=(])(%%?)(vllm_metal|chat)[ \t](.*)$", re.DOTALL)
_TEXT, _HTML, _MARKDOWN = "text/plain", "text/html", "text/markdown"
_LONE_CELL = re.compile(r"%%(?:chat|vllm_metal)\b(?!\?)")
Matcher = Callable[[CompletionContext], SimpleMatcherResult]
_ASSIGNED = r"^(\s*(?:[^\W\d]\w*\s*=\s*)?)"
_QUESTION = re.compile(rf"{_ASSIGNED}%(vllm_metal)[ \t]+((?:chat|complete|grid|score)[ \t]+\S.*\?)\s*$")
_CHAT_QUESTION = re.compile(rf"{_ASSIGNED}%(chat)[ \t]+(\S.*\?)\s*$")


def make_matcher(owned: Collection[str]) -> Matcher:
    """IPython's v2 matcher for our magics; ``%chat`` and ``%%chat`` only where they are among the ``owned`` names."""

    @context_matcher(identifier=MATCHER_ID)  # type: ignore[untyped-decorator]
    def vm_matcher(context: CompletionContext) -> SimpleMatcherResult:
        line = context.full_text.split("\n")[context.cursor_line][: context.cursor_position]
        found = _OURS.match(line)
        if not found or (found[2] == "chat" and f"{found[1]}chat" not in owned):
            return {"completions": []}
        from vm_magic.commands.table import candidates

        words = found[3] if found[2] == "vllm_metal" else f"chat {found[3]}"
        fragment = re.split(r"\s", words)[-1]
        before = words[: len(words) - len(fragment)].split()
        options = candidates(before, fragment, cell=found[1] == "%%")
        completions = [SimpleCompletion(text=o, type="param") for o in options if o.startswith(fragment)]
        return {"completions": completions, "suppress": bool(completions), "matched_fragment": fragment}

    matcher: Matcher = vm_matcher
    return matcher


def keep_questions(lines: list[str]) -> list[str]:
    """Let lines such as ``%vllm_metal chat What is 2+2?`` end in a question mark.

    IPython reads a trailing ``?`` as a call for help before it looks at the magic. This makes plain calls of such
    lines first; ``%vllm_metal?`` and ``%vllm_metal chat?`` still show help. It runs after cell magics became calls.
    """
    return _with_calls(lines, _QUESTION)


def keep_chat_questions(lines: list[str]) -> list[str]:
    """The same for ``%chat What is 2+2?``, where that name is ours."""
    return _with_calls(lines, _CHAT_QUESTION)


def _with_calls(lines: list[str], question: re.Pattern[str]) -> list[str]:
    result: list[str] = []
    open_quotes = {'"""': False, "'''": False}
    for line in lines:
        found = None if any(open_quotes.values()) else question.match(line)
        if found:
            line = f"{found[1]}get_ipython().run_line_magic('{found[2]}', {found[3]!r})\n"
        else:
            for quote in open_quotes:
                open_quotes[quote] ^= line.count(quote) % 2 == 1
        result.append(line)
    return result


def keep_empty_cells(lines: list[str]) -> list[str]:
    """Let ``%%chat --error`` stand without a body: IPython refuses an empty one before the magic is asked."""
    return [*lines, "\n"] if len(lines) == 1 and _LONE_CELL.match(lines[0]) else lines


# IPython does not ask it whether a cell is complete: a terminal goes on reading the body.
keep_empty_cells.has_side_effects = True  # type: ignore[attr-defined]


def add_empty_cells(shell: Any) -> None:
    """Put :func:`keep_empty_cells` before the transform that makes calls of cell magics."""
    transforms = shell.input_transformer_manager.cleanup_transforms
    place = transforms.index(cell_magic) if cell_magic in transforms else len(transforms)
    transforms.insert(place, keep_empty_cells)


def remove_empty_cells(shell: Any) -> None:
    """Undo :func:`add_empty_cells`."""
    transforms = shell.input_transformer_manager.cleanup_transforms
    transforms[:] = [one for one in transforms if one is not keep_empty_cells]


def add_formatters(shell: Any) -> None:
    """Teach ``shell`` the HTML of plans, model cards, scores and ports, and the Markdown of replies."""
    for mime, name, show in _FORMATTERS:
        shell.display_formatter.formatters[mime].for_type_by_name(*name.rsplit(".", 1), show)


def remove_formatters(shell: Any) -> None:
    """Undo :func:`add_formatters`."""
    for mime, name, _ in _FORMATTERS:
        shell.display_formatter.formatters[mime].pop(name, None)


def _plan(plan: Any) -> str:
    from vm_magic.show.plan_view import plan_html

    return plan_html(plan)


def _plan_table(table: Any) -> str:
    from vm_magic.show.plan_view import plan_table_html

    return plan_table_html(table)


def _model_card(card: Any) -> str:
    from vm_magic.show.model_card_view import model_card_html

    return model_card_html(card)


def _examination(found: Any) -> str:
    from vm_magic.show.doctor_view import examination_html

    return examination_html(found)


def _reply(reply: Any) -> Any:
    from vm_magic.show.reply_bundle import filed_bundle

    shown = filed_bundle(reply).get("text/markdown")
    if reply.record is None or shown is None:
        return shown
    from vm_magic.state.record import KEY, kept

    return shown, {KEY: kept([reply.record])}  # IPython takes a form with its metadata


def _plain_reply(reply: Any, printer: Any, cycle: bool) -> None:
    """A reply's plain form: what ``-f code`` or ``-f json`` asked for, else its own."""
    if reply.shown_as in ("markdown", "text"):
        _plain(reply, printer, cycle)
        return
    from vm_magic.show.reply_bundle import filed_bundle

    printer.text(harmless(filed_bundle(reply)["text/plain"]))


def _score(score: Any) -> str:
    from vm_magic.show.token_html import score_html

    return score_html(score)


def _server(server: Any) -> str:
    from vm_magic.show.server_view import server_html

    return server_html(server)


def _server_as_text(server: Any, printer: Any, _cycle: bool) -> None:
    from vm_magic.show.server_view import server_text

    printer.text(harmless(server_text(server)))


def _plain(value: Any, printer: Any, cycle: bool) -> None:
    from vm_magic.show.terminal import show_plainly

    show_plainly(value, printer, cycle)


_PLAIN = (
    "engine.checkup.findings.Examination",
    "engine.batch.score.Score",
    "engine.llm.LLM",
    "engine.memory.plan.MemoryPlan",
    "engine.memory.plan_table.PlanTable",
    "engine.model_card.card.ModelCard",
    "engine.params.settings.Settings",
    "vm_magic.chat.compare.Comparison",
    "vm_magic.chat.pending_reply.PendingReply",
    "vm_magic.commands.history.HistoryView",
    "vm_magic.remote.llm.RemoteLLM",
    "vm_magic.show.cards.StatusCard",
    "vm_magic.show.cards.CodeText",
    "vm_magic.show.choice_view.ChoiceView",
    "vm_magic.show.explain_view.ExplainView",
    "vm_magic.show.grid_view.GridView",
    "vm_magic.show.rerun_view.RerunView",
    "vm_magic.show.rerun_view.RerunTable",
    "vm_magic.show.tables.Table",
    "pandas.DataFrame",
    "pandas.Series",
    "pandas.core.frame.DataFrame",
    "pandas.core.series.Series",
)
"""Whose own text quotes a model, a file or a server; tables too, for they may be a map's."""

_FORMATTERS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (_HTML, "engine.memory.plan.MemoryPlan", _plan),
    (_HTML, "engine.memory.plan_table.PlanTable", _plan_table),
    (_HTML, "engine.model_card.card.ModelCard", _model_card),
    (_HTML, "engine.checkup.findings.Examination", _examination),
    (_HTML, "engine.batch.score.Score", _score),
    (_HTML, "engine.openai.server.ServerHandle", _server),
    (_TEXT, "engine.openai.server.ServerHandle", _server_as_text),
    (_MARKDOWN, "engine.outputs.Reply", _reply),
    (_TEXT, "engine.outputs.Reply", _plain_reply),
    *((_TEXT, name, _plain) for name in _PLAIN),
)
"""MIME type, type, and what makes the one of the other."""
