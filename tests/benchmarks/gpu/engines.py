"""Models and engines for the GPU suite, made when first needed and given back when a case needs other ones."""

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.llm import LLM
from engine.runner.device.devices import describe_device
from tests.benchmarks.gpu import theirs
from tests.benchmarks.gpu.bandwidth import measure_machine
from tests.benchmarks.gpu.shapes import (
    SHAPES,
    kv_bytes_per_token,
    temporary_folder,
    text_config,
    weight_bytes,
    write_model,
)
from tests.benchmarks.gpu.sizes import Sizes
from tests.benchmarks.gpu.steps import Machine

_FOLDER_BYTES = 11 << 30
"""Of the bfloat16 model and the packed one, if they are the largest shape."""


class Engines:
    """This engine, the same without kernels, and mlx-lm's module, each on the same weights.

    ``folder`` keeps the models for the next run; without it they are gone at :meth:`close`.
    """

    def __init__(self, sizes: Sizes, folder: Path | None = None, machine: Machine | None = None) -> None:
        self.sizes = sizes
        self.rng = np.random.default_rng(0)
        self.machine: Machine = machine or measure_machine(sizes.read_bytes, sizes.matrix)
        self._wide: Engines | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if folder is None:
            self._temporary = temporary_folder(_FOLDER_BYTES)
            folder = Path(self._temporary.name)
        self._folder = folder
        self._ours: dict[tuple[bool, str, str], LLM] = {}
        self._theirs: dict[bool, Any] = {}

    def folder(self, packed: bool = False) -> Path:
        """The model's folder, bfloat16 or packed to 4 bits, written now if it is not there."""
        folder = self._folder / f"{self.sizes.shape}-{'4bit' if packed else 'bf16'}"
        if not (folder / "config.json").is_file():
            self.release()
            begin = time.perf_counter()
            num_bytes = write_model(folder, self.sizes.shape, packed=packed)
            seconds = time.perf_counter() - begin
            print(f"  {folder.name}: {num_bytes / 1e9:.2f} GB written in {seconds:.1f} s", flush=True)
        return folder

    def of_shape(self, shape: str) -> "Engines":
        """Engines of another shape, in place of all that is on the device. The last such shape's stay until then."""
        if self._wide is None or self._wide.sizes.shape != shape:
            self.release()
            sizes = replace(self.sizes, shape=shape, max_model_len=self.sizes.wide_max_model_len)
            self._wide = Engines(sizes, self._folder, self.machine)
        return self._wide

    def options(self, backend: str = "auto") -> dict[str, Any]:
        """Engine flags: memory is left to mlx-lm, and the engine without kernels gets less of it."""
        sizes, slow = self.sizes, backend != "auto"
        return {
            "attention_backend": backend,
            "max_model_len": sizes.slow_max_model_len if slow else sizes.max_model_len,
            "gpu_memory_utilization": sizes.slow_memory if slow else sizes.memory,
            "max_num_seqs": sizes.max_num_seqs,
            "max_num_batched_tokens": sizes.chunk,
        }

    def ours(self, packed: bool = False, backend: str = "auto", kv_cache_dtype: str = "auto") -> LLM:
        """The engine; those on other weights are closed first."""
        key = packed, backend, kv_cache_dtype
        found = self._ours.get(key)
        if found is None:
            self._release_weights(not packed)
            begin = time.perf_counter()
            options = self.options(backend) | {"kv_cache_dtype": kv_cache_dtype}
            if kv_cache_dtype != "auto":
                options["gpu_memory_utilization"] = self.sizes.slow_memory  # one more beside those that are there
            found = self._ours[key] = LLM(str(self.folder(packed)), **options)
            seconds = time.perf_counter() - begin
            print(
                f"  LLM, {backend}, pages in {kv_cache_dtype}, ready in {seconds:.1f} s: {'; '.join(found.notes)}",
                flush=True,
            )
        mx.clear_cache()
        return found

    def theirs(self, packed: bool = False) -> Any:
        """mlx-lm's module; what lies on other weights is given back first."""
        if packed not in self._theirs:
            self._release_weights(not packed)
            self._theirs[packed] = theirs.load(self.folder(packed))
        mx.clear_cache()
        return self._theirs[packed]

    def make_room(self, num_bytes: int) -> bool:
        """Close this engine's instances where the device has less than ``num_bytes`` left. Whether it did."""
        if not self._ours or describe_device().memory_limit - mx.get_active_memory() >= num_bytes:
            return False
        self._close(list(self._ours))
        return True

    def close_slow(self) -> None:
        """Close the engine without kernels, and the one whose pages are packed."""
        self._close([key for key in self._ours if key[1:] != ("auto", "auto")])

    def release(self) -> None:
        """Give back everything on the device."""
        if self._wide is not None:
            self._wide.release()
            self._wide = None
        self._release_weights(True)
        self._release_weights(False)

    def close(self) -> None:
        """:meth:`release`, and the models' folder where it is a temporary one."""
        self.release()
        if self._temporary is not None:
            self._temporary.cleanup()

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Prompts of random tokens, never the same twice."""
        vocab_size = text_config(self.sizes.shape)["vocab_size"]
        found: list[list[int]] = self.rng.integers(0, vocab_size - 1, (count, length)).tolist()
        return found

    def floor(self, lengths: Sequence[int], packed: bool = False) -> float:
        """Milliseconds that a step needs for reading the weights and the keys and values of ``lengths`` tokens."""
        kv_bytes = sum(lengths) * kv_bytes_per_token(self.sizes.shape)
        return self.machine.step_floor(weight_bytes(self.folder(packed)), kv_bytes)

    def prompt_floor(self, num_tokens: int) -> float:
        """Milliseconds of a prompt's products alone."""
        shape = SHAPES[self.sizes.shape]
        head = 2 * shape["vocab_size"] * shape["hidden_size"]  # is needed for one token only
        width = shape["num_attention_heads"] * shape["head_dim"]
        weights = weight_bytes(self.folder()) - head
        return self.machine.prompt_floor(weights, num_tokens, width, shape["num_hidden_layers"])

    def _release_weights(self, packed: bool) -> None:
        self._close([key for key in self._ours if key[0] == packed])
        self._theirs.pop(packed, None)
        gc.collect()
        mx.clear_cache()

    def _close(self, keys: list[tuple[bool, str, str]]) -> None:
        for key in keys:
            self._ours.pop(key).close()
        gc.collect()
        mx.clear_cache()
