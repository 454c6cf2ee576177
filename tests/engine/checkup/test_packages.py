"""Versions, MLX's build and files that hide packages, as ``doctor`` tells them."""

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.checkup import packages
from engine.checkup.findings import Finding
from engine.checkup.tested import TESTED

ROOT = Path(__file__).resolve().parents[3]
REAL = packages.installed


def pretend(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str | None]) -> None:
    monkeypatch.setattr(packages, "installed", lambda name: versions.get(name, REAL(name)))


def wanting(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.state != "ok"}


def test_what_is_needed_is_what_the_project_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {line.partition(">=")[0] for line in declared}
    assert set(packages.requirements()) == names == set(TESTED)


def test_missing_old_and_untried_packages_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"gguf": None, "numpy": "1.26.4", "mlx": "0.99.0", "uvicorn": "0.34.9"})
    found = wanting(list(packages.check_versions({"mlx": "0.32.4"})))
    assert {name: finding.state for name, finding in found.items()} == {
        "gguf": "problem",
        "numpy": "problem",
        "mlx": "warning",
        "uvicorn": "problem",
    }
    lowest = packages.requirements()
    assert found["gguf"].fix == f"pip install 'gguf>={lowest['gguf']}'"
    assert found["numpy"].fix.startswith(f"pip install -U 'numpy>={lowest['numpy']}'")
    assert "0.99.0 is newer than 0.32.4" in found["mlx"].text


@pytest.mark.parametrize(
    ("version", "tested", "leaps"),
    [("0.32.9", "0.32.4", False), ("0.33", "0.32.4", True), ("2.9", "2.1", False), ("3.0rc1", "2.1", True)],
)
def test_only_versions_that_may_change_interfaces_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, version: str, tested: str, leaps: bool
) -> None:
    pretend(monkeypatch, {"mlx": version})
    assert bool(wanting(list(packages.check_versions({"mlx": tested})))) == leaps


def test_parts_of_mlx_of_two_versions_or_for_another_device_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    none = dict.fromkeys(("mlx-metal", "mlx-cpu", "mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"))

    def state(**parts: str) -> str:
        pretend(monkeypatch, {**none, "mlx": "0.32.4", **{name.replace("_", "-"): v for name, v in parts.items()}})
        return next(iter(packages.check_mlx_build())).state

    monkeypatch.setattr(packages, "gpus", lambda: 0)
    assert [state(mlx_cpu="0.32.4"), state(mlx_cpu="0.31.0"), state()] == ["ok", "problem", "problem"]
    monkeypatch.setattr(packages, "gpus", lambda: 1)
    assert [state(mlx_cpu="0.32.4"), state(mlx_cuda_13="0.32.4")] == ["warning", "ok"]
    assert "mlx[cuda13]==0.32.4" in packages.mlx_fix("0.32.4")


@pytest.mark.parametrize(("name", "is_folder"), [("tqdm.py", False), ("numpy", True), ("engine.py", False)])
def test_a_file_with_the_name_of_a_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, is_folder: bool
) -> None:
    path = tmp_path / name
    if is_folder:
        path.mkdir()
        (path / "__init__.py").touch()
    else:
        path.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (finding,) = wanting(list(packages.check_shadows())).values()
    assert str(path) in finding.text
    assert finding.fix == f"rename {path}, then restart the kernel"
    path.rename(tmp_path / "mine")
    assert not wanting(list(packages.check_shadows()))
