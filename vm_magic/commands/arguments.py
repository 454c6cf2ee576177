"""The words of ``%vllm_metal``: one parser per command, built from the engine's own flag table."""

import argparse
import difflib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NoReturn

from IPython.core.magic_arguments import MagicArgumentParser

from engine.errors import ConfigError, UnsupportedOptionError
from engine.openai.http.options import DEFAULT_PORT
from engine.params.engine_args import ENGINE_FLAGS, Flag
from engine.params.vllm_flags import ACCEPTED_NO_OPS, REFUSED_FLAGS, check_vllm_flag, refuse_flag
from vm_magic.commands.connect import add_connect_flags
from vm_magic.commands.grid import add_grid_flags
from vm_magic.commands.plan_command import Listed, add_plan_flags
from vm_magic.commands.score_command import add_score_flags
from vm_magic.show.bench_view import add_bench_flags
from vm_magic.show.errors import HelpShown
from vm_magic.state.chat_flags import SAMPLING_FLAGS, add_chat_flags, add_conversation_name

COMMANDS: dict[str, str] = {
    "status": "what is loaded, its memory, the port, the last reply's speed",
    "load": "load a model into this kernel",
    "serve": "load a model if needed and open the OpenAI port",
    "stop": "close the port, keep the model",
    "unload": "free the model and its memory",
    "plan": "the memory plan of a model, without loading it",
    "panel": "memory, sampling, activity and the port as widgets; while connected: the server's",
    "set": "sampling defaults and memory: temperature=0.2 max_model_len=4096 …",
    "chat": "send a message (cell form: the cell's body, streamed)",
    "complete": "continue a raw prompt (cell form: the cell's body, streamed)",
    "grid": "prompts times parameters as a DataFrame (cell form: the cell's body is the template)",
    "connect": "chat, complete, grid and map against a remote server instead",
    "reset": "forget a conversation",
    "history": "show a conversation, or list them all",
    "models": "models on this machine",
    "score": "a text's perplexity and the probability of each token (cell form: the cell's body)",
    "explain": "the last request: prompt, values and their sources, cache hit, raw and parsed output",
    "export": "the same as a vllm serve command, or what a client needs (--client)",
    "llm": "write or show the llm command-line tool's entry for the open port",
    "bench": "speed of the loaded model, as one table",
    "logs": "the latest lines of the engine's and server's log",
    "metrics": "the engine's Prometheus metrics as a table",
}
CLIENT_NAMES = ("openai", "anthropic", "llm", "curl", "codex")
ENGINE_COMMANDS = ("load", "plan", "serve")
"""Those that take a model and the engine's flags."""
CELL_COMMANDS = ("serve", "chat", "complete", "grid", "score")
FLAGS_OF: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "history": lambda parser: add_conversation_name(parser, "--list", "all conversations in a table"),
    "reset": lambda parser: add_conversation_name(parser, "--all", "every conversation"),
    "score": add_score_flags,
    "grid": lambda parser: add_grid_flags(parser, SAMPLING_FLAGS),
    "connect": add_connect_flags,
    "bench": add_bench_flags,
    "plan": add_plan_flags,
}
"""What gives a command its flags, for those with a module of their own."""


