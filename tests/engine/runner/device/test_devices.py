import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.runner.device import cgroups, devices, memory
from engine.runner.device.threads import MLXWorker

GIB = 1 << 30


def fake_proc(tmp_path: Path, cgroup: str, total: int = 16 * GIB) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:       {total // 1024} kB\nMemFree: 5 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def write_limit(folder: Path, name: str, value: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{value}\n")


def test_without_cgroups_the_limit_is_physical_memory(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "0::/\n")
    assert devices.cpu_memory_limit(proc, tmp_path / "nothing") == 16 * GIB


def test_the_limit_of_a_parent_group_counts_and_max_means_none(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "0::/kubepods/pod1/notebook\n")
    groups = tmp_path / "cgroup"
    write_limit(groups / "kubepods/pod1/notebook", "memory.max", "max")
    write_limit(groups / "kubepods/pod1", "memory.max", 2 * GIB)
    write_limit(groups / "kubepods", "memory.max", 8 * GIB)
    assert devices.cpu_memory_limit(proc, groups) == 2 * GIB


def test_memory_high_counts_because_beyond_it_everything_crawls(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "0::/user\n")
    groups = tmp_path / "cgroup"
    write_limit(groups / "user", "memory.max", 4 * GIB)
    write_limit(groups / "user", "memory.high", 3 * GIB)
    assert devices.cpu_memory_limit(proc, groups) == 3 * GIB


def test_inside_a_container_only_the_root_group_is_there(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "0::/../../outside\n")
    groups = tmp_path / "cgroup"
    write_limit(groups, "memory.max", 2 * GIB)
    assert devices.cpu_memory_limit(proc, groups) == 2 * GIB


def test_version_1_groups_are_read_and_their_no_limit_number_is_above_physical_memory(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
    groups = tmp_path / "cgroup"
    write_limit(groups / "memory/docker/abc", "memory.limit_in_bytes", 9223372036854771712)
    assert devices.cpu_memory_limit(proc, groups) == 16 * GIB
    write_limit(groups / "memory/docker", "memory.limit_in_bytes", GIB)
    assert devices.cpu_memory_limit(proc, groups) == GIB


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/box\n", {"box/cpu.max": "150000 100000"}, 1),
        ("0::/box\n", {"box/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        ("0::/box\n", {"box/cpu.max": "50000 100000"}, 1),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "200000", "cpu/box/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_processors_are_counted_by_quota_and_affinity(
    cgroup: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    groups = tmp_path / "cgroup"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{text}\n")
    assert cgroups.usable_cpus(fake_proc(tmp_path, cgroup), groups) == cpus


def test_openblas_gets_as_many_threads_as_the_quota_allows_unless_the_user_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)
    for given, num_cpus, expected in (
        ({}, 1, {"OPENBLAS_NUM_THREADS": "1"}),
        ({}, 8, {}),
        ({"OMP_NUM_THREADS": "4"}, 1, {"OMP_NUM_THREADS": "4"}),
        ({"OPENBLAS_NUM_THREADS": "2"}, 1, {"OPENBLAS_NUM_THREADS": "2"}),
    ):
        env = dict(given)
        devices._limit_blas_threads(env, num_cpus)
        assert env == expected


def test_without_openblas_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices, "cuda_build_installed", lambda: False)
    monkeypatch.setattr(devices, "use_openblas", lambda *_: None)
    assert "pip install scipy-openblas32" in (devices.choose_blas.__wrapped__() or "")


def test_nothing_is_done_on_macos_and_for_cuda_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    assert devices.choose_blas.__wrapped__() is None
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices, "cuda_build_installed", lambda: True)
    assert devices.choose_blas.__wrapped__() is None


def test_the_device_of_this_machine_has_a_name_and_a_limit() -> None:
    device = devices.describe_device()
    assert device.name
    assert device.memory_limit > 0
    assert device.runs_packed_weights_fast == (device.kind != "cpu")


def test_array_memory_is_counted_and_the_peak_can_be_reset() -> None:
    import mlx.core as mx

    memory.reset_peak_memory()
    before = memory.active_memory()
    array = mx.zeros((1024, 1024))
    mx.eval(array)
    assert memory.active_memory() - before >= 4 << 20
    assert memory.peak_memory() - before >= 4 << 20
    del array
    memory.clear_cache()
    assert mx.get_cache_memory() == 0
    assert memory.active_memory() - before < 4 << 20


def test_the_set_up_leaves_the_limit_of_open_files_alone() -> None:
    code = (
        "import resource; before = resource.getrlimit(resource.RLIMIT_NOFILE);"
        "from engine.runner.device.devices import prepare_backend; prepare_backend();"
        "import sys; assert 'mlx_lm' in sys.modules;"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_process_ends_well_after_a_thread_that_used_mlx_and_left_properly() -> None:
    code = """
import threading
from engine.runner.device.threads import leave_thread
def work():
    import mlx.core as mx
    import mlx_lm.utils
    mx.eval(mx.ones((4, 4)) @ mx.ones((4, 4)))
    leave_thread()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts native threads in /proc")
def test_threads_that_use_mlx_one_after_another_share_a_stream() -> None:
    code = """
import os, threading
from engine.runner.device.threads import mlx_thread
def work():
    import mlx.core as mx
    with mlx_thread():
        mx.eval(mx.ones((4, 4)) @ mx.ones((4, 4)))
def run():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return len(os.listdir("/proc/self/task"))
first = run()
later = [run() for _ in range(6)]
assert max(later) <= first + 1, (first, later)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_runs_all_on_one_thread_which_ends_and_raises_what_was_raised_there() -> None:
    before = threading.active_count()
    with MLXWorker("vm-test") as worker:
        names = {worker.call(lambda: threading.current_thread().name) for _ in range(3)}
        assert names == {"vm-test"}
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 // 0)
        assert worker.call(lambda: 2) == 2
    assert threading.active_count() == before


def test_a_worker_whose_device_failed_is_left_alone() -> None:
    code = """
from engine.errors import DeviceFailedError
from engine.runner.device.faults import check_device
from engine.runner.device.threads import MLXWorker
def fail():
    raise RuntimeError("cudaStreamSynchronize failed: an illegal memory access was encountered")
for attempt in (lambda worker: worker.call(fail), lambda worker: check_device()):
    try:
        with MLXWorker() as worker:
            attempt(worker)
    except DeviceFailedError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("restart the kernel") == 2
    assert done.stderr == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_free_memory_goes_back_to_the_system() -> None:
    code = """
import os
from engine.memory.heap import return_free_memory
def resident_memory():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
blocks = [b"x" * (100_000 + number) for number in range(1000)]
del blocks[:-1]
before = resident_memory()
return_free_memory()
assert before - resident_memory() > 50e6, (before, resident_memory())
"""
    subprocess.run([sys.executable, "-c", code], check=True)
