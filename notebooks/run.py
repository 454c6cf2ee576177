"""Run a notebook in a fresh kernel, show its cells in the terminal as they finish, and write it with its outputs.

python notebooks/run.py NOTEBOOK OUTPUT
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 900
"""Seconds; the first cell that needs the weights may fetch 93 MB."""


def paint(text: str, code: str) -> str:
    """``text`` in an ANSI style where a terminal reads it."""
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text


def text_of(output: Any) -> str:
    """What one output looks like as plain text; an error is one line."""
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return str(output.data.get("text/plain", ""))


def show_start(cell: Any, **_: Any) -> None:
    """Print a heading, or the code that runs now."""
    if cell.cell_type == "markdown":
        for line in cell.source.splitlines():
            if line.startswith("#"):
                print("\n" + paint(line.lstrip("# "), "1"))
    elif cell.source.strip():
        print(paint("\n".join(f"  > {line}" for line in cell.source.splitlines()), "2"), flush=True)


def show_outputs(cell: Any, **_: Any) -> None:
    """Print what the cell showed."""
    for output in cell.outputs:
        if text := text_of(output).rstrip():
            print("\n".join(f"    {line}" for line in text.splitlines()), flush=True)


def run(source: Path, target: Path) -> None:
    """Execute ``source`` in its own folder and write it to ``target``. Raises CellExecutionError."""
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(source.resolve().parent)}},
        on_cell_start=show_start,
        on_cell_executed=show_outputs,
    )
    client.execute()
    for cell in notebook.cells:  # a widget is gone with its kernel
        cell.outputs = [one for one in cell.get("outputs", ()) if WIDGET not in one.get("data", {})]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    try:
        run(args.notebook, args.output)
    except CellExecutionError as error:
        print(f"\nA cell failed: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    print(f"\nThe notebook with these outputs: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
