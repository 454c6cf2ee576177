"""``status``: what is loaded or connected, and how it is doing."""

import argparse

from engine.format.text import count_text
from engine.memory.plan import room_words
from engine.params.sizes import plain_size
from engine.runner.kv.attention_path import describe
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.connect import context_text, version_text
from vm_magic.show.cards import StatusCard, speed_text
from vm_magic.show.server_view import port_text
from vm_magic.show.tables import settings_text
from vm_magic.state import session as sessions
from vm_magic.state.session import Session


class Status(LineCommand):
    """Shows the session as a card."""

    help = "what is loaded, its memory, the port, the last reply's speed"

    def execute(self, context: Context, parsed: argparse.Namespace) -> StatusCard:  # noqa: ARG002
        """The card of this kernel's model, or of the connection."""
        session = context.session
        return status_card(session) if session.remote is None else remote_card(session)


def status_card(session: Session) -> StatusCard:
    """What is loaded, its memory, the port and the last reply's speed."""
    llm = session.loaded
    settings = settings_text(session.settings)
    if llm is None:
        title = "no model is loaded; run %vllm_metal load smollm2 (or another model)"
        return StatusCard(title, ((("settings", settings),) if settings else ()) + _talk(session))
    stats = llm.stats()
    server = session.server
    last = session.last_reply
    used, total, cached = map(count_text, (stats.num_used_blocks, stats.num_blocks, stats.num_cached_blocks))
    blocks = f"{used} of {total} used, {cached} cached"
    in_use, planned, model = map(plain_size, (sessions.memory_in_use(), llm.plan.usable, llm.plan.model_memory))
    rows = (
        ("memory", f"{in_use} in use of {planned} planned (model {model}); {room_words(llm.plan)}"),
        ("other programs", sessions.others_line(llm.plan.usable) or ""),
        ("KV blocks", blocks),
        ("attention", describe(llm.attention_paths)),
        ("context", f"{count_text(llm.plan.max_model_len)} tokens"),
        ("requests", f"{stats.num_running} running, {stats.num_waiting} waiting"),
        ("settings", settings or "the model's own"),
        *_talk(session),
        ("port", port_text(server) if server else "closed; %vllm_metal serve opens it"),
        ("last reply", speed_text(last) if last else "none yet"),
    )
    fields = tuple(row for row in rows if row[1])
    return StatusCard(llm.args.names[0], fields, stats.kv_cache_usage, _snippets(session), llm.plan.log_line())


def _talk(session: Session) -> tuple[tuple[str, str], ...]:
    return () if session.talk is None else (("talk", str(session.talk)),)


def _snippets(session: Session) -> tuple[tuple[str, str], ...]:
    server = session.server
    if server is None:
        return ()
    from vm_magic.state.clients import Endpoint, snippets

    return tuple((name, f"{code.text}{code.note}") for name, code in snippets(Endpoint.of(server)).items())


def remote_card(session: Session) -> StatusCard:
    """The connection, what the server says of itself, and the last reply's speed."""
    remote = session.remote_llm()
    state, last = remote.state(), session.last_reply
    running = None if state.num_running is None else f"{state.num_running} running, {state.num_waiting or 0} waiting"
    local = session.loaded
    fields = (
        ("server", ", ".join(filter(None, [remote.base_url, version_text(remote)]))),
        ("key", f"from {remote.address.key_source}" if remote.address.key else "none"),
        ("context", context_text(remote)),
        ("requests", running or ""),
        ("KV blocks", "" if state.kv_cache_usage is None else f"{state.kv_cache_usage:.1%} used"),
        ("settings", settings_text(session.settings) or "the server's own"),
        *_talk(session),
        ("this kernel", f"{local.args.names[0]} stays loaded" if local is not None else ""),
        ("last reply", speed_text(last) if last else "none yet"),
    )
    return StatusCard(f"{remote.model} (remote)", tuple(field for field in fields if field[1]), state.kv_cache_usage)
