"""``inspect``: the model card of a model that need not be loaded."""

import argparse
from typing import Any

from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.engine_flags import ENGINE_OPTIONS, EngineCommand
from vm_magic.commands.parser import CommandParser, pick
from vm_magic.state import session as sessions


class Inspect(EngineCommand, LineCommand):
    """Shows what is understood of a model, and gives the card."""

    help = "what is understood of a model before loading, and from which file"
    needs_model = True

    def add_arguments(self, parser: CommandParser) -> None:
        """No flags but the engine's: the card is of a load with them."""
        parser.epilog = (
            "The card is of a load with the same flags. It loads no weights and runs nothing of the model's folder.\n"
            "print(_) shows it as text to send with a bug report, without home folders, names and keys; _.to_dict()\n"
            "has it for programs."
        )

    def execute(self, context: Context, parsed: argparse.Namespace) -> Any:  # noqa: ARG002
        """The card."""
        return sessions.new_card(parsed.model, **pick(parsed, ENGINE_OPTIONS))
