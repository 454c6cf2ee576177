"""Other processes that hold a model: files with sizes, alive as long as they are locked."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.runner.device.devices import Device
from engine.runtime import neighbours
from engine.runtime.neighbours import Held, Notice, neighbours_line

CPU = Device("cpu", "a processor", 24 * 10**9)
OTHER = Held(model="smollm2", planned=22 * 10**9, in_use=5 * 10**8, device="cpu", port=8000, notebook="chat.ipynb")
PROCESS = """
import sys
from engine.runtime.neighbours import Notice
notice = Notice()
notice.write(sys.argv[1], 22_000_000_000, 8000)
print("written", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "vm-magic" / "in-use"


@contextmanager
def another_process(model: str = "smollm2", **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process that says what it holds."""
    command = [sys.executable, "-c", PROCESS, model]
    with subprocess.Popen(
        command, env={**os.environ, **variables}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        yield process
        if process.poll() is None:
            process.kill()


def age(path: Path) -> None:
    old = time.time() - 60
    os.utime(path, (old, old))


def test_a_process_is_seen_while_it_lives_however_it_ends(runtime: Path) -> None:
    with another_process(JPY_SESSION_NAME="/somebody/notes/chat.ipynb") as process:
        (held,) = neighbours.neighbours()
        assert (held.model, held.planned, held.port, held.notebook) == ("smollm2", 22 * 10**9, 8000, "chat.ipynb")
        (file,) = runtime.iterdir()
        assert "somebody" not in file.read_text(), "the name of the notebook, not where it lies"
        age(file)
        assert neighbours.neighbours() == [held], "a file may be old: its process lives"
        process.kill()
        process.wait()
        assert neighbours.neighbours() == []
        assert list(runtime.iterdir()) == [], "what is stale is cleared away"


def test_ones_own_models_are_not_neighbours_and_leave_nothing(runtime: Path) -> None:
    notice = Notice()
    for port in (None, 8000, 8001):
        notice.write("smollm2\x1b[31m", 10**9, port)
    (file,) = runtime.iterdir()
    values = json.loads(file.read_text())
    assert (values["model"], values["port"]) == ("smollm2[31m", 8001)
    assert file.stat().st_mode & 0o777 == 0o600
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert neighbours.neighbours() == []
    notice.close()
    notice.close()
    notice.write("smollm2", 1, None)
    assert list(runtime.iterdir()) == []


FORK = """
import os, sys, time
from engine.runtime.neighbours import Notice
notice = Notice()
notice.write("smollm2", 1, None)
if os.fork() == 0:
    notice.close()
    os.close(1)
    time.sleep(30)
"""


def test_a_forks_child_neither_keeps_nor_takes_away_its_parents_file(runtime: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", FORK], stdout=subprocess.PIPE, process_group=0) as parent:
        assert parent.stdout is not None
        assert parent.stdout.read() == b"", "both are as far: the child is alive, the parent ends"
        parent.wait()
        (file,) = runtime.iterdir()
        age(file)
        assert neighbours.neighbours() == []
        assert list(runtime.iterdir()) == []
        os.killpg(parent.pid, signal.SIGKILL)


def test_what_cannot_be_read_is_left_out_and_never_an_error(runtime: Path, tmp_path: Path) -> None:
    with another_process():
        (file,) = runtime.iterdir()
        good = json.loads(file.read_text())
        wrong: list[Any] = [[], {}, 7, "x", {**good, "machine": "another"}, {**good, "planned": -1}]
        wrong += [{**good, "planned": "22"}, {**good, "model": 3}, {**good, "port": "8000"}, {**good, "in_use": None}]
        holders = []
        for number, values in enumerate(wrong):
            path = runtime / f"{number}.json"
            path.write_text(json.dumps(values))
            holders.append(path.open())
            neighbours.fcntl.flock(holders[-1], neighbours.fcntl.LOCK_EX)
        (runtime / "bytes.json").write_bytes(b"\xff\xfe{" * 9000)
        (runtime / "deep.json").write_text("[" * 4000)
        (runtime / "folder.json").mkdir()
        os.mkfifo(runtime / "pipe.json")
        (tmp_path / "precious").write_text("kept")
        (runtime / "link.json").symlink_to(tmp_path / "precious")
        (runtime / ".unfinished.json").write_text("")
        for name in ("bytes.json", "deep.json", ".unfinished.json"):
            age(runtime / name)
        assert [held.model for held in neighbours.neighbours()] == ["smollm2"]
        for holder in holders:
            holder.close()
        assert (tmp_path / "precious").read_text() == "kept"
        left = {path.name for path in runtime.iterdir()}
        assert {"folder.json", "pipe.json", "link.json"} <= left
        assert not {"bytes.json", "deep.json", ".unfinished.json"} & left


def test_a_folder_that_others_may_write_to_is_not_used(runtime: Path, tmp_path: Path) -> None:
    runtime.mkdir(parents=True)
    runtime.chmod(0o777)
    (runtime / "1.json").write_text("{}")
    notice = Notice()
    notice.write("smollm2", 1, None)
    assert neighbours.neighbours() == []
    assert [path.name for path in runtime.iterdir()] == ["1.json"]
    runtime.chmod(0o700)
    runtime.rename(tmp_path / "elsewhere")
    runtime.symlink_to(tmp_path / "elsewhere")
    notice.write("smollm2", 1, None)
    assert neighbours.neighbours() == []
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["1.json"]
    notice.close()


def test_without_a_runtime_folder_the_cache_has_it(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notice = Notice()
    notice.write("smollm2", 1, None)
    assert len(list((tmp_path / "cache" / "vm-magic" / "in-use").iterdir())) == 1
    notice.close()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert neighbours.neighbours() == []


def test_the_line_says_who_how_much_and_only_where_it_is_too_much_what_to_do() -> None:
    text = neighbours_line(int(21.6e9), CPU, [OTHER])
    assert text == (
        "Another notebook (chat.ipynb, smollm2, port 8000) plans up to 22.0 GB of this machine's 24.0 GB, "
        "0.5 GB in use: together more than there is; --gpu-memory-utilization 0.45 in each shares it"
    )
    assert neighbours_line(10**9, CPU, [OTHER]) == text.partition(": together")[0]
    small = Held(model="m", planned=6 * 10**9, in_use=0, device="cpu")
    assert neighbours_line(int(21.6e9), CPU, [small]) == (
        "Another program (m) plans up to 6.0 GB of this machine's 24.0 GB, 0 B in use: together more than there is; "
        "--gpu-memory-utilization 0.75 fits beside"
    )
    many = neighbours_line(int(21.6e9), CPU, [OTHER, small])
    assert many is not None
    assert many.startswith("2 others (chat.ipynb, smollm2, port 8000; m) plan up to 28.0 GB")
    assert many.endswith("--gpu-memory-utilization 0.3 in each shares it")
    assert neighbours_line(10**9, Device("cuda", "a GPU", 24 * 10**9), [OTHER]) is None
    assert neighbours_line(10**9, CPU, []) is None
