"""Rich forms of the engine's objects, which know only text. Nothing is imported until one is shown."""

from collections.abc import Callable
from typing import Any

_HTML, _MARKDOWN = "text/html", "text/markdown"


def add_formatters(shell: Any) -> None:
    """Teach ``shell`` the HTML of plans and scores, and the Markdown of replies."""
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


def _reply(reply: Any) -> str:
    from vm_magic.show.safe_markdown import safe_markdown

    return safe_markdown(reply.text)


def _score(score: Any) -> str:
    from vm_magic.show.token_html import score_html

    return score_html(score)


_FORMATTERS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    (_HTML, "engine.memory.plan.MemoryPlan", _plan),
    (_HTML, "engine.memory.plan_table.PlanTable", _plan_table),
    (_HTML, "engine.batch.score.Score", _score),
    (_MARKDOWN, "engine.outputs.Reply", _reply),
)
"""MIME type, type, and what makes the one of the other."""
