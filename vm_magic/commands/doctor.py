"""``doctor``: what is wrong with this installation, and how to mend it."""

import argparse
from typing import TYPE_CHECKING, Any

from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.cards import CodeText

if TYPE_CHECKING:
    from engine.checkup.findings import Examination


class Doctor(LineCommand):
    """Looks at everything that a model needs here. Never fails, and needs no model."""

    help = "what is wrong with this installation, and how to mend it; --report: as text for a bug report"

    def add_arguments(self, parser: CommandParser) -> None:
        """Whether it is to be sent."""
        parser.add_argument(
            "--report",
            action="store_true",
            help="text to paste into a bug report, without keys, prompts, paths and names of users, hosts and models",
        )
        parser.epilog = (
            "The installation, device, kernels, memory, model cache, environment, the loaded model, its port and this\n"
            "front end. Nothing is changed. A model need not be loaded, and requests under way go on."
        )

    def execute(self, context: Context, parsed: argparse.Namespace) -> "Examination | CodeText":
        """What was found, or the text to send."""
        found = examine(context)
        return CodeText(found.report(), "text") if parsed.report else found


def examine(context: Context) -> "Examination":
    """What ``engine.doctor`` finds, and how it is with the shell, the front end and a connection."""
    import engine
    from engine.checkup.findings import attempt
    from vm_magic.commands import front_end_check

    session = front_end_check.session_of(context)
    found = engine.doctor(None if session is None else session.llm)
    more = attempt("front end", lambda: front_end_check.check_shell(context.shell))
    more += attempt("front end", lambda: front_end_check.check_widgets(context.shell))
    if session is not None and session.remote is not None:
        remote: Any = session.remote
        more += attempt("connection", lambda: front_end_check.check_remote(remote))
    return found.with_more(more, front_end_check.log_facts(context.logs.lines))
