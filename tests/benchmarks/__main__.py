"""``python -m tests.benchmarks``: run the cases side by side, print a table, write JSON.

``--gpu`` runs another set, of a larger model with random weights, which needs neither notebooks nor their packages.
"""

import argparse
import sys
from pathlib import Path

from tests.benchmarks.harness import as_json, run_case, save, table
from tests.benchmarks.machine import describe

RESULTS = Path("bench-results")


def main() -> int:
    """The command line. Fails where a case misses its target and ``--check`` is given, or cannot run with ``--gpu``."""
    parser = _parser()
    args = parser.parse_args()
    if args.plot:
        from tests.benchmarks.gpu.plot import plot_file

        plot_file(*args.plot)
        return 0
    if args.gpu:
        from tests.benchmarks.gpu.suite import run_gpu

        return run_gpu(
            args.only, args.output or RESULTS / "gpu", quick=args.quick, tiny=args.tiny, shape=args.model,
            memory=args.memory, models=args.models, commit=args.commit, reference=not args.no_reference,
        )  # fmt: skip
    return _run_cases(parser, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--only", metavar="TEXT", nargs="+", default=[], help="cases whose name contains one of the TEXTs"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="samples of each variant (5)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="unmeasured runs before them (1)")
    parser.add_argument("--output", "--out", type=Path, metavar="DIR", help="folder of the JSON (bench-results)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a ratio is below its target")
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--gpu", action="store_true", help="the GPU's cases instead")
    gpu.add_argument("--quick", action="store_true", help="fewer steps and turns")
    gpu.add_argument("--tiny", action="store_true", help="a tiny model and few tokens: whether it runs, nothing more")
    gpu.add_argument("--model", metavar="SHAPE", help="qwen3-4b (default), qwen3-0.6b or tiny, with random weights")
    gpu.add_argument("--memory", type=float, metavar="F", help="share of the memory for this engine (0.5)")
    gpu.add_argument("--models", type=Path, metavar="DIR", help="keep the models here for a later run")
    gpu.add_argument("--no-reference", action="store_true", help="leave out this engine without kernels")
    gpu.add_argument("--commit", metavar="HASH", help="what is measured, where git cannot say it")
    gpu.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "SVG"), help="draw a run's step times and stop")
    return parser


def _run_cases(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from tests.benchmarks.cases import all_cases

    machine = describe()
    results = []
    for case in all_cases():
        if not args.only or any(text in case.name for text in args.only):
            print(f"… {case.name}", file=sys.stderr, flush=True)
            results.append(run_case(case, repeats=args.repeats, warmup=args.warmup))
    if not results:
        parser.error(f"no case is named like {' or '.join(args.only)}")
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, commit {machine['commit'][:12]}\n")
    print(table(results))
    text = as_json(results, machine, {"repeats": args.repeats, "warmup": args.warmup})
    print(f"\nSamples and versions: {save(text, args.output or RESULTS, machine['date'])}")
    return 1 if args.check and not all(result.reached for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
