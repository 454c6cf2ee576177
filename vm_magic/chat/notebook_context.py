"""What ``%%chat --cells`` and ``--error`` send of the notebook: as Markdown before the question, in bounded length."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from vm_magic.remote.address import KEY_VARIABLES
from vm_magic.show.safe_markdown import fenced
from vm_magic.state.cell_record import CellOutput, bundle_text, recorder_of
from vm_magic.state.context_flags import CellChoice
from vm_magic.state.error_text import error_text, is_ours, without_magic
from vm_magic.state.session import Session
from vm_magic.summaries.text import bounded

WHY = "Why did this fail, and how can it be mended?"
"""The question of ``--error`` where there is none."""
MAX_CONTEXT = 24_000
"""Most characters that are sent along; fewer where the model's context is shorter: a third of it, about."""
_LEAST_CONTEXT = 2000
_UNKNOWN_LENGTH = 8192
"""The context of a server's model that does not tell it."""
_LONGEST_CODE = 4000
_LONGEST_OUTPUT = 2500
_UNKNOWN = "(not known: the cell ran before vm_magic was loaded, or too long ago)"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_OUR_CELL = re.compile(r"\s*%%(?:chat|vllm_metal)\b")
_OUR_CALL = re.compile(r"\s*get_ipython\(\)\.run_cell_magic\((['\"])(?:chat|vllm_metal)\1")
_OUR_LINE = re.compile(
    r"\s*(?:[\w.\[\], ]+=\s*)?(?:%+\w+\s.*?)?[%!]*%(?:vllm_metal|chat)\b"
    r"|.*(?:\b|_)magic\(\s*['\"](?:vllm_metal|chat)\b"
    r"|\s*%(?:load|reload|unload)_ext\s+vm_magic\b"
    r"|\s*%config\s+VLLMMetal\b"
)
_KEY_FLAG = re.compile(r"(--api[-_]key(?:\s+|=))(\"[^\"\n]*\"|'[^'\n]*'|[^\s'\")]+)")
_HIDDEN = "•••"
_SHORTEST_KEY = 6
"""Characters: a shorter one is no secret, and would be found in many words."""


@dataclass(frozen=True)
class NotebookContext:
    """What goes before a question. ``names`` say what it is: ``In [3]``, ``the last error``."""

    names: tuple[str, ...]
    text: str

    def before(self, question: str) -> str:
        """The whole message."""
        return f"{self.text}\n\n### Question\n\n{question}"


@dataclass(frozen=True)
class _Cell:
    """A cell that ran; ``result`` is what it ended with, if anything."""

    number: int
    code: str
    outputs: tuple[CellOutput, ...] = ()
    result: str = ""
    num_dropped: int = 0

    def markdown(self, longest: int) -> str:
        """Heading, code, outputs, in about ``longest`` characters."""
        code = bounded(self.code, min(_LONGEST_CODE, longest))
        parts = [f"### In [{self.number}]", fenced(code, "python")]
        texts = [*(f"{_KINDS.get(one.kind, '')}{_clean(one.text)}" for one in self.outputs), self.result]
        if self.num_dropped:
            texts.append(f"… {self.num_dropped:,} more outputs")
        output = "\n".join(text.rstrip("\n") for text in texts if text.strip())
        if output:
            room = min(_LONGEST_OUTPUT, max(longest - len(code), 200))
            parts += ["Output:", fenced(_middle_cut(output, room))]
        return "\n\n".join(parts)


_KINDS = {"stderr": "(stderr) ", "error": "(error) "}


