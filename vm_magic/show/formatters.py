"""HTML forms of the engine's objects, which know only text. Nothing is imported until one is shown."""

from typing import Any

_PLAN, _TABLE = "engine.memory.planner.MemoryPlan", "engine.memory.plan_table.PlanTable"


def add_formatters(shell: Any) -> None:
    """Teach ``shell`` the HTML of plans."""
    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name(*_PLAN.rsplit(".", 1), _plan)
    formatter.for_type_by_name(*_TABLE.rsplit(".", 1), _plan_table)


def remove_formatters(shell: Any) -> None:
    """Undo :func:`add_formatters`."""
    formatter = shell.display_formatter.formatters["text/html"]
    for name in (_PLAN, _TABLE):
        formatter.pop(name, None)


def _plan(plan: Any) -> str:
    from vm_magic.show.plan_view import plan_html

    return plan_html(plan)


def _plan_table(table: Any) -> str:
    from vm_magic.show.plan_view import plan_table_html

    return plan_table_html(table)
