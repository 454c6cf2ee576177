"""Which device MLX computes on in this process: what ``--device`` says, and one GPU of several.

MLX sees all GPUs, but it is no engine for two of them in one process. The buffers that it keeps for reuse are sorted by
size alone: one of another GPU is copied to managed memory, where every access is a transfer. Its limits are those of
one device, its default device is one for all threads, and the default stream of any GPU is made on the first. It also
makes a stream, and so a context of some hundred MB, on each GPU that it sees. So a process is shown one GPU, before
CUDA starts: which one is ``CUDA_VISIBLE_DEVICES``, as with any program. Several GPUs are several processes (see
:mod:`engine.batch.replicas`).
"""

import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.runner.device.devices import cuda_build_installed, prepare_backend

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Placement:
    """What this process was told. ``visible`` are CUDA's names of the GPUs it could see before."""

    visible: tuple[str, ...] | None = None
    index: int | None = None
    on_cpu: bool = False
    num_computing: int = 0
    """Models in this process."""


_placement = _Placement()
_lock = threading.Lock()


@contextmanager
def computing() -> Iterator[None]:
    """A model computes in this process: MLX's default device, which is that of all threads, stays what it is."""
    here = _placement
    with _lock:
        here.num_computing += 1
    try:
        yield
    finally:
        with _lock:
            here.num_computing -= 1


def place(wanted: str, env: MutableMapping[str, str] = os.environ) -> None:
    """Have MLX compute on ``wanted`` (as :func:`engine.params.device.device_name` gives it) from now on.

    Raises ConfigError for a device that is not here, with those that are, for another GPU than the one that this
    process uses already, and for another kind of device than a model of this process computes on: ``auto`` is its.
    """
    if wanted == "auto":
        if not _placement.num_computing:
            _leave_cpu()
        return
    names = device_names(env)
    kind, _, number = wanted.partition(":")
    if kind == "gpu":
        kind = next((name.partition(":")[0] for name in names if name != "cpu"), "gpu")
    if kind not in {name.partition(":")[0] for name in names} or (number and f"{kind}:{int(number)}" not in names):
        raise _refused(wanted, f"not here; this machine has {' and '.join(names)}")
    if _placement.num_computing and (kind == "cpu") != _on_cpu():
        others = "the GPU" if kind == "cpu" else "the CPU"
        raise _refused(wanted, f"a model of this process computes on {others}, and MLX has one device: close it first")
    if kind == "cpu":
        _take_cpu()
        return
    _leave_cpu()
    if number:
        _show_one(int(number), wanted, env)


def device_names(env: Mapping[str, str] = os.environ) -> list[str]:
    """The devices of this process as ``--device`` takes them: ``cuda:0``, ``cuda:1`` and ``cpu``, say."""
    if sys.platform == "darwin":
        return ["metal", "cpu"]
    return [*(f"cuda:{number}" for number in range(len(_visible(env)))), "cpu"]


def own_name(env: Mapping[str, str] = os.environ) -> str:
    """This process's device, by the names of :func:`device_names`."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return device_names(env)[0 if sys.platform == "darwin" else _placement.index or 0]


def environment_of(name: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of another process that is to compute on ``name``, one of :func:`device_names`."""
    return {**env, VISIBLE: cuda_name(name, env)} if name.startswith("cuda:") else dict(env)


def cuda_name(name: str, env: Mapping[str, str] = os.environ) -> str:
    """What CUDA calls ``cuda:N`` in :data:`VISIBLE`; the number itself where there is no such GPU here."""
    number = int(name.partition(":")[2])
    return dict(enumerate(_visible(env))).get(number, str(number))


def _visible(env: Mapping[str, str]) -> tuple[str, ...]:
    if _placement.visible is not None:
        return _placement.visible
    if not cuda_build_installed():
        return ()
    if VISIBLE in env:
        return tuple(filter(None, (name.strip() for name in env[VISIBLE].split(","))))
    return tuple(map(str, range(count_gpus())))


def count_gpus() -> int:
    """How many NVIDIA GPUs there are, asked of NVIDIA's management library: CUDA looks at its variable only once."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    return 0 if failed else count.value


def _show_one(index: int, wanted: str, env: MutableMapping[str, str]) -> None:
    """Show this process the GPU of that number alone."""
    visible, known = _visible(env), _placement.index
    if known is not None and known != index:
        raise _refused(
            wanted, f"this process computes on cuda:{known}, and on no other GPU until its kernel is restarted"
        )
    if known is not None or len(visible) == 1:
        return
    before = env.get(VISIBLE)
    env[VISIBLE] = visible[index]
    prepare_backend()
    import mlx.core as mx

    if mx.device_count(mx.gpu) != 1:  # CUDA had started, and looked at the variable then
        if before is None:
            del env[VISIBLE]
        else:
            env[VISIBLE] = before
        if index:
            raise _refused(
                wanted, "MLX has started on cuda:0 in this process; restart the kernel and name the device first"
            )
        return
    _placement.visible, _placement.index = visible, index


def _on_cpu() -> bool:
    mx = importlib.import_module("mlx.core")
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def _take_cpu() -> None:
    prepare_backend()
    mx = importlib.import_module("mlx.core")
    if not _on_cpu():
        mx.set_default_device(mx.cpu)
        _placement.on_cpu = True


def _leave_cpu() -> None:
    if _placement.on_cpu:
        mx = importlib.import_module("mlx.core")
        mx.set_default_device(mx.gpu)
        _placement.on_cpu = False


def _refused(wanted: str, why: str) -> ConfigError:
    return ConfigError(f"--device {wanted}: {why}", flag="device", value=wanted)