def notebook_context(shell: Any, session: Session, cells: CellChoice | None, error: bool) -> NotebookContext | None:
    """What the flags ask for; None if nothing. Raises RequestError where there is nothing to send."""
    if cells is None and not error:
        return None
    limit = context_limit(session)
    parts, names = [], []
    failed = _last_error(shell) if error else ""
    if failed:
        failed = bounded(failed, limit)
        limit = max(limit - len(failed), _LEAST_CONTEXT // 2)
    if cells is not None:
        shown = _cells_text(_chosen(shell, cells), limit)
        names += _names([number for number, _ in shown])
        parts += ["These are cells of a notebook, with what they put out.", *(text for _, text in shown)]
    if failed:
        names.append("the last error")
        parts += ["### The last error", fenced(failed)]
    return NotebookContext(tuple(names), without_keys("\n\n".join(parts), session))


def without_keys(text: str, session: Session) -> str:
    """``text`` with neither the keys that are in use here nor what ``--api-key`` was given."""
    server, remote = session.server, session.remote
    keys = [
        None if server is None else server.api_key,
        None if remote is None else remote.address.key,
        *(os.environ.get(name, "").strip() for name in KEY_VARIABLES),
    ]
    for key in keys:
        text = text.replace(key, _HIDDEN) if key and len(key) >= _SHORTEST_KEY else text
    return _KEY_FLAG.sub(rf"\g<1>{_HIDDEN}", text)


def context_limit(session: Session) -> int:
    """Characters that may go along: about a third of the model's context."""
    if session.remote is not None:
        length = session.remote.served.max_model_len or _UNKNOWN_LENGTH
    else:
        length = session.require().plan.max_model_len
    return max(min(length, MAX_CONTEXT), _LEAST_CONTEXT)


def _last_error(shell: Any) -> str:
    recorder = recorder_of(shell)
    if recorder is not None and recorder.last_error is not None:
        return recorder.last_error
    earlier = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # of before the extension was loaded
    if earlier is None or is_ours(earlier):
        raise RequestError("--error: no cell has failed yet", param="error")
    return error_text(earlier, shell)


def _chosen(shell: Any, choice: CellChoice) -> list[_Cell]:
    """The cells in the order in which they ran; of one that ran again unchanged the last run."""
    found: list[_Cell] = []
    seen: set[str] = set()
    for cell in _ran(shell):
        if choice.numbers and cell.number not in choice.numbers:
            continue
        if not choice.numbers and cell.code in seen:
            continue
        seen.add(cell.code)
        found.append(cell)
        if len(found) == choice.last:
            break
    if not found:
        none = f"--cells {choice.text}: no such cell has run (those of vm_magic are left out)"
        raise RequestError(none, param="cells")
    return found[::-1]


def _ran(shell: Any) -> Iterator[_Cell]:
    """Cells that ran before this one, the latest first, without ours."""
    history, recorder = shell.history_manager, recorder_of(shell)
    latest = len(history.input_hist_raw) - 1
    if recorder is not None and recorder.running:
        latest -= 1
    for number in range(latest, 0, -1):
        code = own_code(history.input_hist_raw[number], history.input_hist_parsed[number])
        if not code:
            continue
        record = None if recorder is None else recorder.record(number)
        result = _result(history, number)
        if record is None:
            yield _Cell(number, code, result=result or _UNKNOWN)
        else:
            yield _Cell(number, code, tuple(record.outputs), result, record.num_dropped)


def own_code(raw: str, parsed: str) -> str:
    """A cell's text without the lines of our magics: they may hold a key, and nobody asks about them."""
    if _OUR_CELL.match(raw) or _OUR_CALL.match(parsed):
        return ""
    kept: list[str] = []
    continued = False
    for line in raw.split("\n"):
        if _OUR_CELL.match(line):  # below %%time say: all that follows is its body
            break
        ours = continued or bool(_OUR_LINE.match(line))
        continued = ours and line.rstrip().endswith("\\")
        if not ours:
            kept.append(line)
    return "\n".join(kept).strip("\n")


def _result(history: Any, number: int) -> str:
    """What a cell ended with; IPython 9 keeps its rich forms too, which tell a picture from a text."""
    for output in getattr(history, "outputs", {}).get(number, ()):
        if output.output_type == "execute_result":
            return _clean(bundle_text(output.bundle))
    return _clean(history.output_hist_reprs.get(number, ""))


def _cells_text(cells: Sequence[_Cell], limit: int) -> list[tuple[int, str]]:
    """Number and text of each; where they are too long, the latest cells are what is sent."""
    shown: list[tuple[int, str]] = []
    left = limit
    for cell in reversed(cells):
        if left < 300 and shown:
            break
        text = cell.markdown(left)
        shown.append((cell.number, text))
        left -= len(text)
    missing = len(cells) - len(shown)
    shown.reverse()
    if missing:
        number, text = shown[0]
        shown[0] = (number, f"({missing} earlier cells are left out: they would not fit.)\n\n{text}")
    return shown


def _names(numbers: Sequence[int]) -> list[str]:
    """``In [3]``, ``In [5]``; of three and more in a row the first and the last: ``In [3] – In [5]``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        name
        for run in runs
        for name in ([f"In [{one}]" for one in run] if len(run) < 3 else [f"In [{run[0]}] – In [{run[-1]}]"])
    ]


def _clean(text: str) -> str:
    """Without colours and what our magics were told, and with lines that were written over as they were last."""
    lines = _ANSI.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(without_magic(line.rstrip("\r").rpartition("\r")[2]) for line in lines)


def _middle_cut(text: str, longest: int) -> str:
    """The first third and the end of a text that is too long: an output's end tells most."""
    if len(text) <= longest:
        return text
    head = longest // 3
    dropped = len(text) - longest
    return f"{text[:head]}\n… ({dropped:,} characters left out) …\n{text[-(longest - head) :]}"
