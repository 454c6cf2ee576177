"""``python3 -m tests.benchmarks.load_time FOLDER``: where the seconds of a load go, beside mlx-lm's load.

Each load has a process of its own. First no kernel is compiled yet, then all are on disk: a cache folder of its own
holds this engine's, MLX's and the driver's. ``--parts`` adds loads without the rehearsal beside reading weights, and
by one reading thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHES = {"XDG_CACHE_HOME": "ours", "MLX_PTX_CACHE_DIR": "mlx", "CUDA_CACHE_PATH": "driver"}
TIMEOUT = 300


def ours(folder: str, without: str | None = None) -> dict[str, float]:
    """Seconds of the parts of ``LLM(folder)``, ``without`` one of its ways to save time."""
    began = time.perf_counter()
    from engine.llm import LLM
    from engine.runner.device.devices import prepare_backend

    prepare_backend()
    from engine.runner.load import parallel_read
    from engine.runtime import builder

    if without == "rehearsal":
        builder._WORTH_REHEARSING = sys.maxsize
    elif without == "threads":
        parallel_read._NUM_THREADS = sys.maxsize  # more than any machine has processors for
    imported = time.perf_counter()
    with LLM(folder) as llm:
        ready = time.perf_counter()
        parts = dict(llm.load_seconds)
        parts["other"] = ready - imported - sum(parts.values())
        llm.generate([list(range(10, 26))], llm.sampling_params(temperature=0, max_tokens=1), use_tqdm=False)
        first_token = time.perf_counter()
    return {"imports": imported - began, **parts, "load": ready - imported, "first token": first_token - ready}


def theirs(folder: str) -> dict[str, float]:
    """Seconds of ``mlx_lm.load(folder)``."""
    began = time.perf_counter()
    import mlx.core as mx
    from mlx_lm import load, stream_generate

    imported = time.perf_counter()
    model, tokenizer = load(folder)[:2]
    mx.eval(model.parameters())
    ready = time.perf_counter()
    next(iter(stream_generate(model, tokenizer, list(range(10, 26)), max_tokens=1)))
    first_token = time.perf_counter()
    return {"imports": imported - began, "load": ready - imported, "first token": first_token - ready}


def in_a_process(who: str, folder: str, caches: Path) -> dict[str, float]:
    """What one load takes in a process whose caches lie in ``caches``; raises RuntimeError with its last words."""
    command = [sys.executable, "-m", "tests.benchmarks.load_time", folder, "--once", who]
    env = {**os.environ, **{name: str(caches / place) for name, place in CACHES.items()}}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{who} did not load: {' '.join(done.stderr.split())[-600:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(title: str, seconds: Mapping[str, float]) -> str:
    """One load in one line."""
    return f"{title:<42}" + "  ".join(f"{part} {value:.2f}" for part, value in seconds.items())


def compare(folder: str, repeats: int, parts: bool) -> dict[str, Any]:
    """Print a line for each load; give the least of each kind."""
    least: dict[str, Any] = {}
    for _ in range(repeats):
        for who in _NAMES if parts else ("theirs", "ours"):
            with tempfile.TemporaryDirectory() as caches:
                for state in ("nothing compiled", "all compiled"):
                    title = f"{_NAMES[who]}, {state}"
                    found = in_a_process(who, folder, Path(caches))
                    print(line(title, found), flush=True)
                    if title not in least or found["load"] < least[title]["load"]:
                        least[title] = found
    return least


_NAMES = {
    "theirs": "mlx_lm.load",
    "ours": "LLM",
    "rehearsal": "LLM without rehearsal",
    "threads": "LLM, one reading thread",
}


def main() -> int:
    """Print the loads, and this engine's beside mlx-lm's with kernels on disk; exit 1 where a load failed."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.benchmarks.load_time", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="turns; the least counts (2)")
    parser.add_argument("--parts", action="store_true", help="also without the rehearsal, and by one reading thread")
    parser.add_argument("--once", choices=sorted(_NAMES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        found = theirs(args.folder) if args.once == "theirs" else ours(args.folder, args.once)
        print(json.dumps(found), flush=True)
        return 0
    try:
        least = compare(args.folder, args.repeats, args.parts)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(error)
        return 1
    usual = least["mlx_lm.load, all compiled"]
    for title, found in least.items():
        whole = (found["load"] + found["first token"]) / (usual["load"] + usual["first token"])
        print(f"{title:<42}load {found['load'] / usual['load']:.2f} x, to a first token {whole:.2f} x mlx-lm's")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
