"""``score``: how likely the loaded model finds a text."""

import argparse
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from vm_magic.commands.base import Context, TextCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.state.chat_flags import DEFAULT_ALTERNATIVES, alternatives, variable_name
from vm_magic.state.conversation import render_prompt

if TYPE_CHECKING:
    from engine.batch.score import Score as TextScore


class Score(TextCommand):
    """Scores a text: its perplexity, and the probability of each token."""

    help = "a text's perplexity and the probability of each token (cell form: the cell's body)"
    needs_kernel = "needs the engine of this kernel"
    body = "text"

    def add_arguments(self, parser: CommandParser) -> None:
        """How many alternatives, and where the result goes."""
        parser.add_argument(
            "--logprobs",
            type=alternatives,
            default=DEFAULT_ALTERNATIVES,
            metavar="N",
            help=f"how many of the likeliest tokens to keep at each place ({DEFAULT_ALTERNATIVES}, at most 20)",
        )
        parser.add_argument(
            "-o", "--out", metavar="NAME", type=variable_name, help="store the score in this variable and show nothing"
        )
        parser.add_argument("--raw", action="store_true", help="take {{ }} as typed")
        parser.add_argument("text", nargs="?", help="the text, in the line form (after the flags)")

    def execute(self, context: Context, parsed: argparse.Namespace, text: str, *, cell: bool) -> "TextScore | None":
        """The score of ``text``; the object has ``perplexity``, ``tokens`` and ``logprobs``."""
        if cell:
            text = text.removesuffix("\n")
        if not text:
            raise UsageError("no text: write it after the flags, or in the cell's body (%%vllm_metal score)")
        llm = context.session.require()
        names = context.shell.user_ns
        score = llm.score(text if parsed.raw else render_prompt(text, names), num_alternatives=parsed.logprobs)
        if parsed.out:
            names[parsed.out] = score
            return None
        return score
