"""``python -m tests.benchmarks.gpu.warm``: compile beforehand what mlx-lm compiles for wide shapes, side by side.

On CUDA MLX compiles its products of packed weights for each number of rows, seconds for every one: minutes for a model
of experts, through which the suite would hold a GPU for one core. Here every number of rows is a process of its own,
over the first layers alone, and what it compiled lies in MLX's cache on disk. Figures are the same without.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.runner.device.devices import prepare_backend
from tests.benchmarks.gpu import theirs
from tests.benchmarks.gpu.shapes import first_layers, text_config, write_model
from tests.benchmarks.gpu.sizes import FULL, QUICK, TINY, Sizes
from tests.benchmarks.machine import ROOT

_SIZES = {"full": FULL, "quick": QUICK, "tiny": TINY}
_PROMPT = "prompt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a process failed, which is said."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu.warm", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="folder for the first layers")
    parser.add_argument("--sizes", choices=_SIZES, default="full", help="of the suite that follows (full)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="share the processes between N GPUs (1)")
    parser.add_argument("--one", nargs=2, metavar=("SHAPE", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    sizes = _SIZES[args.sizes]
    if args.one:
        _compile(sizes, args.models, *args.one)
        return 0
    prepare_backend()
    for shape in sizes.wide:
        folder = _folder(args.models, shape)
        if not (folder / "config.json").is_file():
            write_model(folder, shape, packed=True, layers=first_layers(shape))
    return _side_by_side(args.sizes, args.models, args.gpus)


def _folder(models: Path, shape: str) -> Path:
    return models / f"{shape}-{first_layers(shape)}-layers"


def _side_by_side(name: str, models: Path, gpus: int) -> int:
    """A process for each shape and number of rows; several GPUs take turns."""
    sizes, started = _SIZES[name], time.perf_counter()
    usual = [sys.executable, "-m", "tests.benchmarks.gpu.warm", "--models", str(models), "--sizes", name]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    for what in (*map(str, sizes.packed_batches), _PROMPT):
        for shape in sizes.wide:
            visible = {"CUDA_VISIBLE_DEVICES": str(len(running) % gpus)} if gpus > 1 else {}
            process = subprocess.Popen([*usual, "--one", shape, what], cwd=ROOT, env={**os.environ, **visible})
            running.append((f"{shape}, {what}", process))
    failed = 0
    for said, process in running:
        status = process.wait()
        failed += status != 0
        print(f"{time.perf_counter() - started:5.0f} s {said}{f': FAILED, {status}' if status else ''}", flush=True)
    return int(failed > 0)


def _compile(sizes: Sizes, models: Path, shape: str, what: str) -> None:
    """Run mlx-lm as the suite does: steps of so many rows, or a prompt."""
    prepare_backend()
    model, draw = theirs.load(_folder(models, shape)), np.random.default_rng(0).integers
    most = text_config(shape)["vocab_size"] - 1
    if what == _PROMPT:
        theirs.first_token(model, draw(0, most, sizes.wide_prompt).tolist())
        return
    prompts = draw(0, most, (int(what), sizes.wide_context)).tolist()
    theirs.batch_steps(model, prompts, sizes.wide_steps)
    if what == "1":
        theirs.single_steps(model, prompts[0], sizes.wide_steps)


if __name__ == "__main__":
    sys.exit(main())
