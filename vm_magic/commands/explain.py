"""``explain``: one request, looked at afterwards."""

import argparse
from typing import Any

from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser


class Explain(LineCommand):
    """Tells how a request went."""

    help = "the last request: prompt, values, cache hit, why it was slow, raw and parsed output"
    needs_kernel = "looks into the engine of this kernel; a server does not tell where a request's time went"

    def add_arguments(self, parser: CommandParser) -> None:
        """Which request."""
        parser.add_argument(
            "count", nargs="?", type=int, default=1, metavar="N", help="2 is the request before the last, and so on"
        )

    def execute(self, context: Context, parsed: argparse.Namespace) -> Any:
        """The request's view."""
        from vm_magic.show.explain_view import ExplainView

        return ExplainView(context.session.require().explain(parsed.count))
