"""``connect``: the same magics against a server elsewhere."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.format.text import count_text
from vm_magic.commands.base import GO_BACK, Context, LineCommand
from vm_magic.commands.panel import leave_panel
from vm_magic.commands.parser import CommandParser
from vm_magic.show.terminal import say
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from vm_magic.remote.llm import RemoteLLM

EXAMPLES = """\
%vllm_metal connect http://127.0.0.1:8000     chat, complete, grid, map, set, panel, status, models, metrics go there
%vllm_metal connect https://HOST/v1 -m NAME   one of several models; the key comes from VLLM_API_KEY or OPENAI_API_KEY
%vllm_metal connect server                    a variable: an address as text, or the handle of another serve
%vllm_metal connect --close                   back to the model of this kernel, which stays loaded meanwhile

Prompts and, if there is one, the key go to the address that you give, and are not sent on by a redirect."""


class Connect(LineCommand):
    """Connects, ends the connection, or says what it is."""

    help = "chat, complete, grid and map against a remote server instead"

    def add_arguments(self, parser: CommandParser) -> None:
        """The server, its key and its model."""
        parser.epilog = EXAMPLES
        parser.add_argument(
            "url", nargs="?", metavar="URL", help="http(s) address of an OpenAI-compatible server, or a variable"
        )
        parser.add_argument(
            "--api-key", metavar="KEY", help="key to send (VLLM_API_KEY, OPENAI_API_KEY: a notebook should not hold it)"
        )
        parser.add_argument("-m", "--model", metavar="NAME", help="which of the served models (default: the only one)")
        parser.add_argument("--close", action="store_true", help="end the connection")

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:
        """Connect or disconnect, and print the result."""
        say(connect(context.session, parsed, context.shell.user_ns))
        leave_panel()


def connect(session: Session, parsed: argparse.Namespace, namespace: Mapping[str, Any]) -> str:
    """Connect, end the connection, or say what it is; gives the text to print.

    The address may be a variable of ``namespace``: a text, or the handle that ``serve`` returns, key and all.
    """
    if parsed.close:
        if parsed.url or parsed.model or parsed.api_key:
            raise ConfigError("connect --close takes nothing else", flag="close")
        return _closed(session) if session.disconnect() else "not connected"
    if parsed.url is None:
        if parsed.model or parsed.api_key:
            raise ConfigError("connect to which server? Write %vllm_metal connect http://HOST:PORT", flag="url")
        return connected_text(session)
    from vm_magic.remote.llm import RemoteLLM

    named = namespace.get(parsed.url)
    url = named if isinstance(named, str) else getattr(named, "base_url", parsed.url)
    key, source = parsed.api_key, "--api-key"
    if key is None and (held := getattr(named, "api_key", None)):
        key, source = str(held), f"{parsed.url}.api_key"
    session.connect(RemoteLLM(str(url), api_key=key, model=parsed.model, key_source=source))
    return connected_text(session)


def _closed(session: Session) -> str:
    local = session.loaded
    after = f"back to {local.args.names[0]} in this kernel" if local is not None else "no model is loaded here"
    return f"the connection is closed; {after}"


def connected_text(session: Session) -> str:
    """What a connection is, in one or two lines."""
    remote = session.remote
    if remote is None:
        return "not connected; %vllm_metal connect http://HOST:PORT goes to a server"
    key = f"key from {remote.address.key_source}" if remote.address.key else "no key"
    facts = [context_text(remote), version_text(remote), key]
    lines = [f"connected to {remote.base_url}: {remote.model} ({', '.join(filter(None, facts))})"]
    if session.loaded is not None:
        lines.append(f"{session.loaded.args.names[0]} stays loaded beside it; {GO_BACK}")
    return "\n".join(lines)


def context_text(remote: "RemoteLLM") -> str:
    """The context length that the server tells, or nothing."""
    return f"{count_text(remote.served.max_model_len)} tokens" if remote.served.max_model_len else ""


def version_text(remote: "RemoteLLM") -> str:
    """The version that the server tells, or nothing."""
    version = remote.version()
    return f"version {version}" if version else ""
