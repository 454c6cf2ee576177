"""``python -m tests.load``: a run, its table, and JSON in bench-results/."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from tests.load.run import Wanted, run


def main() -> int:
    """The command line. Fails where a fault was found."""
    args = _parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("tests.load").setLevel(logging.INFO)
    if args.against:
        from tests.load.against import compare

        comparison = compare(args.clients, args.questions, args.turns)
        return _show("load-against", comparison, args.output)
    report = run(Wanted(args.clients, args.rounds, args.seconds, seed=args.seed, traced=args.traced))
    _show("load", report, args.output)
    return 1 if report.book.num_faults else 0


def _show(name: str, found: Any, output: Path) -> int:
    print(found.table())
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(found.as_json(), indent=1), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--clients", type=int, default=200, metavar="N", help="at once (200)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of load, in all (60)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="after each, what is held (4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which requests come (0)")
    parser.add_argument("--traced", action="store_true", help="memory of this project's lines, too: slower")
    parser.add_argument("--against", choices=["mlx_lm.server"], help="both servers in turn, what both can serve")
    parser.add_argument("--questions", type=int, default=2, metavar="N", help="with --against: of each client (2)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="with --against: of each server (3)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR", help="folder of the JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
