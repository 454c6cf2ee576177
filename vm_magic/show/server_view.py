"""The port in a notebook and in a terminal: where it is, where its key is and how to see it, how to connect.

The key itself is never part of it: outputs are saved with a notebook.
"""

import html
from typing import TYPE_CHECKING

from engine.format.text import aligned
from vm_magic.show.cards import CARD_STYLE
from vm_magic.show.tables import row_html, table_html

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle

_KEY_PLACE = "import vm_magic; vm_magic.current().server.api_key"
_CLIENTS = "%vllm_metal export --client openai"
_CODE = '<code style="user-select:all">'


def moved_text(server: "ServerHandle") -> str | None:
    """Why the port is not the one that is tried first; None where it is."""
    if server.taken_port is None:
        return None
    return f"port {server.taken_port} is in use by another program (or another notebook), so {server.port}"


def port_text(server: "ServerHandle") -> str:
    """The port in one line, as a part of something else."""
    key = "no key" if server.api_key is None else "%vllm_metal export --show-key shows the key"
    hub = f", through the hub {server.hub_url}" if server.hub_url else ""
    return f"{server.base_url}{hub} ({key})"


def server_text(server: "ServerHandle") -> str:
    """The port as lines; a closed one is one."""
    if not server.running:
        return repr(server)
    title, rows = _rows(server)
    return "\n".join([title, *(f"  {line}" for line in aligned([(name, "".join(parts)) for name, *parts in rows]))])


def server_html(server: "ServerHandle") -> str:
    """The port as a card: addresses and commands can be picked up with a click."""
    if not server.running:
        return f"<div>{html.escape(repr(server))}</div>"
    title, rows = _rows(server)
    name_style = "text-align:left;opacity:.7;padding:1px 12px 1px 0;white-space:nowrap;vertical-align:top"
    cells = [
        row_html(
            [name, f"{_CODE}{html.escape(code)}</code>{html.escape(more)}"],
            name_style,
            "text-align:left;padding:1px 0",
            row='style="background:none"',
        )
        for name, code, more in rows
    ]
    table = table_html(cells, style="margin:4px 0 0;border:none")
    return f'<div style="{CARD_STYLE}"><b>{html.escape(title)}</b>{table}</div>'


def _rows(server: "ServerHandle") -> tuple[str, list[tuple[str, str, str]]]:
    """A title, and (name, what can be copied, what is said of it)."""
    rows = [("address", server.base_url, "")]
    if server.hub_url:
        rows.append(("hub", server.hub_url, "  through JupyterHub"))
    if server.api_key is None:
        rows.append(("key", "", "none is asked for: all programs on this machine may connect"))
    else:
        rows.append(("key", _KEY_PLACE, "  (or the panel, Server)"))
    more = "  (--client curl, anthropic, codex or llm)"
    rows.append(("client", f"{_CLIENTS} --show-key" if server.api_key else _CLIENTS, more))
    return f"{server.model} is served", rows
