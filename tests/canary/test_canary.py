"""The seams in other packages are what they were, and all that we take of those packages is among them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import ROOT, imports_of, sources
from tests.canary.probe import Seam, expect, takes
from tests.canary.seams import SEAMS

WATCHED = ("mlx_lm", "llguidance", "uvicorn", "ipykernel", "comm", "huggingface_hub")


@pytest.fixture(scope="module")
def told() -> set[str]:
    """What ``python -m tests.canary`` says: in this process a loaded model may stand in the seams by now."""
    command = [sys.executable, "-m", "tests.canary"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode in (0, 1), run.stderr
    return set(run.stdout.splitlines())


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.package}: {seam.name}")
def test_a_seam_is_what_it_was(seam: Seam, told: set[str]) -> None:
    assert (ROOT / seam.ours).is_file()
    assert seam.line(None) in told, [line for line in told if line.startswith(f"{seam.package}: {seam.name}: ")]


def test_every_module_of_a_watched_package_that_we_import_has_a_probe() -> None:
    probes = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    watched = {
        one.module
        for path in sources("engine", "vm_magic")
        for one in imports_of(path)
        if one.module.partition(".")[0] in WATCHED and one.module != "mlx_lm.models"
    }
    assert len(watched) > 15
    assert sorted(module for module in watched if module.rpartition(".")[2] not in probes) == []


def test_a_seam_that_changed_is_told_with_what_relies_on_it() -> None:
    def gone() -> None:
        expect(False, "it is gone")

    seam = Seam("a-package", "a.thing", "engine/llm.py", gone)
    assert seam.line(seam.changed()) == "a-package: a.thing: CHANGED (it is gone); engine/llm.py relies on it"
    assert Seam("p", "n", "o", takes("json", "loads", "text")).changed() == "loads takes ['s'] first"
    assert (
        Seam("p", "n", "o", takes("no_such_module", "f")).changed()
        == "ModuleNotFoundError: No module named 'no_such_module'"
    )
