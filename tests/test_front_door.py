"""The names that ``engine`` and ``vm_magic`` give."""

import subprocess
import sys
from pathlib import Path

import pytest

import engine
import vm_magic
from engine import errors

ROOT = Path(__file__).resolve().parent.parent


def test_every_error_class_is_given() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert classes == {name for name in engine.__all__ if name.endswith("Error")}
    assert "MemoryPlanError" in classes


@pytest.mark.parametrize("name", engine.__all__)
def test_both_packages_give_the_same_object_of_the_engine(name: str) -> None:
    given = getattr(vm_magic, name)
    assert given is getattr(engine, name)
    assert given.__module__.startswith("engine.")


def test_names_are_offered_before_they_are_loaded_and_others_are_refused() -> None:
    for package in (engine, vm_magic):
        assert set(package.__all__) <= set(dir(package))
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing


def test_importing_either_package_loads_no_more_than_itself() -> None:
    code = "import vm_magic, sys; print(*sorted(m for m in sys.modules if m.startswith(('engine', 'vm_magic'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["engine", "vm_magic", "vm_magic.shell", "vm_magic.shell.shadowed_engine"]
