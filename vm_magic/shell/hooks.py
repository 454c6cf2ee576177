"""What IPython calls of ours while a cell is typed, read and shown: completion, question marks, rich forms."""

import re
from collections.abc import Callable
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

MATCHER_ID = "vm_magic"
_OURS = re.compile(r"(?:^|.*[\s=(])(%%?)(vllm_metal|chat)[ \t](.*)$", re.DOTALL)
_HTML, _MARKDOWN = "text/html", "text/markdown"
Matcher = Callable[[CompletionContext], SimpleMatcherResult]
_QUESTION = re.compile(r"^(\s*(?:[^\W\d]\w*\s*=\s*)?)%vllm_metal[ \t]+((?:chat|complete|grid|score)[ \t]+\S.*\?)\s*$")


def make_matcher(owns_chat: bool) -> Matcher:
    """IPython's v2 matcher for our magics; ``%%chat`` only where that name is ours."""

    @context_matcher(identifier=MATCHER_ID)  # type: ignore[untyped-decorator]
    def vm_matcher(context: CompletionContext) -> SimpleMatcherResult:
        line = context.full_text.split("\n")[context.cursor_line][: context.cursor_position]
        found = _OURS.match(line)
        if not found or (found[2] == "chat" and not (owns_chat and found[1] == "%%")):
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
    result: list[str] = []
    open_quotes = {'"""': False, "'''": False}
    for line in lines:
        found = None if any(open_quotes.values()) else _QUESTION.match(line)
        if found:
            line = f"{found[1]}get_ipython().run_line_magic('vllm_metal', {found[2]!r})\n"
        else:
            for quote in open_quotes:
                open_quotes[quote] ^= line.count(quote) % 2 == 1
        result.append(line)
    return result


def add_formatters(shell: Any) -> None:
    """Teach ``shell`` the HTML of plans, model cards and scores, and the Markdown of replies."""
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


def _reply(reply: Any) -> Any:
    from vm_magic.show.safe_markdown import safe_markdown

    if reply.record is None:
        return safe_markdown(reply.text)
    from vm_magic.state.record import KEY, kept

    return safe_markdown(reply.text), {KEY: kept([reply.record])}  # IPython takes a form with its metadata


def _score(score: Any) -> str:
    from vm_magic.show.token_html import score_html

    return score_html(score)


_FORMATTERS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    (_HTML, "engine.memory.plan.MemoryPlan", _plan),
    (_HTML, "engine.memory.plan_table.PlanTable", _plan_table),
    (_HTML, "engine.model_card.card.ModelCard", _model_card),
    (_HTML, "engine.batch.score.Score", _score),
    (_MARKDOWN, "engine.outputs.Reply", _reply),
)
"""MIME type, type, and what makes the one of the other."""
