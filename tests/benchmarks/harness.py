"""Measure things side by side: the variants of a case take turns in one process, so that drift hits them alike."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Measure = Callable[[], float]
"""One measurement, in the case's unit."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """What is compared. The ratio is that of the first two variants, above 1 where the first is better."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    variants: Mapping[str, Measure]
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None
    """The ratio to reach."""
    floor: float | None = None
    """What the hardware alone would take, in the case's unit."""


@dataclass(frozen=True)
class Result:
    """A case with its samples, in the order taken; warm-up runs are not among them."""

    case: Case
    samples: Mapping[str, Sequence[float]]

    def median(self, variant: str) -> float:
        """The middle sample of one variant."""
        return statistics.median(self.samples[variant])

    @property
    def ratio(self) -> float | None:
        """How many times better the first variant is than the second; None with a single variant."""
        if len(self.samples) < 2:
            return None
        first, second = (self.median(name) for name in list(self.samples)[:2])
        above, below = (first, second) if self.case.better == "higher" else (second, first)
        return above / below if below else None

    @property
    def reached(self) -> bool:
        """Whether the target is met; a case without one always is."""
        return self.case.target is None or (self.ratio is not None and self.ratio >= self.case.target)


def timed(action: Callable[[], object], clock: Clock = time.perf_counter) -> Measure:
    """A measurement of how many seconds ``action`` takes."""

    def measure() -> float:
        begin = clock()
        action()
        return clock() - begin

    return measure


def rate(action: Callable[[], int], clock: Clock = time.perf_counter) -> Measure:
    """A measurement of how many of what ``action`` counts it does in a second."""

    def measure() -> float:
        begin = clock()
        count = action()
        return count / (clock() - begin)

    return measure


def run_case(case: Case, *, repeats: int, warmup: int = 1) -> Result:
    """Run each variant ``warmup`` times unmeasured, then all in turn ``repeats`` times: A B A B …"""
    for measure in case.variants.values():
        for _ in range(warmup):
            measure()
    samples: dict[str, list[float]] = {name: [] for name in case.variants}
    for _ in range(repeats):
        for name, measure in case.variants.items():
            samples[name].append(measure())
    return Result(case, samples)


def take_turns(variants: Mapping[str, Callable[[], Sequence[float]]], repeats: int) -> dict[str, list[float]]:
    """All samples of variants that give several at once, A B A B …; what a warm-up is, each knows itself.

    Raises RuntimeError where one gives none.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, measure in variants.items():
            found = measure()
            if not found:
                raise RuntimeError(f"{name}: nothing was measured")
            samples[name].extend(found)
    return samples


def table(results: Sequence[Result]) -> str:
    """The results as a plain-text table, one line for each variant."""
    rows: list[tuple[str, ...]] = [("case", "variant", "median", "min", "max", "unit", "ratio", "target")]
    for result in results:
        for place, (name, samples) in enumerate(result.samples.items()):
            first = place == 0
            ratio = f"{result.ratio:.2f}" if first and result.ratio is not None else ""
            target = f"{result.case.target:.2f}" if first and result.case.target is not None else ""
            numbers = (f"{value:.4g}" for value in (result.median(name), min(samples), max(samples)))
            rows.append((result.case.name if first else "", name, *numbers, result.case.unit, ratio, target))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_json(results: Sequence[Result], machine: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Everything needed to read the numbers again later, as JSON text."""
    cases = [
        {
            "name": result.case.name,
            "unit": result.case.unit,
            "better": result.case.better,
            "settings": dict(result.case.settings),
            "samples": {name: list(samples) for name, samples in result.samples.items()},
            "median": {name: result.median(name) for name in result.samples},
            "ratio": result.ratio,
            "target": result.case.target,
            "reached": result.reached,
            "floor": result.case.floor,
        }
        for result in results
    ]
    return json.dumps({"machine": dict(machine), "settings": dict(settings), "cases": cases}, indent=2) + "\n"


def save(text: str, folder: Path, date: str) -> Path:
    """Write one run's JSON to ``folder``, named by its date, and return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.removesuffix('+00:00').replace(':', '-')}.json"  # what any tool takes for a name
    path.write_text(text, encoding="utf-8")
    return path