class CommandParser(MagicArgumentParser):  # type: ignore[misc]
    """One command's parser: ``--help`` raises HelpShown, abbreviations are off, underscores allowed."""

    def __init__(self, command: str, *, cell: bool = False) -> None:
        percent = "%%" if cell and command in CELL_COMMANDS else "%"
        super().__init__(
            prog=f"{percent}vllm_metal {command}",
            description=COMMANDS[command],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.allow_abbrev = False
        self.command = command
        self.add_argument("-h", "--help", action=_Help, nargs=0, help="show this text")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse ``words``. Raises ConfigError for unknown flags, UsageError for what argparse refuses."""
        words = self._join_dotted(self._without_no_ops([_dashes(word) for word in words]))
        for word in words:
            if word == "--":
                break
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                raise self._unknown(word.partition("=")[0])
        result: argparse.Namespace = self.parse_args(words)
        if self.command in ENGINE_COMMANDS:
            self._choose_model(result)
        return result

    def _choose_model(self, result: argparse.Namespace) -> None:
        """MODEL from its place or from ``--model``."""
        flag = vars(result).pop("model_flag", None)
        if flag is not None and result.model not in (None, flag):
            self.error(f"MODEL is {result.model} and --model says {flag}: give one")
        result.model = result.model or flag
        if result.model is None and self.command == "load":
            self.error("the following arguments are required: MODEL")

    def _without_no_ops(self, words: Sequence[str]) -> list[str]:
        """``words`` without vLLM's flags that are accepted no-ops. Raises UnsupportedOptionError for others."""
        if self.command not in ENGINE_COMMANDS:
            return list(words)
        result: list[str] = []
        rest = iter(words)
        for word in rest:
            flag, mark, value = word.partition("=")
            name = flag.removeprefix("--").removeprefix("no-")
            if not flag.startswith("--") or flag in self._option_string_actions or name not in ACCEPTED_NO_OPS:
                result.append(word)
            elif isinstance(ACCEPTED_NO_OPS[name], bool):
                check_vllm_flag(name, not flag.startswith("--no-"))
            else:
                check_vllm_flag(name, value if mark else next(rest, ""))
        return result

    def _join_dotted(self, words: list[str]) -> list[str]:
        """``--flag.key value`` as JSON, as vLLM reads it: ``--flag '{"key": value}'``."""
        result: list[str] = []
        objects: dict[str, dict[str, Any]] = {}
        rest = iter(words)
        for word in rest:
            flag, dot, path = word.partition("=")[0].partition(".")
            if not (word.startswith("--") and dot and flag in self._option_string_actions):
                result.append(word)
                continue
            value = word.partition("=")[2] if "=" in word else next(rest, None)
            if value is None:
                self.error(f"argument {word}: expected a value")
            target = objects.setdefault(flag, {})
            *outer, last = path.split(".")
            for key in outer:
                target = target.setdefault(key, {})
            target[last] = _json_or_text(value)
        return [*result, *(word for flag, value in objects.items() for word in (flag, json.dumps(value)))]

    def takes_value(self, flag: str) -> bool:
        """Whether ``flag`` must be followed by a value."""
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs not in (0, "?")

    def takes_number(self, flag: str) -> bool:
        """Whether ``flag`` may be followed by a number, or by none."""
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs == "?"

    def flags(self) -> dict[str, tuple[str, ...]]:
        """All long flags, with the values they allow (empty where any)."""
        return {
            name: tuple(str(choice) for choice in action.choices or ())
            for name, action in self._option_string_actions.items()
            if name.startswith("--")
        }

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with ``message`` and where the help is."""
        super().error(f"{message} (see {self.prog} --help)")
        raise AssertionError("MagicArgumentParser.error raises")

    def _unknown(self, flag: str) -> UnsupportedOptionError:
        name = flag.lstrip("-")
        if self.command in ENGINE_COMMANDS and name.removeprefix("no-") in REFUSED_FLAGS:
            return refuse_flag(name)
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        return UnsupportedOptionError(f"{flag} is not a flag of {self.command}: {hint}", flag=name)


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        raise HelpShown(parser.format_help())


def _dashes(word: str) -> str:
    """``--max_model_len=1`` as ``--max-model-len=1``."""
    if not word.startswith("--"):
        return word
    name, mark, rest = re.fullmatch(r"([^=.]*)([=.]?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    return name.replace("_", "-") + mark + rest


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@cache
def command_parser(command: str) -> CommandParser:
    """The parser of ``command``, one of :data:`COMMANDS`."""
    parser = CommandParser(command, cell=command in CELL_COMMANDS[1:])
    if command in ENGINE_COMMANDS:
        parser.add_argument("model", nargs="?", metavar="MODEL", help="smollm2, a folder, a hub id or a .gguf file")
        parser.add_argument(
            "--model", dest="model_flag", metavar="MODEL", default=argparse.SUPPRESS, help="another way to give MODEL"
        )
        _add_engine_flags(parser, lists=command == "plan")
    if command == "serve":
        _add_server_flags(parser)
    elif command in ("chat", "complete"):
        add_chat_flags(parser, chat=command == "chat")
    elif command in FLAGS_OF:
        FLAGS_OF[command](parser)
    elif command == "set":
        parser.add_argument("values", nargs=argparse.REMAINDER, metavar="KEY=VALUE")
    elif command == "panel":
        parser.add_argument("--close", action="store_true", help="take the panel away")
    elif command == "logs":
        parser.add_argument("count", nargs="?", type=int, default=50, metavar="N", help="how many lines (50)")
    elif command == "explain":
        parser.add_argument(
            "count", nargs="?", type=int, default=1, metavar="N", help="2 is the request before the last, and so on"
        )
    elif command in ("export", "llm"):
        _add_client_flags(parser, export=command == "export")
    return parser


def _add_client_flags(parser: CommandParser, *, export: bool) -> None:
    if export:
        parser.add_argument("--client", choices=CLIENT_NAMES, help="what this client needs to use the open port")
        parser.add_argument(
            "--show-key", action="store_true", help="write the key out (a saved notebook then holds it)"
        )
        return
    parser.add_argument("--show", action="store_true", help="print the entry and write nothing")
    parser.add_argument("--model-id", metavar="NAME", help="what llm -m takes (default: the model's name)")


def _add_engine_flags(parser: CommandParser, *, lists: bool) -> None:
    group = parser.add_argument_group("engine flags")
    for flag in ENGINE_FLAGS:
        names = [f"--{flag.name}", *(f"--{alias}" for alias in flag.aliases)]
        _add_flag(group, flag, names, lists=lists)


def _add_flag(group: Any, flag: Flag, names: list[str], *, lists: bool) -> None:
    common: dict[str, Any] = {"help": flag.help.replace("%", "%%"), "default": argparse.SUPPRESS}
    if flag.kind == "switch":
        group.add_argument(*names, dest=flag.field, action=argparse.BooleanOptionalAction, **common)
    elif flag.kind == "list":
        group.add_argument(*names, dest=flag.field, action="extend", nargs="+", metavar=flag.metavar, **common)
    elif flag.choices:
        choices = Listed(flag.choices) if lists else flag.choices
        group.add_argument(*names, dest=flag.field, type=_one_of(flag, lists=lists), choices=choices, **common)
    else:
        group.add_argument(*names, dest=flag.field, metavar=flag.metavar or None, **common)


def _one_of(flag: Flag, *, lists: bool) -> Callable[[str], Any]:
    """Reads another name of a choice as the choice, and refuses others in the engine's words."""

    def read(text: str) -> Any:
        try:
            return ",".join(flag.parse(part.strip()) for part in text.split(",")) if lists else flag.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{flag.name} ")) from None

    return read


def _add_server_flags(parser: CommandParser) -> None:
    group = parser.add_argument_group("server flags")
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument("--host", help="address to listen on (127.0.0.1)", **absent)
    group.add_argument(
        "--port",
        type=port_number,
        metavar="N",
        help=f"port; 0 takes a free one ({DEFAULT_PORT}, or the next free)",
        **absent,
    )
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="key that clients send (VLLM_API_KEY; random if none)",
        **absent,
    )
    group.add_argument("--no-api-key", action="store_true", help="no key, on loopback only", **absent)
    for name in ("--allowed-origins", "--allowed-hosts"):
        group.add_argument(name, type=name_list, metavar="LIST", help='JSON list or a,b,c; ["*"] allows all', **absent)
    group.add_argument("--root-path", metavar="PATH", help="path prefix that a proxy strips", **absent)
    for name, text in SERVER_SWITCHES.items():
        group.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text, **absent)
    group.add_argument(
        "--disable-log-requests",
        dest="enable_log_requests",
        action="store_false",
        help="the old name of --no-enable-log-requests",
        **absent,
    )


