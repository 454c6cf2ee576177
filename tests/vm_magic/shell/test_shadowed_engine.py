"""A module of the user's that is named ``engine``, as our package is: one line that names it, whatever imports it."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm_magic.conftest import Kernel
from tests.vm_magic.helpers import cell, line
from vm_magic.shell.shadowed_engine import EngineShadowedError, check_engine

ROOT = Path(__file__).resolve().parents[3]
EDITABLE = f"""
import os, sys
from importlib.machinery import PathFinder
class Editable:  # as some installers put a project in place: asked after all folders of sys.path
    find_spec = staticmethod(lambda name, path=None, target=None: PathFinder.find_spec(name, [{str(ROOT)!r}]))
sys.path[:] = [folder for folder in sys.path if not os.path.isdir(os.path.join(folder, "vm_magic"))]
sys.meta_path.append(Editable)
"""


def run_beside(folder: Path, code: str, **more: str) -> tuple[str, str]:
    """What a new Python in ``folder`` prints, and the last line of its error, if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout, done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def users_file(folder: Path) -> Path:
    path = folder / "engine.py"
    path.write_text("print('the file ran')\nclass LLM: ...\n", encoding="utf-8")
    return path


def users_package(folder: Path) -> Path:
    path = folder / "engine"
    path.mkdir()
    (path / "__init__.py").touch()
    return path


@pytest.mark.parametrize("code", ["import vm_magic", "from vm_magic import LLM", "from vm_magic.show import tables"])
@pytest.mark.parametrize(("make", "what"), [(users_file, "file"), (users_package, "folder")])
def test_an_engine_of_the_users_is_named_and_not_run(tmp_path: Path, make: Any, what: str, code: str) -> None:
    path = make(tmp_path)
    printed, said = run_beside(tmp_path, code)
    assert printed == ""
    assert f"EngineShadowedError: {path} is imported as `engine`" in said
    assert f"rename that {what}, then restart the kernel" in said


def test_it_is_named_when_it_was_imported_before_and_its_folder_left(tmp_path: Path) -> None:
    path = users_file(tmp_path)
    _, said = run_beside(tmp_path, "import engine, sys; sys.path.remove(''); import vm_magic")
    assert f"EngineShadowedError: {path} is imported" in said


def test_a_folder_without_init_goes_behind_ours_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    assert run_beside(tmp_path, "from vm_magic import LLM; print(LLM.__module__)") == ("engine.llm\n", "")


def test_a_folder_without_init_is_named_where_python_takes_it_for_ours(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    _, said = run_beside(tmp_path, EDITABLE + "from vm_magic import LLM", PYTHONPATH="")
    assert f"EngineShadowedError: {tmp_path / 'engine'} is imported" in said
    (tmp_path / "engine").rmdir()
    assert run_beside(tmp_path, EDITABLE + "import vm_magic; print('fine')", PYTHONPATH="") == ("fine\n", "")


def test_a_command_names_a_module_that_took_our_place_meanwhile(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine()
    monkeypatch.setitem(sys.modules, "engine", types.ModuleType("engine"))
    for run in (lambda: line(shell, "status"), lambda: cell(shell, "chat", "hello")):
        with pytest.raises(EngineShadowedError, match="a module made in this session is imported as `engine`"):
            run()


@pytest.fixture
def kernel_beside(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel whose notebook lies in ``tmp_path``: IPython's entry for that folder goes before our packages."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(
        kernel_name="python3", startup_timeout=120, cwd=str(tmp_path), env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    running = Kernel(manager, client)
    order = f"sys.path.remove({str(ROOT)!r}); sys.path.insert(sys.path.index('') + 1, {str(ROOT)!r})"
    assert running.run(f"import sys; {order}")[0]["status"] == "ok"
    yield running
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_kernel_shows_one_line_and_no_traceback(kernel_beside: Kernel, tmp_path: Path) -> None:
    path = users_file(tmp_path)
    for code in (
        "%load_ext vm_magic",
        "import vm_magic",
        "from vm_magic import LLM",
        "import engine\n%load_ext vm_magic",
    ):
        reply, messages = kernel_beside.run(code)
        assert (reply["status"], reply["ename"]) == ("error", "EngineShadowedError")
        (shown,) = reply["traceback"]
        assert "\n" not in shown
        assert f"{path} is imported as `engine`" in shown
        printed = [m["content"]["text"] for m in messages if m["msg_type"] == "stream"]
        assert printed == (["the file ran\n"] if "import engine" in code else [])
    path.unlink()
    kernel_beside.run("import sys; del sys.modules['engine']")
    assert kernel_beside.run("%load_ext vm_magic\n%vllm_metal status")[0]["status"] == "ok"
    path.write_text("", encoding="utf-8")
    assert kernel_beside.run("%vllm_metal status")[0]["status"] == "ok"  # ours is loaded
    kernel_beside.run("for name in [name for name in sys.modules if name.startswith('engine')]: del sys.modules[name]")
    for code in ("%vllm_metal status", "%%chat\nhello", "%reload_ext vm_magic"):
        reply, _ = kernel_beside.run(code)
        assert reply["ename"] == "EngineShadowedError"
        assert len(reply["traceback"]) == 1
