"""The measuring itself, with a clock that only moves when told to."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.benchmarks.harness import Case, Result, as_json, rate, run_case, save, table, timed
from tests.benchmarks.machine import describe


class FakeClock:
    """Seconds that pass only through :meth:`work`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float, count: int = 0) -> Callable[[], int]:
        def action() -> int:
            self.now += seconds
            return count

        return action


def case_of(clock: FakeClock, ours: float, theirs: float, target: float | None = None) -> Case:
    variants = {"ours": timed(clock.work(ours), clock), "theirs": timed(clock.work(theirs), clock)}
    return Case("prefill", "s", "lower", variants, {"context": 64}, target)


def test_variants_take_turns_after_their_warm_up() -> None:
    order: list[str] = []

    def variant(name: str) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return float(len(order))

        return measure

    case = Case("turns", "s", "lower", {"A": variant("A"), "B": variant("B")})
    result = run_case(case, repeats=3, warmup=2)
    assert "".join(order) == "AABB" + "ABABAB"
    assert result.samples == {"A": [5.0, 7.0, 9.0], "B": [6.0, 8.0, 10.0]}
    assert result.median("A") == 7.0


def test_a_duration_and_a_rate_are_read_from_the_clock() -> None:
    clock = FakeClock()
    assert timed(clock.work(0.25), clock)() == 0.25
    assert rate(clock.work(0.5, count=32), clock)() == 64.0


@pytest.mark.parametrize(("better", "expected"), [("lower", 2.0), ("higher", 0.5)])
def test_a_ratio_above_one_says_that_the_first_variant_is_better(better: str, expected: float) -> None:
    case = Case("any", "x", "lower" if better == "lower" else "higher", {})
    assert Result(case, {"ours": [1.0, 1.0, 9.0], "theirs": [2.0]}).ratio == expected


def test_a_case_with_one_variant_has_no_ratio_and_misses_a_target() -> None:
    result = Result(Case("alone", "s", "lower", {}, target=1.0), {"ours": [1.0]})
    assert result.ratio is None
    assert not result.reached


@pytest.mark.parametrize(("target", "reached"), [(None, True), (2.0, True), (2.1, False)])
def test_a_target_is_a_ratio_to_reach(target: float | None, reached: bool) -> None:
    assert run_case(case_of(FakeClock(), 1.0, 2.0, target), repeats=2).reached is reached


def test_the_table_shows_median_least_most_and_ratio() -> None:
    result = Result(case_of(FakeClock(), 1, 1, 1.5), {"ours": [0.1, 0.3, 0.2], "theirs": [0.4]})
    head, rule, ours, theirs = table([result]).splitlines()
    assert head.split() == ["case", "variant", "median", "min", "max", "unit", "ratio", "target"]
    assert set(rule) == {"-"}
    assert ours.split() == ["prefill", "ours", "0.2", "0.1", "0.3", "s", "2.00", "1.50"]
    assert theirs.split() == ["theirs", "0.4", "0.4", "0.4", "s"]


def test_the_json_carries_samples_settings_and_the_machine(tmp_path: Path) -> None:
    machine = describe(datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC))
    text = as_json([run_case(case_of(FakeClock(), 1.0, 2.0), repeats=2)], machine, {"repeats": 2})
    path = save(text, tmp_path / "new", machine["date"])
    assert path.name == "2030-01-02T03-04-05.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["cases"][0]["samples"] == {"ours": [1.0, 1.0], "theirs": [2.0, 2.0]}
    assert stored["cases"][0]["settings"] == {"context": 64}
    assert stored["settings"] == {"repeats": 2}
    assert {"commit", "processor", "cores", "memory_bytes", "system", "python", "packages"} <= stored["machine"].keys()
    assert {"mlx", "mlx-lm"} <= stored["machine"]["packages"].keys()
