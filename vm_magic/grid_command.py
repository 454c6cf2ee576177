"""The cell's side of ``grid``: run it, show the table, file the DataFrame."""

import argparse
from typing import Any

from engine.many import MapInterrupted
from vm_magic.chat_flags import SAMPLING_FLAGS
from vm_magic.errors import Interrupted
from vm_magic.grid import GridView, run_grid
from vm_magic.session import Session


def run_grid_command(session: Session, shell: Any, parsed: argparse.Namespace, template: str, *, returned: bool) -> Any:
    """Run the grid; gives the DataFrame if ``returned``, else shows its picture and files it as ``_``.

    ■ files what is done, also as the variable of ``--out``, and raises Interrupted.
    """
    llm = session.remote if session.remote is not None else session.require()
    sampling = [dest for _, dest, _, _ in SAMPLING_FLAGS]
    schema = None
    if parsed.schema is not None:
        from vm_magic.schemas import read_schema

        schema = read_schema(parsed.schema, shell.user_ns)
    try:
        frame = run_grid(llm, template.strip("\n"), parsed, shell.user_ns, sampling, schema)
    except MapInterrupted as stopped:
        _file(shell, stopped.result, parsed, returned=False)
        raise Interrupted(
            f"{str(stopped).partition(',')[0]}: they are in {parsed.out or '_'}, --resume goes on"
        ) from None
    return _file(shell, frame, parsed, returned=returned)


def _file(shell: Any, frame: Any, parsed: argparse.Namespace, *, returned: bool) -> Any:
    if parsed.out:
        shell.user_ns[parsed.out] = frame
        return None
    if returned:
        return frame
    view = GridView.of(frame)
    shell.display_pub.publish({"text/plain": repr(view), "text/html": view._repr_html_()}, {})
    shell.displayhook.update_user_ns(frame)
    shell.displayhook.fill_exec_result(frame)
    return None
