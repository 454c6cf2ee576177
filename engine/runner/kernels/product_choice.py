"""Which way each product of a model is computed for few rows: checked, then measured, when a model is loaded."""

import math
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.product_check import Expected
from engine.runner.kernels.products import (
    ROW_BUCKETS,
    Candidate,
    Modules,
    Plain,
    Product,
    Way,
    bucket_of,
    mlx_starts_slowly,
    product_of,
    sibling_products,
    single_products,
    some_rows,
)

_GAIN = 0.03
"""What another way must save of the time of MLX's own product to take its place: less may be noise."""
_CHAIN_BYTES = 1 << 27
"""Weights that a timed chain reads: more than a GPU's cache holds."""
_MAX_CHAIN = 24
_READINGS = 3
_READING_SECONDS = 1.5e-3
"""What a reading should take; the least of several counts."""
_LONG_SECONDS = 8e-3
"""A chain that takes longer was measured well enough by running it twice."""
_GIVE_UP = 1.5
"""Times the fastest way so far: a way that takes longer is not measured any closer."""

_WORDS = {"own": "own kernels", "flattened": "rearranged rows", "unpacked": "unpacked weights"}

Compute = Callable[[Modules, mx.array], list[mx.array]]
Timer = Callable[[Compute, Sequence[Modules], mx.array, float], float]
"""``timer(compute, chain, x, limit)``: seconds of one ``compute``; one reading is enough if that is over ``limit``."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one product of a model is computed, by the number of rows.

    ``chosen`` holds the buckets of :data:`ROW_BUCKETS` where another way than MLX's own takes less time; ``seconds``
    what each way took there.
    """

    product: Product
    num_uses: int
    chosen: Mapping[int, Candidate]
    seconds: Mapping[int, Mapping[str, float]]

    def way(self, x: mx.array) -> Candidate | None:
        """The way to go with these rows; None: MLX's own."""
        num_rows = x.size // x.shape[-1]
        if not num_rows or x.dtype != self.product.dtype:
            return None
        if num_rows <= ROW_BUCKETS[-1]:
            return self.chosen.get(bucket_of(num_rows))
        # What starts slowly is not worth starting for more rows either: the more there are, the less unpacking counts.
        most = self.chosen.get(ROW_BUCKETS[-1])
        slow = most is not None and mlx_starts_slowly(self.product)
        return most if slow and most is not None and most.takes(self.product, num_rows) else None


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen for a model. ``siblings`` are products of several weights in one launch.

    ``problems`` says in a line each what was not trusted, and ``seconds`` how long the measuring took, without checks
    and the kernels' compilation (``check_seconds``).
    """

    singles: tuple[Choice, ...] = ()
    siblings: tuple[Choice, ...] = ()
    problems: tuple[str, ...] = ()
    check_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def note(self) -> str | None:
        """One line for people; None where there was nothing to choose."""
        if not self.singles:
            return "; ".join(self.problems) or None
        said = [
            f"{words} for {len(rows)} of {len(self.singles)} shapes up to {max(rows)} rows"
            for name, words in _WORDS.items()
            if (rows := _largest(self.singles, name))
        ]
        if joined := _largest(self.siblings, "own"):
            said.append(f"siblings in one launch for {len(joined)} of {len(self.siblings)}")
        said = said or ["MLX's own are the fastest here"]
        return "; ".join([f"products of few rows: {', '.join(said)}", *self.problems])

    def as_data(self) -> list[dict[str, Any]]:
        """Per product: its weights, how many modules, and by rows the microseconds of each way and the one chosen."""
        return [_as_data(choice) for choice in (*self.singles, *self.siblings)]


def choose(
    model: nn.Module,
    candidates: Sequence[Candidate],
    *,
    siblings: bool = True,
    timer: Timer | None = None,
    progress: Callable[[int, int], None] | None = None,
    skip: Container[int] = (),
) -> Choices:
    """Check every candidate against float32, then time it beside MLX's own product.

    ``progress(done, total)`` counts products. ``siblings``: also weights that take the same rows, in one launch.
    ``skip`` has the ids of modules that are left alone.
    """
    singles = _grouped(single_products(model, skip), candidates)
    families = _grouped(sibling_products(model, skip), candidates) if siblings else {}
    everything = {**singles, **families}
    report = _Counter(2 * len(everything), progress)
    started = time.perf_counter()
    with collecting() as awaited:
        _launch_all(everything, candidates)
    compile_all(awaited)
    trusted, problems = _trusted(everything, candidates, report)
    checked = time.perf_counter()
    measure = timer or chain_seconds
    alone: dict[Product, Choice] = {}
    for product, uses in singles.items():
        alone[product] = _measured(product, uses, Plain(), trusted[product], measure)
        report()
    together = []
    for product, uses in families.items():
        together.append(_measured(product, uses, _Apart(alone), trusted[product], measure))
        report()
    mx.clear_cache()
    seconds = time.perf_counter() - checked
    return Choices(tuple(alone.values()), tuple(together), tuple(problems), checked - started, seconds)


def launch_kernels(model: nn.Module, candidates: Sequence[Candidate], *, siblings: bool = True) -> None:
    """Launch every kernel that :func:`choose` would try.

    Inside :func:`engine.runner.kernels.kernel_cache.collecting` this needs no weights: it says what to compile.
    """
    found = (*single_products(model), *(sibling_products(model) if siblings else ()))
    _launch_all(_grouped(found, candidates), candidates)


def _launch_all(groups: Mapping[Product, Sequence[Modules]], candidates: Sequence[Candidate]) -> None:
    for product, uses in groups.items():
        for candidate in candidates:
            # What fails here fails again when it is checked, and is said then.
            with suppress(Exception):
                for rows in ROW_BUCKETS:
                    if candidate.takes(product, rows):
                        candidate.compute(uses[0], some_rows(product, rows))


def chain_seconds(compute: Compute, chain: Sequence[Modules], x: mx.array, limit: float) -> float:
    """Seconds of one ``compute``, from chains in which each waits for the one before, as in a decode step.

    A chain is compiled and submitted ahead, so that the host's work counts where it takes longer than the GPU's.
    """

    def run(x: mx.array) -> list[mx.array]:
        kept: list[mx.array] = []
        for modules in chain:
            *others, last = compute(modules, x)
            kept += others
            # By operations that MLX brings compiled: others would take longer to compile than all this to measure.
            width = min(last.shape[-1], x.shape[-1])
            x = mx.concatenate([last[..., :width], x[..., width:]], axis=-1)
        return [x, *kept]

    step = mx.compile(run)
    mx.eval(step(x))
    once = _submit(step, x, 1)
    if once > 2 * limit * len(chain):
        return once / len(chain)
    once = min(once, _submit(step, x, 1))
    if once > min(limit * len(chain), _LONG_SECONDS):
        return once / len(chain)
    repeats = max(2, min(8, int(_READING_SECONDS / once)))
    return min(_submit(step, x, repeats) for _ in range(_READINGS)) / (repeats * len(chain))


def _submit(step: Callable[[mx.array], list[mx.array]], x: mx.array, repeats: int) -> float:
    mx.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        mx.async_eval(step(x))  # type: ignore[no-untyped-call]
    mx.synchronize()
    return time.perf_counter() - started


def _measured(product: Product, uses: Sequence[Modules], usual: Way, ways: Sequence[Candidate], timer: Timer) -> Choice:
    """The fastest of ``ways`` for each number of rows, where it beats the ``usual`` one."""
    chosen: dict[int, Candidate] = {}
    seconds: dict[int, dict[str, float]] = {}
    chain = modules_of_chain(uses)
    for rows in ROW_BUCKETS:
        taking = [way for way in ways if way.takes(product, rows)]
        if not taking:
            continue
        x = some_rows(product, rows)
        times: dict[str, float] = {}
        for way in taking if usual.starts_slowly(product) else (*taking, usual):
            times[way.name] = timer(way.compute, chain, x, _GIVE_UP * min(times.values(), default=math.inf))
        best = min(taking, key=lambda way: times[way.name])
        if times[best.name] <= (1 - _GAIN) * times.get(usual.name, math.inf):
            chosen[rows] = best
        seconds[rows] = times
    return Choice(product, len(uses), chosen, seconds)


class _Apart:
    """Siblings one by one, each the way that was chosen for it."""

    name = "apart"

    def starts_slowly(self, _product: Product, /) -> bool:
        """What is chosen for each has started."""
        return False

    def __init__(self, alone: Mapping[Product, Choice]) -> None:
        self._alone = alone

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        """A product of each module."""
        return [result for module in modules for result in self._way(module, x).compute((module,), x)]

    def _way(self, module: nn.Module, x: mx.array) -> Way:
        product = product_of((module,))
        choice = self._alone.get(product) if product is not None else None
        return (choice.way(x) if choice is not None else None) or Plain()


class _Counter:
    """Counts steps of a known number for a ``progress(done, total)``."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def _grouped(found: Iterable[tuple[Product, Modules]], candidates: Sequence[Candidate]) -> dict[Product, list[Modules]]:
    """The modules of each product that a candidate computes."""
    groups: dict[Product, list[Modules]] = {}
    for product, modules in found:
        if any(candidate.takes(product, rows) for candidate in candidates for rows in ROW_BUCKETS):
            groups.setdefault(product, []).append(modules)
    return groups


