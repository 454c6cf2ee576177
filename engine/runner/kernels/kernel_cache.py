"""CUDA kernels compiled once per machine: MLX keeps its own kernels on disk, but not those that it is given.

A kernel's text is compiled by NVIDIA's compiler here, its machine code kept in a private folder, and MLX launches
that. Where anything of this fails MLX compiles the text itself, as for Metal; the debug log says why.
"""

import hashlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.errors import error_line
from engine.models.pypi import cache_folder
from engine.runner.kernels.cuda_source import (
    KernelText,
    Signature,
    TemplateValue,
    UnsupportedKernelError,
    cuda_source,
    shape_arguments,
)
from engine.runner.kernels.kernel_store import KernelStore
from engine.runner.kernels.module_folder import ModuleFolder, module_folder
from engine.runner.kernels.nvrtc import CompileError, Compiler, find_compiler

logger = logging.getLogger("engine")

_MOST_THREADS = 8
_FIRST_NEW_ARCHITECTURE = 9
"""Major number from which MLX compiles for one architecture alone (``sm_90a``)."""


class KernelCompiler:
    """Compiles texts, or takes their machine code from disk. Any thread may call it.

    With ``modules`` MLX is given short tokens in place of the code.
    """

    def __init__(
        self, compiler: Compiler, store: KernelStore, architecture: str, identity: str, modules: ModuleFolder | None
    ) -> None:
        self._compiler = compiler
        self._store = store
        self._architecture = architecture
        self._identity = f"{identity}\n{architecture}\n{compiler.identity}\n"
        self.modules = modules
        self._codes: dict[str, bytes] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __call__(self, symbol: str, source: str) -> bytes:
        """Machine code of ``source``. Raises :class:`CompileError`."""
        key = hashlib.sha256((self._identity + source).encode()).hexdigest()
        with self._locks[key]:  # signatures often share a text
            if key not in self._codes:
                self._codes[key] = self._found_or_compiled(symbol, source, key)
            return self._codes[key]

    def _found_or_compiled(self, symbol: str, source: str, key: str) -> bytes:
        started = time.perf_counter()
        code = self._store.get(key)
        found = code is not None
        if code is None:
            code = self._compiler.compile(source, self._architecture)
            self._store.put(key, code)
        logger.debug(
            "kernel %s: %s, %d bytes, %.0f ms",
            symbol, "found" if found else "compiled", len(code), 1e3 * (time.perf_counter() - started),
        )  # fmt: skip
        return code

    def given(self, symbol: str, code: bytes) -> bytes:
        """What MLX is to be given for a launch of ``code``."""
        token = None if self.modules is None else self.modules.token(symbol, code)
        return token or code


class CachedKernel:
    """A kernel called as the result of ``mx.fast.cuda_kernel`` is; each signature of it is compiled once.

    ``by_mlx`` gives MLX's own, made when it is needed.
    """

    def __init__(self, text: KernelText, compiler: KernelCompiler, by_mlx: Callable[[], Any]) -> None:
        self.text = text
        self._compiler = compiler
        self._codes: dict[Signature, bytes] = {}
        self._by_mlx = cache(by_mlx)
        self._left_to_mlx = False

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
    ) -> list[mx.array]:
        """Launch it: ``grid`` counts threads, ``template`` gives the constants of the text."""
        signature = Signature.of(inputs, output_dtypes, template)
        awaited = _awaited.get()
        if awaited is not None:
            awaited.append((self, signature))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        code = self.compiled(signature)
        launch: dict[str, Any] = {
            "inputs": inputs,
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
        }
        if code is None:
            outputs: list[mx.array] = self._by_mlx()(template=list(template or ()), **launch)
            return outputs
        return mx.fast.precompiled_cuda_kernel(
            name=self.text.symbol,
            compiled_source=self._compiler.given(self.text.symbol, code),
            scalars=shape_arguments(self.text, inputs),
            ensure_row_contiguous=True,
            **launch,
        )

    def compiled(self, signature: Signature) -> bytes | None:
        """Machine code for ``signature``; None where the kernel is left to MLX."""
        if self._left_to_mlx:
            return None
        code = self._codes.get(signature)
        if code is None:
            try:
                code = self._compiler(self.text.symbol, cuda_source(self.text, signature))
            except (CompileError, UnsupportedKernelError) as error:
                logger.debug("kernel %s is left to MLX: %s", self.text.name, error)
                self._left_to_mlx = True
                return None
            self._codes[signature] = code
        return code


