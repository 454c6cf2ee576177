"""Device, memory, model cache, environment and port, each healthy and broken."""

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.checkup import device_probe, environment, machine
from engine.checkup.device_probe import Probe, ask_device
from engine.checkup.findings import Examination, Finding, attempt

CPU = Probe("cpu", "a processor", 16 << 30, 8 << 30, "CPU: OpenBLAS 0.3")
GPU = Probe("cuda", "a GPU", 80 << 30, 70 << 30)


def states(findings: Any) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_each_answer_of_mlx_has_its_line() -> None:
    assert states(machine.check_device(CPU)) == {"MLX": "ok", "BLAS": "ok"}
    slow = Probe("cpu", "a processor", 1, 1, "CPU without OpenBLAS: prompts are slow; install it")
    assert states(machine.check_device(slow))["BLAS"] == "warning"
    (failed,) = machine.check_device(Probe(error="ImportError: no libmlx.so", at="mlx"))
    assert (failed.state, "pip install --force-reinstall 'mlx[" in failed.fix) == ("problem", True)
    (of_numpy,) = machine.check_device(Probe(error="ImportError: oh", at="numpy"))
    assert of_numpy.fix.startswith("mend the package numpy")
    (broken,) = machine.check_imports(Probe(broken={"pydantic_core": "ImportError: of another Python"}))
    assert broken.fix.startswith("pip install --force-reinstall pydantic-core")


def test_kernels_are_needed_on_a_gpu_only_and_may_be_wrong() -> None:
    (none,) = machine.check_kernels(CPU, None)
    assert "none needed" in none.text
    by_answer = {"": "ok", "row 3 differs": "problem", None: "warning"}
    for kernels, state in by_answer.items():
        probe = Probe("cuda", "a GPU", 1, 1, kernels=kernels)
        assert states(machine.check_kernels(probe, None)) == {"attention": state}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ends the process (SIGILL)"),
        ("raise SystemExit(3)", "ends the process (status 3)"),
        ("import time; time.sleep(600)", "took longer than 1 s"),
        ("print('no JSON')", "ends the process (status 0)"),
    ],
)
def test_an_mlx_that_ends_its_process_or_never_answers_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(device_probe, "_CODE", code)
    assert said in ask_device(patience=1 if "sleep" in code else 60).error


def test_an_import_that_fails_is_told_with_the_package_in_which_it_does(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('libmlx.so: no such file')")
    root = Path(__file__).resolve().parents[3]
    probe = ask_device([str(tmp_path), str(root), *sys.path])
    assert (probe.error, probe.at) == ("ImportError: libmlx.so: no such file", "mlx")
    assert probe.broken == {"mlx": "ImportError: libmlx.so: no such file"}


def test_limits_of_the_process_and_little_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runtime.neighbours.neighbours", list)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 30, 8 << 30))
    found = states(machine.check_memory(CPU, None))
    assert (found["device"], found["this process"], found["other kernels"]) == ("ok", "warning", "ok")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    found = states(machine.check_memory(Probe("cpu", "a processor", 16 << 30, 1 << 29), None))
    assert found["device"] == "warning"
    assert "this process" not in found


@pytest.mark.parametrize(("planned", "state"), [(4 << 30, "ok"), (17 << 30, "warning")])
def test_what_other_kernels_hold_is_told(monkeypatch: pytest.MonkeyPatch, planned: int, state: str) -> None:
    held = SimpleNamespace(planned=planned, in_use=1 << 30, model="m", notebook="n.ipynb")
    monkeypatch.setattr("engine.runtime.neighbours.neighbours", lambda: [held])
    assert states(machine.check_memory(CPU, None))["other kernels"] == state


def test_a_model_cache_is_looked_at_from_its_rights_to_its_half_finished_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert states(machine.check_model_cache())["hub"] == "ok"
    assert not folder.exists(), "nothing is changed"
    blobs = folder / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / "1.incomplete", blobs / "2.incomplete"
    old.write_bytes(b"x" * 2_000_000)
    new.touch()
    os.utime(old, (0, 0))
    lines = [(finding.state, finding.text) for finding in machine.check_model_cache() if finding.name == "downloads"]
    assert lines == [("ok", "1 under way"), ("warning", "1 file (2.0 MB) not finished")]
    monkeypatch.setattr(machine.os, "access", lambda _path, mode: mode != os.W_OK)
    assert states(machine.check_model_cache())["hub"] == "warning"
    monkeypatch.setattr(machine.os, "access", lambda _path, _mode: False)
    assert states(machine.check_model_cache())["hub"] == "problem"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert states(machine.check_model_cache())["disk"] == "problem"


def test_variables_that_make_no_sense_and_proxies_that_catch_this_machine_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_METAL_MEMORY_FRACTION", "7")
    (tmp_path / "file").touch()
    env = {"VLLM_METAL_MEMORY_FRACTION": "7", "HF_HOME": str(tmp_path / "file"), "VLLM_API_KEY": "k"}
    found = list(environment.check_variables(env))
    assert states(found) == {"variables": "ok", "HF_HOME": "problem", "VLLM_METAL_MEMORY_FRACTION": "problem"}
    assert found[0].text == "VLLM_METAL_MEMORY_FRACTION=7, VLLM_API_KEY (set), HF_HOME (set)"
    proxy = {"http_proxy": "http://me:secret@proxy.example:3128"}
    (caught,) = environment.check_proxies(proxy)
    assert (caught.state, "secret" in caught.text) == ("warning", False)
    for spared in ("localhost,127.0.0.1", "*"):
        (spares,) = environment.check_proxies({**proxy, "NO_PROXY": spared})
        assert spares.state == "ok"


def test_a_check_that_fails_is_a_finding_behind_those_that_it_made() -> None:
    def check() -> Any:
        yield Finding("memory", "first", "fine")
        raise RuntimeError("/srv/ann/secret is gone")

    found = Examination(tuple(attempt("memory", check)))
    assert [finding.state for finding in found.findings] == ["ok", "problem"]
    assert "RuntimeError: /srv/ann/secret is gone" in str(found)
    assert "secret" not in found.report()
    assert not found.ok
