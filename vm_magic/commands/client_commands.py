"""What ``export`` and ``llm`` do: the session's state handed to the writers of commands, snippets and entries."""

from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, EngineClosedError
from vm_magic.commands.export import Served, serve_command
from vm_magic.commands.llm_tool import LlmEntry, user_folder, write_entry
from vm_magic.show.code_text import CodeText
from vm_magic.state.clients import Port, model_id, snippets
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle


def export_server(session: Session, *, show_key: bool) -> CodeText:
    """The ``vllm serve`` command for the loaded model and its port. Raises EngineClosedError without a model."""
    if session.remote is not None and session.loaded is None:
        raise EngineClosedError(
            f"export writes the command of a model loaded in this kernel, and the notebook is connected to "
            f"{session.remote.base_url}; export --client openai gives what a client of that server needs"
        )
    llm = session.require()
    server = session.server
    options = dict(session.server_options)
    if server is not None:
        options["port"] = server.port
    chosen = {name: getattr(llm, name, None) for name in ("reasoning_parser", "tool_call_parser")}
    served = Served(
        llm.args,
        options,
        llm.settings.snapshot(),
        {name: value for name, value in chosen.items() if value},
        session.pasted_environment,
        server.api_key if server is not None and show_key else None,
    )
    return CodeText(serve_command(served))


def export_client(session: Session, client: str, *, show_key: bool) -> CodeText:
    """What ``client`` needs to talk to the server connected to, else to the open port.

    Raises ConfigError if no port is open, and for the llm tool, whose entry is for a port of this kernel.
    """
    remote = session.remote
    if remote is not None and client != "llm":
        return snippets(Port.of_remote(remote, show_key=show_key))[client]
    return snippets(Port.of(_server(session), show_key=show_key))[client]


def show_llm_entry(session: Session, name: str | None) -> CodeText:
    """The entry for the ``llm`` tool, and where it would go; writes nothing."""
    path = user_folder() / "extra-openai-models.yaml"
    return CodeText(_entry(session, name).yaml(), "yaml", f"%vllm_metal llm writes this to {_short(path)}.")


def write_llm_entry(session: Session, name: str | None) -> str:
    """Write the entry and the key; gives one line that says where and how to use it."""
    entry = _entry(session, name)
    written = write_entry(entry, _server(session).api_key, user_folder())
    return f"wrote {' and '.join(map(_short, written))}; use it with: llm -m {entry.model_id} 'Hello!'"


def _short(path: Path) -> str:
    """The path with ``~`` for the user's home, which a saved notebook should not name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _entry(session: Session, name: str | None) -> LlmEntry:
    server = _server(session)
    return LlmEntry(
        name or model_id(server.model),
        server.model,
        server.base_url,
        server.api_key is not None,
        supports_tools=getattr(session.require(), "tool_call_parser", None) is not None,
    )


def _server(session: Session) -> "ServerHandle":
    session.require()
    server = session.server
    if server is None:
        raise ConfigError("no port is open for clients; %vllm_metal serve opens it", flag="serve")
    return server
