"""Puts the magics into a shell and takes out every trace of them again."""

import atexit
import sys
from copy import deepcopy
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from IPython.core.extensions import ExtensionManager
from traitlets.config import Config

from engine.handover import free_logging
from engine.openai.http.ring_log import RingLog
from vm_magic.panel import close_panel
from vm_magic.shell.hints import Hints
from vm_magic.shell.hooks import (
    Matcher,
    add_empty_cells,
    add_formatters,
    keep_chat_questions,
    keep_questions,
    make_matcher,
    remove_empty_cells,
    remove_formatters,
)
from vm_magic.shell.magics import VLLMMetal
from vm_magic.shell.talk_cells import TalkCells
from vm_magic.state.cell_record import start_recording, stop_recording
from vm_magic.state.references import release_references
from vm_magic.state.settings_text import SETTABLE

_LOGGERS = ("engine", "vm_magic", "uvicorn")


@dataclass
class _Installed:
    """What one shell got from us."""

    shell: Any
    magics: VLLMMetal
    matcher: Matcher
    owned: frozenset[str]
    """The names beside ``%vllm_metal`` that were free, and are ours."""
    hints: Hints
    talk_cells: TalkCells
    logs: RingLog


_installed: list[_Installed] = []
_users_config: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""By shell, what its configuration files said of the magics: %config adds to the same place, until we are unloaded."""


def install(shell: Any) -> None:
    """Register magics and completion in ``shell``; ``%chat`` and ``%%chat`` only if those names are free."""
    if any(entry.shell is shell for entry in _installed):
        return
    logs = RingLog(_LOGGERS)
    logs.attach()
    magics = VLLMMetal(shell, logs)
    _configure(magics, shell)
    shell.register_magics(magics)
    add_formatters(shell)
    owned = _take_chat(magics, shell)
    matcher = make_matcher(owned)
    shell.Completer.custom_matchers.append(matcher)
    hints, talk_cells = Hints(shell, owned), TalkCells(shell)
    transformers = shell.input_transformer_manager
    transformers.line_transforms += [keep_questions, *([keep_chat_questions] if "%chat" in owned else [])]
    transformers.cleanup_transforms.insert(0, talk_cells)
    add_empty_cells(shell)
    shell.events.register("post_run_cell", hints.after_cell)
    shell.events.register("post_run_cell", _after_cell)
    start_recording(shell)
    _installed.append(_Installed(shell, magics, matcher, owned, hints, talk_cells, logs))
    atexit.register(_close_session)


def uninstall(shell: Any) -> None:
    """Undo :func:`install`, and free the model unless ``%reload_ext`` is under way. Safe twice."""
    entry = next((entry for entry in _installed if entry.shell is shell), None)
    if entry is None:
        return
    _installed.remove(entry)
    entry.logs.detach()
    stop_recording(shell)
    remove_empty_cells(shell)
    close_panel()
    _close_buttons()
    remove_formatters(shell)
    tables = shell.magics_manager.magics
    for kind in ("line", "cell"):
        tables[kind].pop("vllm_metal", None)
    for kind, ours in (("line", entry.magics.chat_line), ("cell", entry.magics.chat_cell)):
        if tables[kind].get("chat") == ours:
            del tables[kind]["chat"]
    shell.magics_manager.registry.pop(VLLMMetal.__name__, None)
    shell.configurables[:] = [c for c in shell.configurables if c is not entry.magics]
    matchers = shell.Completer.custom_matchers
    matchers[:] = [m for m in matchers if m is not entry.matcher]
    transformers = shell.input_transformer_manager
    for transforms in (transformers.line_transforms, transformers.cleanup_transforms):
        transforms[:] = [t for t in transforms if t not in (keep_questions, keep_chat_questions, entry.talk_cells)]
    shell.events.unregister("post_run_cell", entry.hints.after_cell)
    shell.events.unregister("post_run_cell", _after_cell)
    if not _reloading(sys._getframe()):
        _forget_config(shell)
        if _close_session():
            release_references(shell)
        atexit.unregister(_close_session)


def _after_cell(_result: Any) -> None:
    """■ may have fallen on the logging of this cell: the engine and the port log too, also while no cell runs."""
    free_logging()


def _take_chat(magics: VLLMMetal, shell: Any) -> frozenset[str]:
    """Put the magics ``%chat`` and ``%%chat`` where those names are free; says which."""
    tables = shell.magics_manager.magics
    ours = {"line": ("%chat", magics.chat_line), "cell": ("%%chat", magics.chat_cell)}
    taken = set()
    for kind, (name, magic) in ours.items():
        if "chat" not in tables[kind]:
            tables[kind]["chat"] = magic
            taken.add(name)
    return frozenset(taken)


def _configure(magics: VLLMMetal, shell: Any) -> None:
    """Give the magics what is configured; after a reload, the settings that the session kept hold instead."""
    name = VLLMMetal.__name__
    values = dict(shell.config[name]) if name in shell.config else {}
    if shell in _users_config:
        values = {name: value for name, value in values.items() if name not in SETTABLE}
    _users_config.setdefault(shell, deepcopy(values))
    magics.configure(values)


def _forget_config(shell: Any) -> None:
    """Take what %config set out of the shell's configuration; what its files say stays."""
    name = VLLMMetal.__name__
    shell.config.pop(name, None)
    values = _users_config.pop(shell, {})
    if values:
        shell.config[name] = Config(values)


def _close_buttons() -> None:
    """Take away the buttons below comparisons; ipywidgets is there only once there were some."""
    if "vm_magic.panel.choice_buttons" in sys.modules:
        from vm_magic.panel.choice_buttons import close_choices

        close_choices()


def _close_session() -> bool:
    """Free the model and forget the session. Says whether there was one: the first command makes it."""
    if "vm_magic.state.session" not in sys.modules:
        return False
    from vm_magic.state.session import close_session, peek_session

    existed = peek_session() is not None
    close_session()
    return existed


def _reloading(frame: FrameType | None) -> bool:
    """Whether ``%reload_ext`` called: IPython unloads and loads without saying which it is."""
    while frame is not None:
        if frame.f_code is ExtensionManager.reload_extension.__code__:
            return True
        frame = frame.f_back
    return False
