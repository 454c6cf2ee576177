"""Packed weights of every kind as this device computes on them, beside the same weights unpacked, on the CPU.

Folders and GGUF files are those of ``tests/checkpoints``: tiny, so that all of them take a minute.
"""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import quantize

from engine.models.local import ResolvedModel
from engine.models.model_config import read_model_config
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device, describe_device
from engine.runner.load.gguf_blocks import PACKINGS
from engine.runner.load.loader import WEIGHT_READERS
from tests.checkpoints.folders import SAVED, write_saved
from tests.checkpoints.gguf import CASES, write
from tests.checkpoints.quantized import CHECKPOINTS
from tests.checkpoints.reference import PROMPT

_CPU = Device("cpu", "a CPU", 16 << 30)
_CLOSE = 5e-2
"""Of the largest logit: what the element types in which a GPU computes leave of tiny random models."""
_GGUF_MODELS = ("llama", "qwen3 moe", "gpt-oss")


def checkpoints(words: str = "") -> dict[str, str]:
    """Kind of file, of those with ``words`` -> how far logits are apart (of the largest), or what was raised."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as made:
        for number, (name, writer) in enumerate(_writers().items()):
            if words not in name:
                continue
            try:
                far = _difference(writer(Path(made, str(number))))
                found[name] = f"{far:.1e}" + ("" if far < _CLOSE else " WRONG")
            except Exception as error:  # noqa: BLE001  (whatever a device cannot do is what is looked for)
                found[name] = f"WRONG {type(error).__name__}: {' '.join(str(error).split())[:150]}"
            print(f"{name}: {found[name]}", flush=True)
    return found


def _writers() -> dict[str, Callable[[Path], ResolvedModel]]:
    folders: dict[str, Callable[[Path], Any]] = {
        name: kind.write for name, kind in CHECKPOINTS.items() if kind.refused is None and kind.runs
    }
    for saved in SAVED:
        folders[f"saved again: {saved}"] = partial(write_saved, saved)
    files = {f"GGUF {model} {kind.name}": (model, kind) for model in _GGUF_MODELS for kind in _written_by_gguf()}
    found: dict[str, Callable[[Path], ResolvedModel]] = {}
    for name, writer in folders.items():
        found[name] = partial(_folder, name, writer)
    for name, (model, kind) in files.items():
        found[name] = partial(_file, model, kind)
    return found


def _written_by_gguf() -> list[Type]:
    """Types that stay packed, as far as gguf can write them, and one that does not."""
    written = [Type.F32]
    for kind in PACKINGS:
        with suppress(NotImplementedError):
            quantize(np.zeros((1, 512), np.float32), kind)
            written.append(kind)
    return written


def _folder(name: str, writer: Callable[[Path], Any], folder: Path) -> ResolvedModel:
    writer(folder)
    return ResolvedModel(name, folder, "folder")


def _file(model: str, kind: Type, path: Path) -> ResolvedModel:
    write(path, CASES[model], kind)
    return ResolvedModel(path.name, path, "gguf")


def _difference(resolved: ResolvedModel) -> float:
    device = describe_device()
    packed, _ = _logits(resolved, device, mx.default_device())  # float32 is no type that packed weights run in there
    plain, largest = _logits(resolved, _CPU, mx.cpu)
    return float(np.abs(packed - plain).max() / largest)


def _logits(resolved: ResolvedModel, device: Device, stream: Any) -> tuple[Any, float]:
    args = EngineArgs(resolved.name)
    config = read_model_config(resolved, args)
    with mx.stream(stream):
        model = WEIGHT_READERS[resolved.kind].prepare(resolved, config, args, device).read(lambda *_: None)
        found = np.array(model(mx.array([list(PROMPT)]))[0].astype(mx.float32))
    return found, float(np.abs(found).max())
