"""``python -m tests.benchmarks --gpu``: run the cases one by one; each is printed and saved as soon as it is done."""

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.runner.device.devices import prepare_backend
from tests.benchmarks.gpu.cases import GpuCase, gpu_cases
from tests.benchmarks.gpu.engines import Engines
from tests.benchmarks.gpu.sizes import FULL, QUICK, TINY, Sizes
from tests.benchmarks.harness import Result, as_json, save, table
from tests.benchmarks.machine import describe


def run_gpu(
    only: Sequence[str],
    output: Path,
    *,
    quick: bool = False,
    tiny: bool = False,
    shape: str | None = None,
    memory: float | None = None,
    models: Path | None = None,
    commit: str | None = None,
    reference: bool = True,
) -> int:
    """Run the cases whose name contains one of ``only``, in that order (all without). 1 where one fails, else 0.

    ``output``: the folder of the JSON; ``models``: the folder that keeps the models for a later run;
    ``commit``: what is measured, on a machine where git cannot say it; ``reference``: this engine without kernels too.
    """
    sizes = TINY if tiny else QUICK if quick else FULL
    sizes = replace(sizes, shape=shape or sizes.shape, memory=memory or sizes.memory)
    sizes = sizes if reference else replace(sizes, slow_steps=0)
    found = [case for text in only or [""] for case in gpu_cases(sizes) if text in case.name]
    chosen = list({case.name: case for case in found}.values())
    if not chosen:
        print(f"no case is named like {' or '.join(only)}", file=sys.stderr)
        return 2
    prepare_backend()
    machine = describe() | ({"commit": commit} if commit else {})
    return _Run(sizes, machine, output, models).all(chosen)


class _Run:
    """One run: its engines, and what it found so far."""

    def __init__(self, sizes: Sizes, machine: dict[str, Any], output: Path, models: Path | None) -> None:
        self._begin = time.monotonic()
        self._machine, self._output = machine, output
        self._results: list[Result] = []
        self._failed: dict[str, str] = {}
        _say(f"{machine['gpu'] or machine['processor']}, commit {machine['commit'][:12]}, {sizes.shape}")
        self._engines = Engines(sizes, models)
        device = self._engines.machine
        self._settings = {
            "repeats": sizes.repeats, "warmup": 1, "sizes": vars(sizes) | {"shape": sizes.shape},
            "bytes_per_second": device.bytes_per_second, "flops_per_second": device.flops_per_second,
            "measured_by": device.how,
        }  # fmt: skip
        _say(
            f"reads {device.bytes_per_second / 1e12:.2f} TB/s ({device.how}), "
            f"{device.flops_per_second / 1e12:.0f} TFLOP/s"
        )

    def all(self, cases: Sequence[GpuCase]) -> int:
        """Every case; one that fails is said and left out, so that the others still run."""
        try:
            for case in cases:
                self._one(case)
        finally:
            self._engines.close()
        _say(f"\n{table(self._results)}\n")
        reached = sum(result.reached for result in self._results if result.case.target is not None)
        targets = sum(result.case.target is not None for result in self._results)
        _say(f"{reached} of {targets} targets reached, {len(self._failed)} cases failed; {self._save()}")
        return 1 if self._failed else 0

    def _one(self, case: GpuCase) -> None:
        _say(f"[{time.monotonic() - self._begin:5.0f} s] {case.name}")
        mx.reset_peak_memory()
        try:
            for result in case.run(self._engines):
                self._results.append(result)
                _say(describe_result(result))
                self._save()  # a case of several minutes may be cut short
        except Exception as error:  # noqa: BLE001 - one case out of memory must not take the others' figures along
            self._failed[case.name] = f"{type(error).__name__}: {error}"[:600]
            _say(f"  FAILED {self._failed[case.name]}")
            traceback.print_exc()
            self._engines.release()
        _say(f"  most memory in use {mx.get_peak_memory() / 1e9:.1f} GB")
        self._save()

    def _save(self) -> Path:
        facts = self._settings | {"failed": self._failed, "seconds": time.monotonic() - self._begin}
        return save(as_json(self._results, self._machine, facts), self._output, f"gpu-{self._machine['date']}")


def describe_result(result: Result) -> str:
    """A case in lines: each variant's median, least and number of samples; floor, ratio and target."""
    case = result.case
    lines = [f"  {case.name}"]
    for name, samples in result.samples.items():
        mean = sum(samples) / len(samples)
        lines.append(
            f"    {name:34s} {result.median(name):9.3f} {case.unit}  least {min(samples):.3f}  mean {mean:.3f}"
            f"  of {len(samples)}"
        )
    facts = [] if case.floor is None else [f"floor {case.floor:.3f} {case.unit}"]
    facts += [] if result.ratio is None else [f"{result.ratio:.2f} times better"]
    if case.target is not None:
        facts.append(f"target {case.target:.2f} {'reached' if result.reached else 'NOT REACHED'}")
    return "\n".join([*lines, *([f"    {', '.join(facts)}"] if facts else [])])


def _say(text: str) -> None:
    print(text, flush=True)
