"""``python -m tests.benchmarks``: run the cases side by side, print a table, write JSON."""

import argparse
import sys
from pathlib import Path

from tests.benchmarks.cases import all_cases
from tests.benchmarks.harness import as_json, run_case, save, table
from tests.benchmarks.machine import describe


def main() -> int:
    """The command line. Fails where a case misses its target and ``--check`` is given."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains TEXT")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="samples of each variant (5)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="unmeasured runs before them (1)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR", help="folder of the JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a ratio is below its target")
    args = parser.parse_args()
    machine = describe()
    results = []
    for case in all_cases():
        if args.only in case.name:
            print(f"… {case.name}", file=sys.stderr, flush=True)
            results.append(run_case(case, repeats=args.repeats, warmup=args.warmup))
    if not results:
        parser.error(f"no case is named like {args.only!r}")
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, commit {machine['commit'][:12]}\n")
    print(table(results))
    text = as_json(results, machine, {"repeats": args.repeats, "warmup": args.warmup})
    print(f"\nSamples and versions: {save(text, args.output, machine['date'])}")
    return 1 if args.check and not all(result.reached for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
