"""``rerun``: a recorded reply, asked for once more, and what differs."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from IPython.core.error import UsageError

from engine.errors import RequestError
from engine.format.text import is_count
from vm_magic.chat.repeating import repeat
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.rerun_view import RerunTable, RerunView
from vm_magic.state.record import Record
from vm_magic.state.record_diff import compare
from vm_magic.state.record_file import RecordedCell, checked, recorded_cells
from vm_magic.state.session import Session

EXAMPLES = """\
%vllm_metal rerun                     the last reply that %%chat --record recorded
%vllm_metal rerun 2                   the one before it
%vllm_metal rerun reply               a variable that holds a recorded Reply (--out reply)
%vllm_metal rerun theirs.ipynb        the recorded cell of a notebook; with several, its number: theirs.ipynb 5
%vllm_metal rerun theirs.ipynb --all  all of them, as a table

The notebook's file is read and nothing in it is run. The recorded messages go to the model that is loaded (or
connected), outside of any conversation, with the recorded sampling values and seed."""


class Rerun(LineCommand):
    """Repeats what ``--record`` kept."""

    help = "repeat a recorded reply (%%chat --record) and say what differs"

    def add_arguments(self, parser: CommandParser) -> None:
        """Which record."""
        parser.epilog = EXAMPLES
        parser.add_argument(
            "which", nargs="?", default="1", metavar="N|NAME|FILE", help="2 is the record before the last, and so on"
        )
        parser.add_argument("cell", nargs="?", type=int, metavar="CELL", help="the number beside the cell in FILE")
        parser.add_argument("--all", action="store_true", help="every recorded cell of FILE")

    def execute(self, context: Context, parsed: argparse.Namespace) -> RerunView | RerunTable:
        """The comparison, or a table of them with ``--all``. ■ ends the request and stops."""
        which, session = parsed.which, context.session
        is_file = which.endswith(".ipynb")
        if not is_file and (parsed.all or parsed.cell is not None):
            raise UsageError("a cell's number and --all go with a notebook's file: %vllm_metal rerun FILE.ipynb --all")
        if not is_file:
            name, records = _in_session(session, which, context.shell.user_ns)
            return _view(session, name, records)
        cells = recorded_cells(Path(which))
        name = Path(which).name
        if parsed.all and cells:
            return RerunTable(name, tuple(_view(session, f"{name} {cell.name}", cell.records) for cell in cells))
        chosen = _chosen(cells, parsed.cell, name)
        return _view(session, f"{name} {chosen.name}", chosen.records)

    def arguments(self) -> Iterable[str]:
        """Notebooks of this folder."""
        return sorted(path.name for path in Path().glob("*.ipynb"))


def _in_session(session: Session, which: str, namespace: Any) -> tuple[str, Sequence[Record]]:
    """The ``which``-th record from the end, or that of a variable, and what to call it."""
    if not is_count(which):
        if which not in namespace:
            raise RequestError(f"rerun {which}: neither a number, a variable nor a notebook's file", param="which")
        record = getattr(namespace[which], "record", None)
        if record is None:
            fix = "record one with %%chat --record"
            raise RequestError(f"rerun {which}: holds no recorded reply; {fix}", param="which")
        return which, [checked(record)]
    kept, count = session.records, int(which)
    if not kept:
        raise RequestError("nothing was recorded yet: %%chat --record records a reply", param="which")
    if not 0 < count <= len(kept):
        raise RequestError(f"rerun {which}: there are {len(kept)} recorded replies", param="which")
    name = "the last record" if count == 1 else f"record {count} from the end"
    return name, [checked(record) for record in kept[-count]]


def _chosen(cells: Sequence[RecordedCell], count: int | None, name: str) -> RecordedCell:
    """The cell that is meant. Raises RequestError naming those there are."""
    if not cells:
        raise RequestError(
            f"{name} has no recorded replies: run its cells with %%chat --record, then save", param="file"
        )
    if count is None and len(cells) == 1:
        return cells[0]
    fitting = [cell for cell in cells if count is not None and cell.count == count]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(cell.name for cell in cells)
    wrong = f"cell {count} is not recorded" if count is not None else "name a cell, or add --all"
    raise RequestError(f"{name}: {wrong}; recorded are {names}", param="cell")


def _view(session: Session, name: str, records: Sequence[Record]) -> RerunView:
    return RerunView(name, tuple(compare(record, repeat(session, record)) for record in records))
