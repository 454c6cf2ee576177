"""What the magics show of a connection: its card, its models, and what it cannot do."""

from typing import TYPE_CHECKING

from engine.errors import UnsupportedOptionError
from vm_magic.commands.cards import StatusCard, metrics_table, speed_text
from vm_magic.show.tables import Table, settings_text

if TYPE_CHECKING:
    from vm_magic.remote.llm import RemoteLLM
    from vm_magic.state.session import Session

GO_BACK = "%vllm_metal connect --close goes back to this kernel"
LOCAL_ONLY = {
    "load": "loads into this kernel",
    "serve": "opens a port of this kernel",
    "plan": "without a MODEL is about the model in this kernel (%vllm_metal plan MODEL works here too)",
    "explain": "looks into the engine of this kernel",
    "score": "needs the engine of this kernel",
    "bench": "measures the model in this kernel (vllm bench serve measures a server)",
}
"""Commands that need the engine of this kernel, and why. (``export`` and ``llm`` stay about a model loaded here.)"""


def refuse_remote(session: "Session", command: str, words: str) -> None:
    """Raise UnsupportedOptionError for a ``command`` that cannot be remote, while the session is connected."""
    helps = {"-h", "--help"} & set(words.split())
    if session.remote is None or command not in LOCAL_ONLY or helps or (command == "plan" and words.strip()):
        return
    where = session.remote.base_url
    raise UnsupportedOptionError(
        f"%vllm_metal {command} {LOCAL_ONLY[command]}, and the notebook is connected to {where}; {GO_BACK}",
        flag=command,
    )


def connected_text(session: "Session") -> str:
    """What a connection is, in one or two lines."""
    remote = session.remote
    if remote is None:
        return "not connected; %vllm_metal connect http://HOST:PORT goes to a server"
    key = f"key from {remote.address.key_source}" if remote.address.key else "no key"
    facts = [_context(remote), _version(remote), key]
    lines = [f"connected to {remote.base_url}: {remote.model} ({', '.join(filter(None, facts))})"]
    if session.loaded is not None:
        lines.append(f"{session.loaded.args.names[0]} stays loaded beside it; {GO_BACK}")
    return "\n".join(lines)


def remote_card(session: "Session") -> StatusCard:
    """The connection, what the server says of itself, and the last reply's speed."""
    remote = session.remote_llm()
    state, last = remote.state(), session.last_reply
    running = None if state.num_running is None else f"{state.num_running} running, {state.num_waiting or 0} waiting"
    local = session.loaded
    fields = (
        ("server", ", ".join(filter(None, [remote.base_url, _version(remote)]))),
        ("key", f"from {remote.address.key_source}" if remote.address.key else "none"),
        ("context", _context(remote)),
        ("requests", running or ""),
        ("KV blocks", "" if state.kv_cache_usage is None else f"{state.kv_cache_usage:.1%} used"),
        ("settings", settings_text(session.settings) or "the server's own"),
        ("this kernel", f"{local.args.names[0]} stays loaded" if local is not None else ""),
        ("last reply", speed_text(last) if last else "none yet"),
    )
    return StatusCard(f"{remote.model} (remote)", tuple(field for field in fields if field[1]), state.kv_cache_usage)


def remote_models(remote: "RemoteLLM") -> Table:
    """What the server serves."""
    rows = tuple(
        (one.name, str(one.max_model_len or ""), one.parent or "", "connected" if one.name == remote.model else "")
        for one in remote.models()
    )
    return Table(("model", "context", "adapter of", ""), rows, f"served at {remote.base_url}")


def remote_metrics(remote: "RemoteLLM") -> Table:
    """The server's Prometheus metrics."""
    from vm_magic.remote.metrics import RemoteMetrics

    return metrics_table(RemoteMetrics(remote.metrics_text()))


def _context(remote: "RemoteLLM") -> str:
    return f"{remote.served.max_model_len} tokens" if remote.served.max_model_len else ""


def _version(remote: "RemoteLLM") -> str:
    version = remote.version()
    return f"version {version}" if version else ""
