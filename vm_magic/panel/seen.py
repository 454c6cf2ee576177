"""What the panel shows, gathered once per refresh away from the widgets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.activity import Activity, BlockMap
from engine.errors import EngineClosedError
from vm_magic.session import Session

if TYPE_CHECKING:
    from engine.llm import LLM

NO_MODEL = "no model is loaded; run %vllm_metal load smollm2 (or another model)"


@dataclass(frozen=True)
class Seen:
    """The session at one moment. ``blocks`` only where a section draws them."""

    session: Session
    llm: "LLM | None" = None
    activity: Activity | None = None
    blocks: BlockMap | None = None


class Section(Protocol):
    """A part of the panel. Its methods are called with the panel's lock held."""

    title: str
    widget: Any
    wants_blocks: bool

    def refresh(self, seen: Seen) -> None:
        """Show ``seen``; what did not change is not sent."""


def look(get_session: Callable[[], Session], *, with_blocks: bool) -> Seen:
    """A look at the session and its engine; waits for neither."""
    session = get_session()
    llm = session.loaded
    if llm is None:
        return Seen(session)
    try:
        return Seen(session, llm, llm.activity(), llm.block_map() if with_blocks else None)
    except EngineClosedError:
        return Seen(session)
