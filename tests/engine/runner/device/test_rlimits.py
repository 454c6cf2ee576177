"""``ulimit -v`` and ``-d`` count as memory of the device: a load is refused where MLX would end the process."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import MemoryPlanError
from engine.runner.device import rlimits
from engine.runner.device.devices import Device, limited_cpu
from engine.runner.device.memory import FreeMemory
from engine.runner.device.rlimits import KEPT, RESERVED, check_process_room, process_room
from tests.damaged.cases import write_whole

GIB = 1 << 30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A process that has mapped 3 GiB, 1 of them data, in a machine of 16."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text(f"Name:\tx\nVmSize:\t{3 << 20} kB\nVmData:\t{1 << 20} kB\nThreads:\t9\n")
    (tmp_path / "meminfo").write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {16 << 20} kB\n")
    return tmp_path


def limit(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    found = {getattr(resource, name): value for name, value in limits.items()}
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(rlimits.resource, "getrlimit", lambda number: (found.get(number, none), none))


def test_what_a_limit_leaves_is_the_devices_memory_and_is_said(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, RLIMIT_AS=8 * GIB)
    device = limited_cpu("CPU", 2 * GIB, proc, proc / "none")
    assert device.memory_limit == 8 * GIB - 3 * GIB - RESERVED + 2 * GIB  # MLX's own 2 GiB are among the mapped ones
    assert device.limited_by.startswith("`ulimit -v` of 8.59GB leaves 5.37GB")
    limit(monkeypatch, RLIMIT_AS=8 * GIB, RLIMIT_DATA=2 * GIB)
    assert limited_cpu("CPU", 0, proc, proc / "none").memory_limit == GIB - RESERVED
    limit(monkeypatch, RLIMIT_AS=2 * GIB)
    assert limited_cpu("CPU", 0, proc, proc / "none").memory_limit == 0


def test_a_limit_above_the_machines_memory_or_none_changes_nothing(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in ({}, {"RLIMIT_AS": 64 * GIB}):
        limit(monkeypatch, **limits)
        assert limited_cpu("CPU", 0, proc, proc / "none") == Device("cpu", "CPU", 16 * GIB)
    limit(monkeypatch, RLIMIT_AS=8 * GIB)
    assert process_room(proc / "none") is None  # no such files on macOS


def test_free_memory_counts_it_while_an_engine_runs(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runner.device.memory.active_memory", lambda: 0)
    monkeypatch.setattr("engine.runner.device.memory.cached_memory", lambda: 5)
    limit(monkeypatch, RLIMIT_AS=4 * GIB)
    assert FreeMemory(Device("cpu", "CPU", 16 * GIB), proc, proc / "none")() == GIB - KEPT + 5


def test_too_little_for_threads_is_refused_before_a_thread_starts(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, RLIMIT_AS=3 * GIB + RESERVED)
    check_process_room(proc)
    limit(monkeypatch, RLIMIT_AS=3 * GIB + RESERVED - 1)
    with pytest.raises(MemoryPlanError, match=r"`ulimit -v` of 3.76GB leaves .*; raise it"):
        check_process_room(proc)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep to it")
def test_loads_under_a_tight_limit_are_refused_in_one_line_and_under_a_wide_one_they_run(tmp_path: Path) -> None:
    folder = write_whole(tmp_path)
    program = f"""
import resource, engine
from pathlib import Path
from engine.runner.device.devices import prepare_backend
prepare_backend()
import engine.llm
for megabytes in (1, 20, 100, 200, 300, 500, 700, 3000):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    try:
        with engine.LLM({str(folder)!r}, max_num_seqs=1) as llm:
            print(megabytes, "runs", len(llm.generate("a", use_tqdm=False)))
    except engine.MemoryPlanError as error:
        assert "ulimit -v" in str(error) and chr(10) not in str(error), error
        print(megabytes, "refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert all(ends[megabytes] == "refused" for megabytes in ("1", "20", "100", "200", "300", "500")), ends
    assert ends["3000"] == "runs 1"
