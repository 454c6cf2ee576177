"""``%vllm_metal score``: how likely the loaded model finds a text."""

import argparse
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from vm_magic.state.chat_flags import DEFAULT_ALTERNATIVES, alternatives, variable_name
from vm_magic.state.conversation import render_prompt
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from engine.batch.score import Score


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the flags of ``score``."""
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


def score_command(
    session: Session, shell: Any, parsed: argparse.Namespace, text: str, cell: str | None
) -> "Score | None":
    """The score of the cell's body, or of the line's text; the object has ``perplexity``, ``tokens``, ``logprobs``."""
    if cell is not None:
        if text:
            raise UsageError(f"{text!r} is no flag; the text goes into the cell's body")
        text = cell.removesuffix("\n")
    if not text:
        raise UsageError("no text: write it after the flags, or in the cell's body (%%vllm_metal score)")
    llm = session.require()
    score = llm.score(text if parsed.raw else render_prompt(text, shell.user_ns), num_alternatives=parsed.logprobs)
    if parsed.out:
        shell.user_ns[parsed.out] = score
        return None
    return score
