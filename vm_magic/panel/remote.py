"""The panel's sections that differ for a remote server: its requests and figures, its address."""

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from vm_magic.panel.activity import ActivitySection
from vm_magic.panel.pictures import throughput_svg
from vm_magic.panel.server import ClientsPart
from vm_magic.panel.snapshot import PanelSnapshot
from vm_magic.panel.speed import SERVER_DOES_NOT_TELL
from vm_magic.panel.style import faint
from vm_magic.remote.metrics import ServerState
from vm_magic.remote.watch import RemoteActivity
from vm_magic.state.clients import Endpoint

CLIENTS = ("openai", "curl")
"""What every OpenAI-compatible server answers."""
ASKING = "Asking the server …"
NO_REQUESTS = faint("No requests of this notebook running. Run a ") + "<code>%%chat</code>" + faint(" cell.")
MEMORY_NOTE = (
    "Memory is planned where the server runs and cannot be changed from here. After %vllm_metal connect --close, "
    "%vllm_metal export gives the vllm serve command of a model that was loaded and planned in this kernel."
)


_NOT_TOLD = f"<div>{faint(SERVER_DOES_NOT_TELL)}</div>"


class RemoteActivitySection(ActivitySection):
    """This notebook's requests at the server, and the server's figures for all of them."""

    wants_blocks = False
    columns = ("request", "state", "tokens", "speed", "first token")

    @property
    def figures(self) -> widgets.HTML:
        """The server's figures, in the place where a panel of this kernel draws the blocks."""
        return self.blocks

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Show the requests and the figures as they are."""
        self._source = snapshot.source
        activity = snapshot.server
        if activity is None:
            self._show_nothing()
            return
        self.palette.assign([request.request_id for request in activity.requests])
        self._show_requests(activity.requests, NO_REQUESTS)
        self.figures.value = f"<h4>The server, all clients</h4>{figures_html(activity)}"
        known = activity.state is not None and activity.state.generation_tokens is not None
        self.throughput.value = (
            f"<h4>Generated tokens per second, all clients</h4>{throughput_svg(activity)}{_NOT_TOLD}" if known else ""
        )


class RemoteServerSection(ClientsPart):
    """Where the server is. The key is sent to the front end only while it is asked for."""

    title = "Server"
    wants_blocks = False

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__(wake, CLIENTS)
        self._shown: Any = None
        self.widget = widgets.VBox(
            [
                self.show_key,
                self.address,
                self.client,
                self.snippet,
                widgets.HTML(f'<div style="margin-top:8px">{faint(MEMORY_NOTE)}</div>'),
            ]
        )

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Follow the connection."""
        remote = snapshot.remote
        state = (remote, self.show_key.value, self.client.value)
        if remote is None or state == self._shown:
            return
        self._shown = state
        self.show_key.layout.display = "none" if remote.address.key is None else ""
        self.show(Endpoint.of_remote(remote, show_key=self.show_key.value))


def remote_head_parts(activity: RemoteActivity) -> list[str]:
    """What the panel's first line says of the server beside its name and address."""
    own = f"{len(activity.requests)} of this notebook"
    state = activity.state
    return [own] if state is None else [*_requests(state), own]


def figures_html(activity: RemoteActivity) -> str:
    """The server's figures in a line, or why there are none."""
    state = activity.state
    if state is None or activity.problem:
        return f"<div>{faint(activity.problem or ASKING)}</div>"
    share, usage = state.prefix_hit_share, state.kv_cache_usage
    parts = [
        *_requests(state),
        *([] if usage is None else [f"{usage:.1%} of the KV cache used"]),
        *([] if share is None else [f"{share:.0%} of prompt tokens found in the prefix cache since it started"]),
    ]
    spans = "".join(f'<span class="vmp-num">{part}</span>' for part in parts)
    return f'<div class="vmp-legend" data-name="figures">{spans}</div>'


def _requests(state: ServerState) -> list[str]:
    named = ((state.num_running, "running"), (state.num_waiting, "waiting"))
    found = ", ".join(f"{number:,} {name}" for number, name in named if number is not None)
    return [found] if found else []
