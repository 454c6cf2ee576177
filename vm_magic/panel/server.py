"""The panel's server section: open and close the port, where it is, the key when asked, what clients need."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ipywidgets as widgets

from engine.errors import VMMagicError
from vm_magic.panel.copying import copied_block, copied_code
from vm_magic.panel.snapshot import NO_MODEL, PanelSnapshot
from vm_magic.panel.style import bad, faint
from vm_magic.state.clients import CLIENTS, KEY_VARIABLE, Endpoint, snippets
from vm_magic.state.session import Session

IN_PYTHON = "in Python it is vm_magic.current().server.api_key"
CLOSED = "The port is closed. Start opens it for other programs on this machine."


class ClientsPart:
    """An address, its key while it is to be shown, and what clients need to connect there."""

    def __init__(self, redraw: Callable[[], None], clients: Sequence[str]) -> None:
        self.show_key = widgets.ToggleButton(description="Show key", icon="eye", layout=widgets.Layout(width="120px"))
        self.address = widgets.HTML()
        self.client = widgets.Dropdown(
            options=list(clients), description="client", layout=widgets.Layout(width="220px")
        )
        self.client.style.description_width = "50px"
        self.snippet = widgets.HTML(layout=widgets.Layout(max_width="940px"))
        for widget in (self.show_key, self.client):
            widget.observe(lambda _: redraw(), "value")

    def show(self, port: Endpoint, proxied: str | None = None) -> None:
        """Show where ``port`` is (``proxied``: through the hub) and the chosen client's snippet."""
        self.address.value = address_html(port, proxied)
        code = snippets(port)[self.client.value]
        by_key = f"Set {KEY_VARIABLE} to the key. Show key shows it here, and puts it into this text."
        note = f"<div>{faint(by_key if code.note == port.note() else code.note)}</div>" if code.note else ""
        self.snippet.value = copied_block(code.text.rstrip(), f"the {self.client.value} text") + note


class ServerSection(ClientsPart):
    """The port. The key is sent to the front end only while it is asked for."""

    title = "Server"
    wants_blocks = False

    def __init__(self, lock: AbstractContextManager[Any], wake: Callable[[], None]) -> None:
        super().__init__(wake, tuple(CLIENTS))
        self._lock = lock
        self._wake = wake
        self._session: Session | None = None
        self._shown: Any = None
        self.start = widgets.Button(description="Start", button_style="primary", layout=widgets.Layout(width="90px"))
        self.stop = widgets.Button(description="Stop", layout=widgets.Layout(width="90px"))
        self.message = widgets.HTML()
        buttons = [self.start, self.stop, self.show_key, self.message]
        self.widget = widgets.VBox(
            [
                widgets.HBox(buttons, layout=widgets.Layout(align_items="center", flex_flow="row wrap")),
                self.address,
                self.client,
                self.snippet,
            ]
        )
        self.start.on_click(self._start)
        self.stop.on_click(self._stop)

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Follow the port, whoever opened or closed it."""
        self._session = snapshot.session
        server = snapshot.session.server if _is_open(snapshot) else None
        state = (snapshot.llm is None, server, self.show_key.value, self.client.value)
        if state == self._shown:
            return
        self._shown = state
        self.start.disabled = snapshot.llm is None or server is not None
        self.stop.disabled = self.show_key.disabled = self.client.disabled = server is None
        if server is None:
            self.show_key.value = False
            self.address.value = faint(NO_MODEL if snapshot.llm is None else CLOSED)
            self.snippet.value = ""
            return
        self.show(Endpoint.of(server, show_key=self.show_key.value), server.hub_url)

    def _start(self, _: Any) -> None:
        self._act(lambda session: session.serve({}))

    def _stop(self, _: Any) -> None:
        self._act(lambda session: session.stop())

    def _act(self, action: Callable[[Session], Any]) -> None:
        with self._lock:
            session = self._session
            self.start.disabled = self.stop.disabled = True
            self._shown = None
        if session is not None:
            message = ""
            try:
                action(session)
            except (VMMagicError, OSError) as error:
                message = bad(str(error))
            with self._lock:
                self.message.value = message
        self._wake()


def _is_open(snapshot: PanelSnapshot) -> bool:
    server = None if snapshot.llm is None else snapshot.llm.server
    return snapshot.session.server is not None and server is not None and server.running


def address_html(port: Endpoint, proxied: str | None = None) -> str:
    """Where clients connect: the address, the hub's one where there is a hub, and the key or that there is one."""
    rows = [("base_url", port.base_url), ("model", port.model)]
    if proxied is not None:
        rows.insert(1, ("through the hub", proxied))
    rows.append(("api_key", (port.api_key or "•" * 12) if port.needs_key else "none is needed"))
    cells = "".join(
        f'<span class="vmp-faint">{name}</span>'
        + copied_code(value, name, copies=name != "api_key" or port.api_key is not None)
        for name, value in rows
    )
    grid = f'<div style="display:grid;grid-template-columns:max-content 1fr;gap:3px 14px;margin:6px 0">{cells}</div>'
    where = IN_PYTHON if port.key_place == Endpoint.key_place else f"it is {port.key_place}"
    notes = []
    if port.needs_key and port.api_key is None:
        notes.append(f"Show key shows the key; {where}.")
    if port.needs_key and proxied is not None:
        notes.append("Through the hub the key goes into the header x-api-key, and the hub's token into Authorization.")
    return grid + "".join(f"<div>{faint(note)}</div>" for note in notes)
