"""The device, its kernels, memory and its limits, and the folders that models are kept in."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.checkup.device_probe import Probe
from engine.checkup.findings import Finding
from engine.checkup.packages import mlx_fix
from engine.checkup.subject import Model
from engine.params.sizes import plain_size

_LOW_MEMORY, _LOW_DISK, _NO_DISK = 1 << 30, 10 << 30, 1 << 30
"""Bytes below which there is hardly room for a model, or none."""
_UNDER_WAY = 120.0
"""Seconds since something was written to a download that may still be going on."""
_MOST_FILES = 10_000
_RESTART = "restart the kernel"


def check_device(probe: Probe) -> Iterator[Finding]:
    """What MLX computes on, and on a CPU with which BLAS."""
    if probe.error:
        fix = mlx_fix() if probe.at in ("", "mlx", "engine") else f"mend the package {probe.at}"
        yield Finding("device", "MLX", probe.error, "problem", f"{fix}, then {_RESTART}")
        return
    yield Finding("device", "MLX", f"computes on {probe.name} ({probe.kind})")
    if probe.blas is not None:
        slow = "without" in probe.blas
        fix = f"pip install scipy-openblas32, then {_RESTART}" if slow else ""
        yield Finding(
            "device", "BLAS", probe.blas.removeprefix("CPU: ").partition("; ")[0], "warning" if slow else "ok", fix
        )


def check_imports(probe: Probe) -> Iterator[Finding]:
    """What is installed and cannot be imported."""
    for name, error in probe.broken.items():
        fix = f"pip install --force-reinstall {name.replace('_', '-').lower()}, then {_RESTART}"
        yield Finding("installation", f"import {name}", error, "problem", fix)


def check_failed_device() -> Iterator[Finding]:
    """Whether the GPU failed under this process."""
    from engine.errors import DeviceFailedError
    from engine.runner.device.faults import check_device as refuse

    try:
        refuse()
    except DeviceFailedError as error:
        yield Finding("device", "this process", str(error), "problem", _RESTART)


def check_kernels(probe: Probe, model: Model | None) -> Iterator[Finding]:
    """Whether kernels are right here: as the loaded model found at its load, else one that was tried now."""
    if probe.error:
        return
    if probe.kind == "cpu":
        yield Finding("kernels", "attention", "none needed: MLX computes on the CPU")
    elif model is not None:
        from engine.runner.kv.attention_path import describe

        yield Finding("kernels", "attention", f"checked when the model was loaded: {describe(model.attention_paths)}")
    elif probe.kernels is None:
        fix = "update the driver and MLX; replies are right without kernels, but slower"
        yield Finding("kernels", "attention", "this GPU runs none of ours", "warning", fix)
    elif probe.kernels:
        fix = "%vllm_metal bench --kernels says more; --attention-backend reference does without them"
        yield Finding("kernels", "attention", probe.kernels, "problem", fix)
    else:
        yield Finding("kernels", "attention", "one was tried and is right (%vllm_metal bench --kernels tries all)")


def check_memory(probe: Probe, model: Model | None) -> Iterator[Finding]:
    """What the device has, what is free of it, what limits this process, and what other kernels hold."""
    if not probe.error:
        low = probe.free < _LOW_MEMORY and model is None
        fix = "close other kernels and programs (%vllm_metal unload frees a model)" if low else ""
        text = f"{plain_size(probe.limit)} for this process, {plain_size(probe.free)} free now"
        yield Finding("memory", "device", text, "warning" if low else "ok", fix)
    if model is not None:
        in_use = model.memory_in_use()
        yield Finding("memory", "this model", f"{plain_size(in_use)} in use of {plain_size(model.planned)} planned")
    yield from _limits()
    yield from _others(0 if probe.error else probe.limit, 0 if model is None else model.planned)


def _limits() -> Iterator[Finding]:
    from engine.runner.device.devices import cpu_memory_limit, physical_memory
    from engine.runner.device.rlimits import process_room

    physical = physical_memory()
    group = cpu_memory_limit()
    if group < physical:
        yield Finding("memory", "container", f"limited to {plain_size(group)} of {plain_size(physical)}")
    if room := process_room():
        yield Finding("memory", "this process", str(room), "warning", f"{room.name} unlimited where Jupyter is started")


def _others(limit: int, planned: int) -> Iterator[Finding]:
    from engine.runtime.neighbours import neighbours

    others = neighbours()
    if not others:
        yield Finding("memory", "other kernels", "none holds a model")
        return
    theirs, in_use = sum(held.planned for held in others), sum(held.in_use for held in others)
    too_much = bool(limit) and theirs + planned > limit
    names = tuple(name for held in others for name in (str(held), held.model, held.notebook))
    text = f"{'; '.join(map(str, others))}: up to {plain_size(theirs)} planned, {plain_size(in_use)} in use"
    fix = "%vllm_metal unload there, or --gpu-memory-utilization with a share for each" if too_much else ""
    yield Finding("memory", "other kernels", text, "warning" if too_much else "ok", fix, private=names)


def check_model_cache() -> Iterator[Finding]:
    """Whether models can be read and kept, how much room there is, and what was left half-finished."""
    from engine.models.local import hub_cache, offline
    from engine.models.pypi import cache_folder

    for name, folder in (("hub", hub_cache()), ("package models", cache_folder())):
        yield _folder(name, folder)
    yield _room(hub_cache())
    yield from _unfinished(hub_cache())
    if offline(os.environ):
        yield Finding("model cache", "network", "turned off by a variable: only models that are here load")


def _folder(name: str, folder: Path) -> Finding:
    area, private = "model cache", (str(folder),)
    there = _nearest(folder)
    if there != folder and (not there.is_dir() or not os.access(there, os.W_OK | os.X_OK)):
        fix = f"make {folder} a folder that you may write to, or set HF_HOME to another"
        return Finding(area, name, f"{folder} cannot be made", "problem", fix, private)
    if there != folder:
        return Finding(area, name, f"{folder} will be made by the first download", private=private)
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return Finding(
            area, name, f"{folder} cannot be read", "problem", f"chmod u+rwx {folder}, or set HF_HOME", private
        )
    if not os.access(folder, os.W_OK):
        fix = f"chmod u+w {folder}, or set HF_HOME, to download models"
        return Finding(area, name, f"{folder} cannot be written to", "warning", fix, private)
    return Finding(area, name, f"{folder} can be read and written", private=private)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the first of those around it that is there."""
    return next((path for path in (folder, *folder.parents) if path.exists()), folder)


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(_nearest(folder)).free
    text = f"{plain_size(free)} free"
    if free < _NO_DISK:
        return Finding("model cache", "disk", text, "problem", "free some space, or set HF_HOME to another disk")
    if free < _LOW_DISK:
        return Finding("model cache", "disk", text, "warning", "larger models need more: free some, or set HF_HOME")
    return Finding("model cache", "disk", text)


def _unfinished(folder: Path) -> Iterator[Finding]:
    """Downloads that were broken off: they go on where the model is loaded again."""
    sizes, running = [], 0
    for number, path in enumerate(folder.glob("models--*/blobs/*.incomplete")):
        if number >= _MOST_FILES:
            break
        try:
            status = path.stat()
        except OSError:  # finished just now
            continue
        if time.time() - status.st_mtime < _UNDER_WAY:
            running += 1
        else:
            sizes.append(status.st_size)
    if running:
        yield Finding("model cache", "downloads", f"{running} under way")
    if sizes:
        fix = "load the model again to finish it; else hf cache prune, or delete its *.incomplete files"
        yield Finding("model cache", "downloads", f"{_files(sizes)} not finished", "warning", fix)


def _files(sizes: Sequence[int]) -> str:
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)} ({plain_size(sum(sizes))})"