Awaited = list[tuple[CachedKernel, Signature]]
_awaited: ContextVar[Awaited | None] = ContextVar("awaited", default=None)


@contextmanager
def collecting() -> Iterator[Awaited]:
    """Inside, this thread's kernels give zeros and nothing runs; gives what :func:`compile_all` should compile."""
    awaited: Awaited = []
    token = _awaited.set(awaited)
    try:
        yield awaited
    finally:
        _awaited.reset(token)


def compile_all(awaited: Awaited, report: Callable[[int, int], None] | None = None) -> None:
    """Compile several kernels at once, each signature once; ``report(done, total)`` after each, on this thread."""
    wanted = list({(id(kernel), signature): (kernel, signature) for kernel, signature in awaited}.values())
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "compile") as pool:
        tasks = [pool.submit(kernel.compiled, signature) for kernel, signature in wanted]
        try:
            for done, task in enumerate(tasks, 1):
                task.result()
                if report is not None:
                    report(done, len(tasks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cached_kernel(
    name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = ""
) -> Any:
    """As ``mx.fast.cuda_kernel``, from the cache where that works on this machine."""

    def by_mlx() -> Any:
        return mx.fast.cuda_kernel(
            name=name, input_names=list(input_names), output_names=list(output_names), source=source, header=header
        )

    compiler = kernel_compiler()
    if compiler is None:
        return by_mlx()
    return CachedKernel(KernelText(name, tuple(input_names), tuple(output_names), source, header), compiler, by_mlx)


@cache
def kernel_compiler() -> KernelCompiler | None:
    """This process's compiler of kernels, None where MLX has to compile them itself."""
    compiler = find_compiler()
    if compiler is None:
        logger.debug("kernels are left to MLX: it has loaded no compiler that works here")
        return None
    info = mx.device_info()
    architecture = machine_architecture(info)
    version = metadata.version("mlx")
    identity = f"MLX {version} {info.get('device_name')}"
    folder = cache_folder().parent / "kernels"
    store, modules = KernelStore(folder), _modules(folder / f"mlx-{version}-{architecture}")
    made = KernelCompiler(compiler, store, architecture, identity, modules)
    if modules is not None and (problem := probe(made)):
        logger.debug("kernels are launched with all of their code: %s", problem)
        made.modules = None
    problem = probe(made) if made.modules is None else None
    if problem:
        logger.debug("kernels are left to MLX: %s", problem)
        return None
    return made


def machine_architecture(info: dict[str, Any]) -> str:
    """What the compiler calls the GPU that ``mx.device_info`` describes."""
    architecture = str(info["architecture"])
    new = int(info["compute_capability_major"]) >= _FIRST_NEW_ARCHITECTURE
    return f"{architecture}a" if new else architecture


def _modules(own: Path) -> ModuleFolder | None:
    try:
        return module_folder(own)
    except (OSError, AttributeError):
        return None


def probe(compiler: KernelCompiler) -> str | None:
    """Run a small kernel; one line that says what went wrong, or None."""
    text = KernelText("probe", ("x",), ("y",), "y[threadIdx.x] = x[threadIdx.x] + STEP * x_shape[0];")
    try:
        code = compiler(text.symbol, cuda_source(text, _PROBED))
        (found,) = mx.fast.precompiled_cuda_kernel(
            name=text.symbol,
            compiled_source=compiler.given(text.symbol, code),
            inputs=[mx.arange(32, dtype=mx.int32)],
            output_shapes=[(32,)],
            output_dtypes=[mx.int32],
            scalars=[32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )
        right = found.tolist() == [number + 3 * 32 for number in range(32)]
    except Exception as error:  # noqa: BLE001  (MLX may object in any way; it still compiles kernels itself)
        return error_line(error, 120)
    return None if right else "a small kernel gave wrong results"


_PROBED = Signature(((mx.int32, 1),), (mx.int32,), (("STEP", 3),))
