"""``python -m tests.sweep``: run every model file of the installed mlx-lm and write the table of supported models."""

import argparse
import sys

from engine.runner.device.devices import choose_blas

choose_blas()

from tests.sweep.models import model_files, run  # noqa: E402
from tests.sweep.table import TABLE, render  # noqa: E402


def main() -> int:
    """The command line. Fails, writing nothing, where the engine's tokens are not mlx-lm's."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="show only these model files, and write nothing")
    args = parser.parse_args()
    rows = []
    for name in args.names or model_files():
        rows.append(run(name))
        row = rows[-1]
        print(f"{row.name:24} {row.how:13} {row.groups:28} {row.note}", flush=True)
    wrong = [row.name for row in rows if not row.equal]
    if wrong:
        print(f"other tokens than mlx-lm's: {', '.join(wrong)}", file=sys.stderr)
        return 1
    if not args.names:
        TABLE.write_text(render(rows), encoding="utf-8")
        print(f"written: {TABLE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
