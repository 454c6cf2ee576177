"""The cell's side of ``grid``: run it, show the table, file the DataFrame."""

import argparse
from typing import Any

from engine.batch.map import MapInterrupted
from vm_magic.commands.grid import GridView, run_grid
from vm_magic.show.display_bar import DisplayBar, bar_for
from vm_magic.show.errors import Interrupted
from vm_magic.state.chat_flags import SAMPLING_FLAGS
from vm_magic.state.session import Session


def run_grid_command(session: Session, shell: Any, parsed: argparse.Namespace, template: str, *, returned: bool) -> Any:
    """Run the grid; gives the DataFrame if ``returned``, else shows its picture and files it as ``_``.

    ■ files what is done, also as the variable of ``--out``, and raises Interrupted.
    """
    llm = session.remote if session.remote is not None else session.require()
    sampling = [dest for _, dest, _, _ in SAMPLING_FLAGS]
    schema = None
    if parsed.schema is not None:
        from vm_magic.state.schemas import read_schema

        schema = read_schema(parsed.schema, shell.user_ns)
    bar = bar_for(shell, "prompts")
    try:
        frame = run_grid(llm, template.strip("\n"), parsed, shell.user_ns, sampling, schema, use_tqdm=bar or True)
    except MapInterrupted as stopped:
        _file(shell, stopped.result, parsed, bar, returned=False)
        raise Interrupted(
            f"{str(stopped).partition(';')[0]}; {parsed.out or '_'} has what there is, and --resume goes on"
        ) from None
    except BaseException:
        if bar is not None:
            bar.replace({"text/plain": "no prompt was sent to its end"})
        raise
    return _file(shell, frame, parsed, bar, returned=returned)


def _file(shell: Any, frame: Any, parsed: argparse.Namespace, bar: DisplayBar | None, *, returned: bool) -> Any:
    """Put the picture in the bar's place, or its first line where the DataFrame is shown or stored elsewhere."""
    view = GridView.of(frame)
    if bar is not None:
        bar.replace({"text/plain": view.caption} if parsed.out or returned else view.bundle())
    if parsed.out:
        shell.user_ns[parsed.out] = frame
        return None
    if returned:
        return frame
    if bar is None:
        print(repr(view))
    shell.displayhook.update_user_ns(frame)
    shell.displayhook.fill_exec_result(frame)
    return None
