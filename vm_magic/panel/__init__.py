"""``%vllm_metal panel``: memory, sampling, activity and the port as widgets; of a remote server, what can be remote.

Imports ipywidgets only when opened.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vm_magic.panel.panel import Panel
    from vm_magic.state.session import Session

_open: "Panel | None" = None


def open_panel() -> "Panel":
    """The kernel's panel, made on first use; opened again it shows the same state."""
    global _open
    close_left_panel()
    if _open is None or _open.closed:
        from vm_magic.panel.panel import Panel
        from vm_magic.state.session import current_session

        _open = Panel(current_session)
    return _open


def close_panel() -> bool:
    """Close the panel: its widgets, its thread and everything that it observes. Says whether there was one."""
    global _open
    panel, _open = _open, None
    if panel is None or panel.closed:
        return False
    panel.close()
    return True


def close_left_panel() -> bool:
    """Close a panel of what the notebook left: of this kernel after ``connect``, of a server after ``--close``."""
    from vm_magic.state.session import current_session

    left = _open is not None and _open.remote != (current_session().remote is not None)
    return left and close_panel()


def panel_line(session: "Session") -> str:
    """What the panel would show, in one line: for a terminal, and wherever widgets cannot be drawn."""
    from vm_magic.show.tables import settings_text

    remote, llm, values = session.remote, session.loaded, settings_text(session.settings)
    if remote is not None:
        return f"panel: {remote.model} at {remote.base_url}; {values or 'the sampling values of the server'}"
    settings = values or "the model's own sampling values"
    if llm is None:
        return f"panel: no model is loaded; {settings}"
    plan = llm.plan
    port = session.server.base_url if session.server else "port closed"
    return (
        f"panel: {llm.args.names[0]}; memory_fraction={plan.fraction:.2f} max_model_len={plan.max_model_len} "
        f"max_num_seqs={plan.max_num_seqs}; {settings}; {port}"
    )