SERVER_SWITCHES = {
    "trust_request_chat_template": "let requests bring their own chat template",
    "enable_request_id_headers": "answer with X-Request-Id",
    "enable_log_requests": "log each request (%%vllm_metal logs)",
    "enable_force_include_usage": "tell usage at the end of every stream, asked for or not",
    "exclude_tools_when_tool_choice_none": "leave tools out of the prompt of a request with tool_choice none",
}
SERVER_OPTIONS = (
    *("host", "port", "api_key", "no_api_key", "allowed_origins", "allowed_hosts", "root_path"),
    *SERVER_SWITCHES,
)


def split_text(parser: CommandParser, line: str) -> tuple[list[str], str]:
    """Split ``line`` into leading flag words and the free text after them, which stays as typed."""
    words: list[str] = []
    position = 0
    token = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)""")
    while (found := token.match(line, position)) and found[1].startswith("-") and found[1] != "-":
        position = found.end()
        if found[1] == "--":
            break
        words += shlex.split(found[1])
        if "=" not in found[1]:
            flag, value = _dashes(found[1]), token.match(line, position)
            if value and (parser.takes_value(flag) or (parser.takes_number(flag) and value[1].isdigit())):
                words += shlex.split(value[1])
                position = value.end()
    text = line[position:].strip()
    if len(text) > 1 and text[0] in "'\"" and text.find(text[0], 1) == len(text) - 1:
        text = text[1:-1]
    return words, text


def split_words(line: str) -> list[str]:
    """Split ``line`` as a shell would, so that JSON in single quotes arrives whole."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"{line.strip()!r}: {error}; close the quote") from None


def port_number(text: str) -> int:
    """A TCP port, 0 for a free one."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def name_list(text: str) -> list[str]:
    """A JSON list of strings, or names with commas between them."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [str(part) for part in json.loads(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list such as ["*"]') from None


def pick(namespace: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of ``names`` that the user gave."""
    given = vars(namespace)
    return {name: given[name] for name in names if name in given}
