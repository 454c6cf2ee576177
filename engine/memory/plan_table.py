"""Plans side by side: one for every combination of some settings, also where it does not fit."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError, MemoryPlanError
from engine.format.text import aligned, count_text
from engine.memory.plan import MemoryPlan
from engine.params.sizes import exact_size

MOST_PLANS = 200
"""More rows than this are refused: nobody reads them."""
MEANINGS = {
    "fits": "whether one request of max_model_len fits, and else the bytes that are missing",
    "max_model_len": "tokens of the longest request",
    "longest": "tokens of the longest request that would fit",
    "max_num_seqs": "requests that run at once",
    "full length": "requests of max_model_len that fit at once",
    "each": "cache that one of them needs",
    "KV tokens": "tokens that the growing part of the cache holds",
}
"""Columns of a table of plans, after the settings."""


@dataclass(frozen=True, slots=True)
class PlanRow:
    """``settings`` and the plan that they give, or the error that says why there is none."""

    settings: Mapping[str, Any]
    plan: MemoryPlan | None
    error: MemoryPlanError | None = None

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.plan is not None

    @property
    def figures(self) -> MemoryPlan | MemoryPlanError:
        """Where the numbers are: the plan, or the error that carries those of the plan that failed."""
        found = self.plan or self.error
        assert found is not None, "a row has a plan or an error"
        return found


@dataclass(frozen=True, slots=True)
class PlanTable:
    """Rows of plans; ``rows[0].plan`` is the first of them. Shown as a table."""

    rows: tuple[PlanRow, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """Names of the columns: the settings first."""
        return (*self._given, *(name for name in MEANINGS if name not in self._given))

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text, as the header names them."""
        return [self._cells(row) for row in self.rows]

    @property
    def _given(self) -> tuple[str, ...]:
        return tuple(self.rows[0].settings) if self.rows else ()

    def _cells(self, row: PlanRow) -> tuple[str, ...]:
        numbers = row.figures
        found = {
            "fits": f"no, {exact_size(row.error.short_by)} short" if row.error else "yes",
            "max_model_len": count_text(numbers.max_model_len),
            "longest": count_text(numbers.max_model_len_that_fits) if numbers.max_model_len_that_fits else "none",
            "max_num_seqs": count_text(numbers.max_num_seqs),
            "full length": f"× {row.plan.max_concurrency:.2f}" if row.plan else "–",
            "each": exact_size(numbers.kv_bytes_at_max_len),
            "KV tokens": count_text(row.plan.max_tokens_cached) if row.plan else "–",
        }
        return tuple(str(row.settings.get(name, found.get(name))) for name in self.header)

    def __str__(self) -> str:
        return "\n".join(aligned([self.header, *self.cells()], numbers_from=0))

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


def tabulate(make: Callable[..., MemoryPlan], settings: Mapping[str, Sequence[Any]]) -> PlanTable:
    """``make(**combination)`` for every combination of ``settings``; the last one changes fastest.

    What does not fit is a row too; other errors are raised.
    """
    count = 1
    for values in settings.values():
        count *= len(values)
    if not 0 < count <= MOST_PLANS:
        raise ConfigError(f"{count} plans asked for: give 1 to {MOST_PLANS} combinations", value=count)
    rows = []
    for values in itertools.product(*settings.values()):
        given = dict(zip(settings, values, strict=True))
        try:
            rows.append(PlanRow(given, make(**given)))
        except MemoryPlanError as error:
            rows.append(PlanRow(given, None, error.with_traceback(None)))
    return PlanTable(tuple(rows))
