"""The two locked sets: the lowest versions that are admitted, and the newest that passed."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.checkup.packages import numbers
from engine.checkup.tested import TESTED

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED: list[str] = PROJECT["dependencies"]
TESTS: list[str] = PROJECT["optional-dependencies"]["test"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / ".ci" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][\w.]*)(?: ; .+)?", line) for line in lines]
    assert all(pins), "pins alone: no addresses, no options, no paths"
    return {plain(pin[1]): pin[2] for pin in pins if pin}


def bounds(lines: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", line) for line in lines)
    return {plain(match[1]): match[2] for match in found if match}


def test_the_lowest_set_has_the_versions_that_the_project_names() -> None:
    pins = locked("lowest")
    wrong = {
        name: (bound, pins.get(name))
        for name, bound in bounds([*NEEDED, *TESTS]).items()
        if numbers(pins.get(name, "")) != numbers(bound)
    }
    assert not wrong, f"bounds that no set of versions meets, or .ci/lock was not run: {wrong}"


def test_the_newest_set_fits_the_project_and_is_what_doctor_calls_tested() -> None:
    pins = locked("newest")
    assert all(numbers(pins[name]) >= numbers(bound) for name, bound in bounds([*NEEDED, *TESTS]).items())
    assert {plain(name): version for name, version in TESTED.items()} == {name: pins[name] for name in bounds(NEEDED)}


@pytest.mark.parametrize("name", ["lowest", "newest"])
def test_both_sets_name_the_same_build_of_mlx_for_all_of_its_parts(name: str) -> None:
    pins = locked(name)
    assert pins["mlx"] == pins["mlx-cpu"]
