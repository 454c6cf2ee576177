"""``serve`` and ``stop``: the OpenAI port of this kernel."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.format.text import is_count
from engine.openai.http.options import DEFAULT_PORT, MAX_NUM_QUEUED_REQS, MAX_NUM_QUEUED_TOKENS
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.engine_flags import ENGINE_OPTIONS, EngineCommand
from vm_magic.commands.load import load_model
from vm_magic.commands.parser import CommandParser, pick, split_words
from vm_magic.commands.shell_text import read_shell_text
from vm_magic.show.server_view import moved_text
from vm_magic.show.terminal import say
from vm_magic.state import session as sessions
from vm_magic.state.session import environment

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle

SERVER_SWITCHES = {
    "trust_request_chat_template": "let requests bring their own chat template",
    "enable_request_id_headers": "answer with X-Request-Id",
    "enable_log_requests": "log each request (%%vllm_metal logs)",
    "enable_force_include_usage": "send usage at the end of every stream, requested or not",
    "exclude_tools_when_tool_choice_none": "leave tools out of the prompt of a request with tool_choice none",
    "enable_tokenizer_info_endpoint": "offer /tokenizer_info: the tokenizer's configuration and the chat template",
}
SERVER_LIMITS = {
    "max_num_queued_reqs": f"completions of clients under way, waiting ones included ({MAX_NUM_QUEUED_REQS})",
    "max_num_queued_tokens": f"tokens of clients' prompts that wait ({MAX_NUM_QUEUED_TOKENS})",
    "max_connections": "open connections (a quarter of the files that the process may open)",
}
SERVER_OPTIONS = (
    *("host", "port", "api_key", "no_api_key", "allowed_origins", "allowed_hosts", "root_path"),
    *SERVER_SWITCHES,
    *SERVER_LIMITS,
)


class Serve(EngineCommand, LineCommand):
    """Opens the port. The cell form takes shell text as documentation prints it."""

    help = "load a model if needed and open the OpenAI port"
    has_cell = True
    needs_kernel = "opens a port of this kernel"

    def add_arguments(self, parser: CommandParser) -> None:
        """The server's flags."""
        add_server_flags(parser)

    def run(self, context: Context, line: str, cell: str | None) -> "ServerHandle | None":
        """Serve what the line says, or what the cell's ``vllm serve`` says and the line adds."""
        if cell is None:
            return self.execute(context, self.parser.read(split_words(line, self.parser)))
        pasted = read_shell_text(cell, os.environ)
        for note in pasted.notes:
            say(note)
        words = [*pasted.arguments, *split_words(line, self.parser)]
        if not words:
            raise ConfigError("no vllm serve line in this cell; paste one, such as: vllm serve smollm2", flag="serve")
        with environment(pasted.environment):
            about_memory = any(name.startswith("VLLM_METAL_") for name in pasted.environment)
            server = self.execute(context, self.parser.read(words), compare=about_memory)
        context.session.pasted_environment = dict(pasted.environment)
        return server

    def execute(self, context: Context, parsed: argparse.Namespace, *, compare: bool = False) -> "ServerHandle":
        """Open the port; a model that is loaded stays, unless flags (or ``compare``: variables) ask for another."""
        session = context.session
        options = pick(parsed, ENGINE_OPTIONS)
        model = parsed.model or session.model_name
        if model is None:
            raise ConfigError("serve which model? Nothing is loaded; write %vllm_metal serve smollm2", flag="model")
        wanted = pick(parsed, SERVER_OPTIONS)
        loaded, port = session.loaded, session.server
        if options or compare or model != session.model_name:
            session.check_server(wanted)
            load_model(context, model, options)
        server = session.serve(wanted)
        lines = [moved_text(server) if server is not port else None]
        if session.loaded is loaded:  # else the load said so
            lines.append(sessions.others_line(session.require().plan.usable))
        for line in filter(None, lines):
            say(line)
        return server


class Stop(LineCommand):
    """Closes the port; the model stays."""

    help = "close the port, keep the model"

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:  # noqa: ARG002
        """Close the port, if there is one."""
        say("the port is closed; the model stays loaded" if context.session.stop() else "no port is open")


def add_server_flags(parser: CommandParser) -> None:
    """Give ``parser`` the flags of the port."""
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
    for name, text in SERVER_LIMITS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=limit_number, metavar="N", help=text, **absent)
    group.add_argument(
        "--disable-log-requests",
        dest="enable_log_requests",
        action="store_false",
        help="the old name of --no-enable-log-requests",
        **absent,
    )


def port_number(text: str) -> int:
    """A TCP port, 0 for a free one."""
    if not is_count(text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def limit_number(text: str) -> int:
    """How many of something at most."""
    if not is_count(text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def name_list(text: str) -> list[str]:
    """A JSON list of strings, or names with commas between them."""
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return [str(part) for part in json.loads(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON list such as ["*"]') from None
