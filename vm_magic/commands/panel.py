"""``panel``: memory, sampling, activity and the port as widgets."""

import argparse

from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.panel import close_left_panel, close_panel, open_panel, panel_line
from vm_magic.show.display_handle import can_update
from vm_magic.show.terminal import say


class Panel(LineCommand):
    """Opens the panel, or closes it; a terminal gets one line."""

    help = "memory, sampling, activity and the port as widgets; while connected: the server's"

    def add_arguments(self, parser: CommandParser) -> None:
        """``--close``."""
        parser.add_argument("--close", action="store_true", help="take the panel away")

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:
        """Show the panel, or take it away."""
        if parsed.close:
            say("the panel is closed" if close_panel() else "no panel is open")
        elif can_update(context.shell):
            open_panel().show(context.shell, panel_line(context.session))
        else:
            say(panel_line(context.session))


def leave_panel() -> None:
    """Close a panel that shows a model which the notebook no longer uses, and say so."""
    if close_left_panel():
        say("the panel is closed: it showed another model; %vllm_metal panel opens the one for the model in use now")
