"""What the notebook's latest cells put out: kept in this process for ``%%chat --cells``, and sent only by that.

ipykernel keeps no stream output, and IPython 8 no displays. So while a cell runs, what it writes and displays is noted
on its way, in bounded room; between cells nothing is in the way.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

MAX_CELLS = 50
"""Cells whose output is kept, the latest ones."""
MAX_TEXT = 6000
"""Characters kept of one output: its first third and its end."""
MAX_OUTPUTS = 20
"""Outputs kept of a cell; streams that follow each other are one."""
_PLAIN, _MARKDOWN = "text/plain", "text/markdown"


class OutputText:
    """A growing text of which the first third and the end are kept, at most :data:`MAX_TEXT` characters."""

    def __init__(self) -> None:
        self._head, self._tail, self._dropped = "", "", 0

    def add(self, text: str) -> None:
        """Add ``text``."""
        room = MAX_TEXT // 3 - len(self._head)
        if room > 0 and not self._tail:
            self._head, text = self._head + text[:room], text[room:]
        self._tail += text
        if len(self._tail) > MAX_TEXT:  # cut in large steps, so that a line at a time costs little
            extra = len(self._tail) - MAX_TEXT * 2 // 3
            self._tail, self._dropped = self._tail[extra:], self._dropped + extra

    def text(self) -> str:
        """What is kept, and how much is not."""
        tail = self._tail[-(MAX_TEXT - len(self._head)) :]
        dropped = self._dropped + len(self._tail) - len(tail)
        if not dropped:
            return self._head + tail
        return f"{self._head}\n… ({dropped:,} characters left out) …\n{tail}"


@dataclass
class CellOutput:
    """One output of a cell. ``kind`` is stdout, stderr, display or error; ``display_id`` is for updates."""

    kind: str
    content: OutputText = field(default_factory=OutputText)
    display_id: str | None = None

    @property
    def text(self) -> str:
        """Its text."""
        return self.content.text()


@dataclass
class CellRecord:
    """The outputs of one run of a cell.

    ``muted`` counts what is at work whose outputs are not noted, or not twice: a display, a magic of ours.
    ``in_result`` while IPython writes what the cell ended with.
    """

    outputs: list[CellOutput] = field(default_factory=list)
    num_dropped: int = 0
    clear_next: bool = False
    muted: int = 0
    in_result: bool = False

    def write(self, kind: str, text: str) -> None:
        """Add to a stream."""
        if self.muted or self.in_result:
            return
        self._clear_if_due()
        if not (self.outputs and self.outputs[-1].kind == kind):
            self._append(CellOutput(kind))
        if self.outputs[-1].kind == kind:
            self.outputs[-1].content.add(text)

    def display(self, kind: str, text: str, display_id: str | None = None) -> None:
        """Add an output that stands by itself."""
        if self.muted and kind != "error":
            return
        self._clear_if_due()
        made = CellOutput(kind, display_id=display_id)
        made.content.add(text)
        self._append(made)

    def replace(self, display_id: str | None, text: str) -> None:
        """Show ``text`` where ``display_id`` is."""
        for output in self.outputs:
            if output.display_id is not None and output.display_id == display_id:
                output.content = OutputText()
                output.content.add(text)

    def clear(self, wait: bool) -> None:
        """``clear_output``."""
        self.clear_next = wait
        if not wait:
            self.outputs.clear()

    def _clear_if_due(self) -> None:
        if self.clear_next:
            self.clear(wait=False)

    def _append(self, output: CellOutput) -> None:
        if len(self.outputs) < MAX_OUTPUTS:
            self.outputs.append(output)
        else:
            self.num_dropped += 1


@dataclass
class _Running:
    """A cell under way: what is noted of it, and what to call when it ends."""

    info: Any
    record: CellRecord
    undo: list[Callable[[], None]] = field(default_factory=list)


class CellRecorder:
    """Notes the outputs of a shell's cells from :meth:`install` to :meth:`uninstall`."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._records: dict[int, CellRecord] = {}
        self._running: list[_Running] = []
        self.last_error: str | None = None
        """The latest cell's error as text, with the code around it; its frames are not kept."""

    def install(self) -> None:
        """Listen to the shell's cells."""
        self._shell.events.register("pre_run_cell", self._begin)
        self._shell.events.register("post_run_cell", self._end)

    def uninstall(self) -> None:
        """Stop listening, forget everything."""
        for event, callback in (("pre_run_cell", self._begin), ("post_run_cell", self._end)):
            if callback in self._shell.events.callbacks[event]:
                self._shell.events.unregister(event, callback)
        while self._running:
            self._leave()
        self._records.clear()
        self.last_error = None

    def record(self, number: int) -> CellRecord | None:
        """What cell ``number`` put out, if it was noted."""
        return self._records.get(number)

    @property
    def running(self) -> bool:
        """Whether a cell runs now; its input is the latest in the history."""
        return bool(self._running)

    def unnoted(self) -> AbstractContextManager[None]:
        """While a magic of ours is at work: its line is not sent, so neither is what it puts out."""
        return _muted([running.record for running in self._running])

    def _begin(self, info: Any) -> None:
        if not getattr(info, "store_history", False):
            return
        running = _Running(info, CellRecord())
        for name in ("stdout", "stderr"):
            _note_writes(getattr(sys, name), name, running)
        _mute_tracebacks(self._shell, running)
        _note_displays(self._shell.display_pub, running)
        _mute_results(self._shell.displayhook, running)
        self._running.append(running)

    def _end(self, result: Any) -> None:
        ended = self._ended(None if result is None else result.info)
        if ended is None:
            return
        while self._running[-1] is not ended:
            self._leave()
        record = self._leave()
        if result.execution_count is not None:
            self._records.pop(result.execution_count, None)
            self._records[result.execution_count] = record
            while len(self._records) > MAX_CELLS:
                del self._records[next(iter(self._records))]
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            self._note_error(error, record)

    def _ended(self, info: Any) -> _Running | None:
        """The cell that ``info`` is of; of an error that IPython cannot print, it makes another ``info``."""
        for running in reversed(self._running):
            if running.info is info:
                return running
        last = self._running[-1] if self._running else None
        return last if last is not None and info is not None and last.info.raw_cell == info.raw_cell else None

    def _leave(self) -> CellRecord:
        running = self._running.pop()
        for undo in reversed(running.undo):
            undo()
        return running.record

    def _note_error(self, error: BaseException, record: CellRecord) -> None:
        try:
            from vm_magic.state.error_text import error_line, error_text, is_ours

            if not is_ours(error):
                self.last_error = error_text(error, self._shell)
            record.display("error", error_line(error))
        except Exception:  # noqa: BLE001 - the cell has shown its own error; one of ours would hide that
            record.display("error", type(error).__name__)


