"""What the panel shows, gathered once per refresh away from the widgets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import EngineClosedError
from engine.params.sampling_defaults import SamplingDefaults
from engine.runtime.activity import Activity, BlockMap
from vm_magic.remote.watch import RemoteActivity, ServerWatch
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from engine.llm import LLM
    from vm_magic.remote.llm import RemoteLLM

NO_MODEL = "No model is loaded. Run %vllm_metal load smollm2, or load another model."


class Source(Protocol):
    """What the sections need of this kernel's engine and of a remote server alike."""

    @property
    def defaults(self) -> SamplingDefaults:
        """Where sampling values come from."""

    def abort(self, request_id: str) -> None:
        """End a request."""


@dataclass(frozen=True)
class PanelSnapshot:
    """The session at one moment. ``blocks`` only where a section draws them.

    While it is connected, ``remote`` and ``server`` say what is there, and ``llm`` and ``activity`` are None.
    """

    session: Session
    llm: "LLM | None" = None
    activity: Activity | None = None
    blocks: BlockMap | None = None
    remote: "RemoteLLM | None" = None
    server: RemoteActivity | None = None

    @property
    def source(self) -> Source | None:
        """What the panel controls."""
        return self.llm if self.remote is None else self.remote


class Section(Protocol):
    """A part of the panel. Its methods are called with the panel's lock held."""

    title: str
    widget: Any
    wants_blocks: bool

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Show ``snapshot``; what did not change is not sent."""


class Poller:
    """Takes snapshots of the session and of what the panel controls; waits for neither."""

    def __init__(self, get_session: Callable[[], Session]) -> None:
        self._get_session = get_session
        self._watch: ServerWatch | None = None

    def poll(self) -> None:
        """Ask a remote server for its figures, when it is time. Called by one thread, and not the kernel's main one."""
        remote = self._get_session().remote
        if remote is not None:
            self._watched(remote).poll()

    def snapshot(self, *, with_blocks: bool) -> PanelSnapshot:
        """The session as it is now."""
        session = self._get_session()
        remote = session.remote
        if remote is not None:
            return PanelSnapshot(session, remote=remote, server=self._watched(remote).look())
        llm = session.loaded
        if llm is None:
            return PanelSnapshot(session)
        try:
            return PanelSnapshot(session, llm, llm.activity(), llm.block_map() if with_blocks else None)
        except EngineClosedError:
            return PanelSnapshot(session)

    def _watched(self, remote: "RemoteLLM") -> ServerWatch:
        if self._watch is None or self._watch.remote is not remote:
            self._watch = ServerWatch(remote)
        return self._watch
