"""The panel: sections over one lock, refreshed by a thread of its own while cells run."""

import html
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import ipywidgets as widgets

from engine.handover import BackgroundThread, Bell
from vm_magic.panel.activity import ActivitySection
from vm_magic.panel.memory import MemorySection
from vm_magic.panel.remote import RemoteActivitySection, RemoteServerSection, remote_head_parts
from vm_magic.panel.sampling import SamplingSection
from vm_magic.panel.server import ServerSection
from vm_magic.panel.snapshot import NO_MODEL, PanelSnapshot, Poller, Section
from vm_magic.panel.still import Still
from vm_magic.panel.style import ROOT_CLASS, SHEET, bad, faint
from vm_magic.show.terminal import publish
from vm_magic.state.session import Session

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 0.5
MOVED = "The notebook uses another model now. %vllm_metal panel opens the panel for it."


class Panel:
    """A view of the session that ``get_session`` gives: of this kernel's model, or, if the notebook is connected when
    the panel is made, of the remote server.

    The kernel's own loop stands still while a cell runs, so a thread of the panel's refreshes it, at most
    every :data:`REFRESH_SECONDS`; it looks at the engine through snapshots and sends only what changed.
    Front-end events come on the main thread or on a subshell's. One lock orders them all. Threads of
    the engine and of the port never come here.
    """

    def __init__(self, get_session: Callable[[], Session], *, refresh_seconds: float | None = REFRESH_SECONDS) -> None:
        self._poller = Poller(get_session)
        self.remote = get_session().remote is not None
        self._lock = threading.RLock()
        self._wake = Bell()
        self.closed = False
        self._still = Still()
        self.activity: ActivitySection = (RemoteActivitySection if self.remote else ActivitySection)(
            self._lock, self._wake.ring
        )
        self.sampling = SamplingSection(self._lock, self._wake.ring, remote=self.remote)
        self.sections: list[Section] = [self.activity, self.sampling]
        if self.remote:
            self.sections.append(RemoteServerSection(self._wake.ring))
        else:
            self.memory = MemorySection(self._lock, self._wake.ring)
            self.server = ServerSection(self._lock, self._wake.ring)
            self.sections += [self.memory, self.server]
        self.head = widgets.HTML()
        self.close_button = widgets.Button(
            icon="times", tooltip="close the panel", layout=widgets.Layout(width="32px", flex="0 0 auto")
        )
        self.tabs = widgets.Tab(children=[section.widget for section in self.sections])
        for index, section in enumerate(self.sections):
            self.tabs.set_title(index, section.title)
        self.tabs.selected_index = 0
        head = widgets.HBox([self.head, self.close_button], layout=widgets.Layout(justify_content="space-between"))
        sheet = widgets.HTML(SHEET + self._still.hiding_sheet, layout=widgets.Layout(display="none"))
        self.widget = widgets.VBox([sheet, head, self.tabs])
        self.widget.add_class(ROOT_CLASS)
        self.tabs.observe(lambda _: self._wake.ring(), "selected_index")
        self.close_button.on_click(lambda _: self.close())
        for widget in widgets_below(self.widget):
            answer_on_any_subshell(widget)
        self.refresh()
        self._thread: threading.Thread | None = None
        if refresh_seconds is not None:
            self._start(refresh_seconds)

    def show(self, shell: Any, line: str) -> None:
        """Display the panel, and the picture that stays of it; ``line`` is for what can show neither."""
        publish(shell, {**self.widget._repr_mimebundle_(), "text/plain": line})
        with self._lock:
            self._still.open(shell, self._poller.snapshot(with_blocks=True))

    def refresh(self) -> None:
        """Look at the session once and show what changed; requests and blocks only while they are in front.

        Controls are always up to date, so that a tab that comes to the front can be used at once.
        """
        front = self.sections[self.tabs.selected_index or 0]
        snapshot = self._poller.snapshot(with_blocks=front.wants_blocks)
        with self._lock:
            if self.closed:
                return
            self._still.refresh(snapshot)
            if (snapshot.remote is not None) != self.remote:
                self.head.value = faint(MOVED)
            else:
                self.head.value = head_html(snapshot)
                for section in self.sections:
                    if section is front or section is not self.activity:
                        section.refresh(snapshot)

    def close(self) -> None:
        """Take the widgets, their observers and the thread away. Safe to repeat."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._still.close()
            self._wake.ring()
            for widget in widgets_below(self.widget):
                widget.unobserve_all()
                widget.close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self, seconds: float) -> None:
        # With the context of the cell that opened the panel, its messages carry that cell's header.
        run = copy_context().run
        self._thread = BackgroundThread(run, "vm-panel", (self._run, seconds, self._wake.listen()))
        self._thread.start()

    def _run(self, seconds: float, awake: threading.Lock) -> None:
        pause = threading.Event()
        while True:
            self._wake.wait(awake, seconds)
            awake = self._wake.listen()
            if self.closed:
                return
            try:
                self._poller.poll()
                self.refresh()
            except Exception as error:
                # The thread ends here: it says so in the log and in the panel, which would otherwise just stand still.
                logger.exception("the panel stopped")
                with self._lock:
                    self.head.value = bad(f"The panel stopped ({error}). %vllm_metal logs says more.")
                return
            pause.wait(0.05)  # a moving slider wakes the thread often


def head_html(snapshot: PanelSnapshot) -> str:
    """The panel's first line: the model, requests, speed, blocks, port."""
    if snapshot.remote is not None and snapshot.server is not None:
        return _head(
            snapshot.remote.model, [html.escape(snapshot.remote.base_url), *remote_head_parts(snapshot.server)]
        )
    if snapshot.llm is None or snapshot.activity is None:
        return f'<div class="vmp-head"><b>vllm_metal</b>{faint(NO_MODEL)}</div>'
    activity = snapshot.activity
    rates = [request.tokens_per_second for request in activity.requests if request.state == "running"]
    speed = sum(rate for rate in rates if rate is not None)
    port = snapshot.session.server
    parts = [
        f"{activity.num_running:,} running, {activity.num_waiting:,} waiting",
        f"{speed:,.1f} tokens/s" if speed else "idle" if not activity.requests else "reading a prompt",
        f"{activity.stats.num_used_blocks:,} of {activity.stats.num_blocks:,} blocks used",
        f"port {port.port}" if port is not None else "port closed",
    ]
    return _head(snapshot.llm.args.names[0], parts)


def _head(name: str, parts: list[str]) -> str:
    spans = "".join(f'<span class="vmp-num">{part}</span>' for part in parts)
    return f'<div class="vmp-head"><b>{html.escape(name)}</b>{spans}</div>'


def widgets_below(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """``widget`` and all widgets in it, their layouts and styles included."""
    done: set[int] = set()
    left: list[Any] = [widget]
    while left:
        one = left.pop()
        if not isinstance(one, widgets.Widget) or id(one) in done:
            continue
        done.add(id(one))
        yield one
        left += [getattr(one, name) for name in one.keys if name in ("layout", "style")]
        left += getattr(one, "children", ())


def answer_on_any_subshell(widget: widgets.Widget) -> None:
    """Let events of ``widget`` arrive while a cell runs.

    ipykernel 7.4 answers a widget on the subshell that last wrote to it, which is the busy one;
    other versions have no such hook and are left alone.
    """
    comm = widget.comm
    if comm is not None and hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default
