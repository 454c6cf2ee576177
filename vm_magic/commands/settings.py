"""``set``: sampling defaults and memory while the model runs."""

import argparse
from collections.abc import Iterable

from engine.params.settings import MODEL_PRESET, PRESETS
from vm_magic.commands.base import Command, Context
from vm_magic.commands.parser import CommandParser
from vm_magic.show.errors import HelpShown
from vm_magic.show.tables import settings_text
from vm_magic.show.terminal import say
from vm_magic.state.live_settings import change_settings
from vm_magic.state.settings_text import MEMORY_NAMES, SETTABLE, read_settings

EXAMPLES = """\
%vllm_metal set temperature=0.2 max_tokens=200    for all messages and clients that do not say otherwise
%vllm_metal set temperature=                      the model's own again
%vllm_metal set preset=model                      all of the model's own; qwen-thinking and others set theirs
%vllm_metal set memory_fraction=0.6               the memory, while requests run
%vllm_metal set                                   what is set now"""


class Set(Command):
    """Changes settings; its line is not made of flags."""

    help = "sampling defaults and memory: temperature=0.2 max_model_len=4096 …"

    def add_arguments(self, parser: CommandParser) -> None:
        """For ``--help``: the line is read by :func:`read_settings`."""
        told = f"{', '.join(SETTABLE)}; with a model also {', '.join(MEMORY_NAMES)}"
        parser.add_argument("values", nargs=argparse.REMAINDER, metavar="KEY=VALUE", help=told)
        parser.epilog = EXAMPLES

    def run(self, context: Context, line: str, cell: str | None) -> None:
        """Set what the line says, and print what holds then."""
        if cell is not None:
            raise self.refuse_cell()
        if line.strip() in ("-h", "--help"):
            raise HelpShown(self.parser.format_help())
        session = context.session
        values = read_settings(line)
        change_settings(session, values)
        if any(name in MEMORY_NAMES for name in values):
            say(session.require().plan.log_line())
        if set(values) - set(MEMORY_NAMES) or not values:
            say(settings_text(session.settings) or "nothing is set: the model's own defaults hold")

    def arguments(self) -> Iterable[str]:
        """Presets and names."""
        presets = [f"preset={name}" for name in (*PRESETS, MODEL_PRESET)]
        return presets + [f"{name}=" for name in (*SETTABLE, *MEMORY_NAMES)]