def _worth_trying(product: Product, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that do not start slowly, if any of them takes the product at all."""
    quick = [way for way in candidates if not way.starts_slowly(product)]
    taken = any(way.takes(product, rows) for way in quick for rows in ROW_BUCKETS)
    return quick if taken else list(candidates)


def _trusted(
    groups: Mapping[Product, Sequence[Modules]], candidates: Sequence[Candidate], report: _Counter
) -> tuple[dict[Product, list[Candidate]], list[str]]:
    """The candidates that gave right results, by product, and a line about each other one.

    One that is wrong anywhere is trusted nowhere, for packed weights or for those that are not; it is not tried again.
    """
    distrusted: dict[tuple[str, bool], str] = {}
    for product, uses in groups.items():
        expected = Expected(product, uses[0])
        for candidate in _worth_trying(product, candidates):
            key = candidate.name, product.bits > 0
            if key not in distrusted and (problem := expected.problem(candidate)):
                distrusted[key] = f"{candidate.name} products of {problem}, so they are not used"
        report()
    trusted = {
        product: [way for way in _worth_trying(product, candidates) if (way.name, product.bits > 0) not in distrusted]
        for product in groups
    }
    return trusted, list(distrusted.values())


def modules_of_chain(uses: Sequence[Modules]) -> list[Modules]:
    """Modules of one product, again and again if there are few, until their weights do not fit a cache."""
    size = sum(value.nbytes for module in uses[0] for _, value in tree_flatten(module.parameters()))
    count = max(1, min(_MAX_CHAIN, -(-_CHAIN_BYTES // size)))
    return [uses[number % len(uses)] for number in range(count)]


def _largest(choices: Sequence[Choice], name: str) -> list[int]:
    """The most rows for which each product goes the way called ``name``, of those that do."""
    rows = [[rows for rows, way in choice.chosen.items() if way.name == name] for choice in choices]
    return [max(some) for some in rows if some]


def _as_data(choice: Choice) -> dict[str, Any]:
    rows = {
        number: {
            "microseconds": {name: round(value * 1e6, 2) for name, value in times.items()},
            "chosen": choice.chosen[number].name if number in choice.chosen else list(times)[-1],
        }
        for number, times in choice.seconds.items()
    }
    return {"weights": str(choice.product), "uses": choice.num_uses, "rows": rows}
