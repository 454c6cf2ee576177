"""Run the checks named, or all: prints a line or a JSON object for each, and fails where one is wrong."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from engine.params.attention_backend import ATTENTION_BACKENDS
from engine.runner.device.devices import describe_device
from tests.on_device.backends import backends
from tests.on_device.checkpoints import checkpoints
from tests.on_device.draws import draws
from tests.on_device.hybrid import hybrid
from tests.on_device.long import long
from tests.on_device.parity import parity
from tests.on_device.pools import pools
from tests.on_device.seeds import seeds
from tests.on_device.sticky import sticky
from tests.on_device.ties import WRONG


def _parity(options: argparse.Namespace) -> bool:
    return not any(WRONG in line for line in parity(options.backend, options.only).values())


def _pools(_options: argparse.Namespace) -> bool:
    return all(difference <= 0.01 for found in _shown("pools", pools()).values() for difference in found.values())


def _hybrid(_options: argparse.Namespace) -> bool:
    _shown("hybrid", hybrid())
    return True


def _long(options: argparse.Namespace) -> bool:
    return long(options.backend, small=options.small, seconds=options.seconds)


def _backends(options: argparse.Namespace) -> bool:
    return backends(without_gpu=options.small)


def _checkpoints(options: argparse.Namespace) -> bool:
    return not any("WRONG" in line for line in checkpoints(options.only).values())


def _draws(options: argparse.Namespace) -> bool:
    return draws(options.draws)


def _seeds(_options: argparse.Namespace) -> bool:
    return seeds()


def _sticky(options: argparse.Namespace) -> bool:
    return sticky(pretend=options.small)


CHECKS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "long": _long,
    "backends": _backends,
    "parity": _parity,
    "pools": _pools,
    "hybrid": _hybrid,
    "sticky": _sticky,
    "checkpoints": _checkpoints,
    "draws": _draws,
    "seeds": _seeds,
}


def _shown(name: str, found: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps({name: found}, indent=1), flush=True)
    return found


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 where every check that ran is right."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_device", description=__doc__)
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS], metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--backend", choices=ATTENTION_BACKENDS, default="auto", help="attention, in long and parity")
    parser.add_argument("--small", action="store_true", help="long, backends and sticky as a CPU can do them")
    parser.add_argument("--only", default="", metavar="WORDS", help="parity, checkpoints: kinds that have these words")
    parser.add_argument("--seconds", type=float, default=95.0, help="after which long leaves models out, and fails")
    parser.add_argument("--draws", type=int, default=1_000_000, metavar="N", help="of each case of draws")
    options = parser.parse_args(arguments)
    print(json.dumps({"device": describe_device().name, "mlx": version("mlx")}), flush=True)
    failed = [name for name in options.checks or CHECKS if not CHECKS[name](options)]
    print(f"wrong: {', '.join(failed)}" if failed else "all right", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
