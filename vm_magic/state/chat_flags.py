"""The flags of ``chat`` and ``complete``."""

import argparse
from typing import TYPE_CHECKING, Any

from engine.format.text import is_count
from engine.params.sampling_params import COMMON, MAX_LOGPROBS, PARAMETERS
from vm_magic.state.compare_flags import add_compare_flag
from vm_magic.state.context_flags import add_context_flags

if TYPE_CHECKING:
    from vm_magic.show.reply_bundle import Format

FORMATS = ("markdown", "text", "code", "json")
TOOL_CHOICES = ("auto", "none", "required")
DEFAULT_TOOL_ROUNDS = 5
DEFAULT_ALTERNATIVES = 5
SAMPLING_FLAGS: tuple[tuple[tuple[str, ...], str, Any, str], ...] = tuple(
    (flag.names(name), name, flag.read or known.kind.type, flag.help)
    for name in COMMON
    if (flag := (known := PARAMETERS[name]).flag) is not None
)
"""Flags of sampling values: names, the parameter, how the text is read, help."""


def reply_format(parsed: argparse.Namespace) -> "Format":
    """How a reply is shown: as ``-f`` says, else as what ``--json`` makes of it."""
    return parsed.format or ("json" if parsed.schema else "markdown")


def add_stop_flag(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the flag that every generating command has: ``--stop``, as often as wanted."""
    parser.add_argument(
        "--stop",
        action="append",
        type=unescape,
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help=r"stop before TEXT (\n is a line end); may be repeated",
    )


def add_think_flag(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` ``--think`` and ``--no-think``."""
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="turns thinking on or off in the chat template (enable_thinking)",
    )


def add_json_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Give ``parser`` ``--json``; ``what`` is what will be JSON, with its verb."""
    parser.add_argument(
        "--json",
        dest="schema",
        metavar="SCHEMA",
        help=f"{what} JSON of this schema: JSON text, a variable (dict or pydantic model), a file, or: object",
    )


def add_chat_flags(parser: argparse.ArgumentParser, *, chat: bool) -> None:
    """Give ``parser`` the flags of ``complete``, and with ``chat`` those of a conversation too."""
    for names, dest, kind, text in SAMPLING_FLAGS:
        parser.add_argument(*names, dest=dest, type=kind, metavar="N", help=text, default=argparse.SUPPRESS)
    add_stop_flag(parser)
    if chat:
        _add_conversation_flags(parser)
        _add_tool_flags(parser)
        add_context_flags(parser)
        add_compare_flag(parser)
    add_json_flag(parser, "the reply is")
    parser.add_argument(
        "-o", "--out", metavar="NAME", type=variable_name, help="store the reply in this variable and show nothing"
    )
    parser.add_argument(
        "--logprobs",
        nargs="?",
        type=alternatives,
        const=DEFAULT_ALTERNATIVES,
        metavar="N",
        default=argparse.SUPPRESS,
        help="show the reply's tokens coloured by probability; hovering shows the N likeliest at each place (5)",
    )
    parser.add_argument("--raw", action="store_true", help="take {{ }} as typed")
    parser.add_argument("--no-stream", action="store_true", help="show the reply when it is complete")
    parser.add_argument("--detach", action="store_true", help="return at once; the output goes on filling")
    parser.add_argument(
        "--record",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep model, settings, seed, messages and versions in the output's metadata; %%vllm_metal rerun repeats "
        "it (%%config VLLMMetal.record = True: always)",
    )
    parser.add_argument("--stats", action="store_true", help="show tokens and speed under the reply")
    parser.add_argument(
        "-f",
        "--format",
        choices=FORMATS,
        help="how to show the reply (markdown; json with --json); code: the code alone, without the words around it",
    )
    parser.add_argument("--to-cell", action="store_true", help="put the reply's code into the next cell; it is not run")
    parser.add_argument("text", nargs="?", help="the message, in the line form (after the flags)")


def _add_conversation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("-n", "--new", action="store_true", help="start the conversation anew")
    parser.add_argument("-c", "--conversation", metavar="NAME", help="which conversation")
    parser.add_argument(
        "--fork",
        metavar="NAME",
        help="begin the conversation of -c as a copy of NAME, which stays as it is: -c second --fork default",
    )
    add_think_flag(parser)
    parser.add_argument(
        "--thinking-token-budget",
        type=int,
        metavar="N",
        default=None,
        help="most tokens of thought, then the answer begins; -1: no limit",
    )


def _add_tool_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools",
        action="extend",
        type=tool_names,
        metavar="NAMES",
        help="functions of the notebook that the model may call, with commas: their type hints and docstrings tell "
        "it how; nothing else is ever called",
    )
    parser.add_argument(
        "--tool-choice",
        metavar="CHOICE",
        help="auto (the model decides), none, required, or the name of the function to call first",
    )
    parser.add_argument(
        "--max-tool-rounds",
        type=positive,
        default=DEFAULT_TOOL_ROUNDS,
        metavar="N",
        help=f"how often the model may call before it must stop ({DEFAULT_TOOL_ROUNDS})",
    )


def add_conversation_name(parser: argparse.ArgumentParser, flag: str, about: str) -> None:
    """Give ``parser`` a conversation's name, and a ``flag`` for all of them."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="which conversation")
    parser.add_argument(flag, action="store_true", help=about)


def tool_names(text: str) -> list[str]:
    """``a,b`` as names of the notebook."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one function of the notebook")
    return [variable_name(name) for name in names]


def alternatives(text: str) -> int:
    """A whole number from 0 to 20."""
    if not is_count(text) or int(text) > MAX_LOGPROBS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_LOGPROBS}")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not is_count(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def variable_name(text: str) -> str:
    """A Python identifier."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not a variable name")
    return text


def unescape(text: str) -> str:
    r"""``\n`` and ``\t`` typed in a magic's line as the characters they mean."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