def _note_writes(stream: Any, name: str, running: _Running) -> None:
    """Note what ``stream`` is written while the cell runs. ``%%capture`` and redirections replace it: not noted."""
    original = getattr(stream, "write", None)
    record = running.record

    def write(text: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(text, *args, **kwargs)  # type: ignore[misc]
        if isinstance(text, str) and text:
            record.write(name, text)
        return result

    if original is not None:
        _replace(stream, "write", write, running.undo)


def _mute_tracebacks(shell: Any, running: _Running) -> None:
    """Leave out what a terminal prints of an error: it is noted as one."""
    show = shell._showtraceback

    def muted(*args: Any, **kwargs: Any) -> Any:
        with _muted([running.record]):
            return show(*args, **kwargs)

    _replace(shell, "_showtraceback", muted, running.undo)


def _note_displays(publisher: Any, running: _Running) -> None:
    """Note what is displayed and cleared while the cell runs."""
    publish, clear, record = publisher.publish, publisher.clear_output, running.record

    def noted_publish(data: Any, *args: Any, **kwargs: Any) -> Any:
        display_id = (kwargs.get("transient") or {}).get("display_id")
        if isinstance(data, dict) and kwargs.get("update"):
            record.replace(display_id, bundle_text(data))
        elif isinstance(data, dict):
            record.display("display", bundle_text(data), display_id)
        with _muted([record]):  # a terminal prints it
            return publish(data, *args, **kwargs)

    def noted_clear(wait: bool = False) -> Any:
        record.clear(wait)
        return clear(wait)

    _replace(publisher, "publish", noted_publish, running.undo)
    _replace(publisher, "clear_output", noted_clear, running.undo)


def _mute_results(displayhook: Any, running: _Running) -> None:
    """Leave out a cell's result where a terminal prints it: the history has it."""
    record = running.record

    def muting(method: Callable[[], Any], after: bool) -> Callable[[], Any]:
        def call() -> Any:
            record.in_result = True
            result = method()
            record.in_result = after
            return result

        return call

    for name, after in (("start_displayhook", True), ("finish_displayhook", False)):
        _replace(displayhook, name, muting(getattr(displayhook, name), after), running.undo)


@contextmanager
def _muted(records: list[CellRecord]) -> Iterator[None]:
    """Note nothing in ``records`` meanwhile."""
    for record in records:
        record.muted += 1
    try:
        yield
    finally:
        for record in records:
            record.muted -= 1


def _replace(target: Any, name: str, new: Any, undo: list[Callable[[], None]]) -> None:
    """Put ``new`` over the method ``name`` of one object; ``undo`` takes it away if it is still there."""
    own = getattr(target, "__dict__", {})
    before, had = own.get(name), name in own
    try:
        setattr(target, name, new)
    except (AttributeError, TypeError):  # a stream of another kind: its output is not noted
        return

    def restore() -> None:
        if target.__dict__.get(name) is not new:
            return
        if had:
            setattr(target, name, before)
        else:
            delattr(target, name)

    undo.append(restore)


def bundle_text(data: dict[str, Any]) -> str:
    """The text of a display; of pictures and pages a note of what they are."""
    plain = str(data.get(_PLAIN, ""))
    picture = next((mime for mime in data if mime.startswith("image/")), None)
    if picture is not None:
        return f"(a picture, {picture}{f': {plain[:200]}' if plain else ''})"
    if "application/vnd.jupyter.widget-view+json" in data:
        return f"(a widget: {plain[:200]})"
    if data.get(_MARKDOWN):
        return str(data[_MARKDOWN])
    if plain and not (plain.startswith("<") and plain.endswith(" object>")):
        return plain
    if "text/html" in data:
        return f"(a page of HTML, {len(data['text/html']):,} characters)"
    latex = data.get("text/latex")
    return str(latex) if latex else plain or f"(an output of type {', '.join(data) or 'unknown'})"


_recorders: WeakKeyDictionary[Any, CellRecorder] = WeakKeyDictionary()


def start_recording(shell: Any) -> None:
    """Note the outputs of ``shell``'s cells from now on."""
    _recorders[shell] = CellRecorder(shell)
    _recorders[shell].install()


def stop_recording(shell: Any) -> None:
    """Undo :func:`start_recording`; what was noted is forgotten."""
    recorder = _recorders.pop(shell, None)
    if recorder is not None:
        recorder.uninstall()


def recorder_of(shell: Any) -> CellRecorder | None:
    """The recorder of ``shell``, while the extension is loaded there."""
    return _recorders.get(shell)


def unnoted(shell: Any) -> AbstractContextManager[None]:
    """:meth:`CellRecorder.unnoted` of the shell's recorder, if it has one."""
    recorder = _recorders.get(shell)
    return nullcontext() if recorder is None else recorder.unnoted()
