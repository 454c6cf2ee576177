"""``python3 -m tests.kernel_cache_on_device``: compiled kernels on disk, on this machine's CUDA GPU. Under a minute.

Needs mlx and what the engine imports. Processes of its own share a new cache folder: the first compiles, the second
finds, the third meets a torn file. Prints seconds, bytes and the host's cost of a launch; exits 1 where one is wrong.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.runner.kernels import kernel_cache, paged_attention
from engine.runner.kernels.cuda_source import KernelText
from engine.runner.kernels.kernel_cache import CachedKernel, KernelCompiler, collecting, compile_all, kernel_compiler

LAUNCHES = 64
ROUNDS = 40
ROWS, HEADS, KV_HEADS, DIM, BLOCK_SIZE, BLOCKS = 2, 16, 4, 128, 16, 8


def case() -> dict[str, Any]:
    """Inputs of decode attention, the same in every process."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(mx.bfloat16)

    pages = (1, KV_HEADS, ROWS * BLOCKS * BLOCK_SIZE, DIM)
    tables = mx.array(np.arange(ROWS * BLOCKS, dtype=np.int32).reshape(ROWS, BLOCKS))
    return {
        "queries": values(ROWS, HEADS, 1, DIM),
        "new_keys": values(ROWS, KV_HEADS, 1, DIM),
        "new_values": values(ROWS, KV_HEADS, 1, DIM),
        "key_pages": values(*pages),
        "value_pages": values(*pages),
        "block_tables": tables + 0,
        "positions": mx.array([100, 37, -1], dtype=mx.int32) + 0,
        "scale": DIM**-0.5,
        "block_size": BLOCK_SIZE,
        "splits": 2,
    }


def attend(inputs: dict[str, Any]) -> mx.array:
    """Decode attention in two splits, and so two kernels."""
    return paged_attention.paged_attention(**inputs)


def collect(inputs: dict[str, Any]) -> mx.array:
    """Keys of a chunk of four tokens behind sixteen."""
    rows = mx.broadcast_to(inputs["new_keys"][:1], (1, KV_HEADS, 4, DIM)) + 0
    span = mx.array([0, 16, 0, 0], dtype=mx.int32) + 0
    table, pages = inputs["block_tables"][0] + 0, (inputs["key_pages"] + 0, inputs["value_pages"] + 0)
    return paged_attention.collect(rows, rows, *pages, table, span, block_size=BLOCK_SIZE, length=20)[0]


def as_floats(array: mx.array) -> list[float]:
    """Values that JSON takes."""
    return [float(value) for value in np.array(array.astype(mx.float32)).ravel()]


def once() -> None:
    """One process: everything timed, as JSON on one line."""
    found: dict[str, Any] = {}
    started = time.perf_counter()
    compiler = kernel_compiler()
    found["start_s"] = time.perf_counter() - started
    if compiler is None:
        print(json.dumps({"left_to_mlx": True}), flush=True)
        return
    found["launched_by"] = "token" if compiler.modules else "code"
    inputs = case()
    mx.eval([value for value in inputs.values() if isinstance(value, mx.array)])
    with collecting() as awaited:
        attend(inputs), collect(inputs)
    compiled: list[str] = []
    inner = compiler._compiler
    compiler._compiler = Watched(inner, compiled)
    started = time.perf_counter()
    compile_all(awaited)
    found["compile_all_s"] = time.perf_counter() - started
    found["compiled"] = len(compiled)
    found["bytes"] = {kernel.text.name: len(kernel.compiled(signature) or b"") for kernel, signature in awaited}
    started = time.perf_counter()
    results = [attend(inputs), collect(inputs)]
    mx.eval(results)
    found["first_run_s"] = time.perf_counter() - started
    found["results"] = [as_floats(result) for result in results]
    print(json.dumps(found), flush=True)


class Watched:
    """A compiler that notes what it compiles."""

    def __init__(self, inner: Any, compiled: list[str]) -> None:
        self.identity = inner.identity
        self._inner, self._compiled = inner, compiled

    def compile(self, source: str, architecture: str) -> bytes:
        self._compiled.append(architecture)
        code: bytes = self._inner.compile(source, architecture)
        return code


def in_a_process(cache: Path) -> dict[str, Any]:
    """What :func:`once` finds in a process of its own that keeps kernels below ``cache``."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "tests.kernel_cache_on_device", "once"]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": " ".join((done.stderr or "no output").split())[-600:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process_s": time.perf_counter() - started}


def show(title: str, found: dict[str, Any]) -> None:
    """One process's figures, but for the results."""
    figures = {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}
    figures.pop("results", None)
    print(f"{title}: {figures}", flush=True)


def by_mlx_alone() -> tuple[list[list[float]], float]:
    """The same results from ``mx.fast.cuda_kernel``, and the seconds until they are there."""
    inputs = case()
    mx.eval([value for value in inputs.values() if isinstance(value, mx.array)])
    with collecting() as awaited:
        attend(inputs), collect(inputs)
    kernels = {id(kernel): kernel for kernel, _ in awaited}.values()
    for kernel in kernels:
        kernel._left_to_mlx = True
    started = time.perf_counter()
    results = [attend(inputs), collect(inputs)]
    mx.eval(results)
    seconds = time.perf_counter() - started
    for kernel in kernels:
        kernel._left_to_mlx = False
    return [as_floats(result) for result in results], seconds


def host_microseconds(compiler: KernelCompiler) -> dict[str, float]:
    """Of one launch of a kernel with a text as long as decode attention's, over 64 in a chain; least of 40 rounds."""
    # Comments would be no part of a text that the project gives to MLX; here they make the length.
    padding = "// " + "x" * 10_000 + "\n"
    text = KernelText("chain", ("x",), ("y",), f"{padding}y[threadIdx.x] = x[threadIdx.x] + 1.0f * x_shape[0];")
    by_mlx = mx.fast.cuda_kernel(name="chain", input_names=["x"], output_names=["y"], source=text.source)
    ours = CachedKernel(text, compiler, lambda: by_mlx)
    modules = compiler.modules
    found = {"mx.fast.cuda_kernel, 10 kB of text": _chain(by_mlx)}
    if modules is not None:
        found["precompiled, by a token"] = _chain(ours)
    compiler.modules = None
    found["precompiled, by its code (small kernel)"] = _chain(ours)
    code = dict.fromkeys(ours._codes, b"")  # the same code, followed by as much as decode attention has
    ours._codes = {signature: ours._codes[signature] + bytes(68_000) for signature in code}
    found["precompiled, by its code and 68 kB"] = _chain(ours)
    compiler.modules = modules
    return found


def _chain(kernel: Callable[..., list[mx.array]]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        x = mx.zeros((32,))
        mx.eval(x)
        for _ in range(LAUNCHES):
            (x,) = kernel(
                inputs=[x], template=[], grid=(32, 1, 1), threadgroup=(32, 1, 1),
                output_shapes=[(32,)], output_dtypes=[mx.float32],
            )  # fmt: skip
        started = time.perf_counter()
        mx.async_eval(x)
        best = min(best, time.perf_counter() - started)
        mx.synchronize()
        wrong = x.tolist() != [32.0 * LAUNCHES] * 32
        if wrong:
            raise SystemExit(f"wrong: a chain of launches gives {x.tolist()[:4]}")
    return 1e6 * best / LAUNCHES


def check() -> list[str]:
    """All of it; lines that say what is wrong."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        first = in_a_process(Path(folder))
        show("first process", first)
        second = in_a_process(Path(folder))
        show("second process", second)
        files = sorted((Path(folder) / "vm-magic" / "kernels").glob("*.kernel"), key=lambda path: path.stat().st_size)
        if files:
            files[-1].write_bytes(files[-1].read_bytes()[:-100])
        third = in_a_process(Path(folder))
        show("with a torn file", third)
    for title, found, compiled in (("first", first, 3), ("second", second, 0), ("third", third, 1)):
        if "results" not in found:
            wrong.append(f"{title} process: no kernels from the cache: {found}")
        elif found["compiled"] != compiled:
            wrong.append(f"{title} process: compiled {found['compiled']} kernels, not {compiled}")
        elif found["results"] != first["results"]:
            wrong.append(f"{title} process: other results than the first")
    theirs, seconds = by_mlx_alone()
    print(f"compiled by MLX in this process: {seconds:.2f} s", flush=True)
    if "results" in first:
        for name, ours, other in zip(("attention", "collect"), first["results"], theirs, strict=True):
            difference = float(np.abs(np.array(ours) - np.array(other)).max())
            print(f"{name}: largest difference from MLX's compilation {difference:.2g}", flush=True)
            if not difference <= (2e-2 if name == "attention" else 0.0):
                wrong.append(f"{name}: differs by {difference:.2g} from what MLX compiles")
    compiler = kernel_compiler()
    if compiler is not None:
        for title, microseconds in host_microseconds(compiler).items():
            print(f"host, {title}: {microseconds:.2f} µs a launch", flush=True)
    return wrong


def main() -> int:
    """Run the check, or in a process of its own one part of it."""
    if not mx.cuda.is_available():
        print("MLX has no CUDA GPU here")
        return 1
    if sys.argv[1:] == ["once"]:
        once()
        return 0
    compiler = kernel_cache.find_compiler()
    print(f"mlx {kernel_cache.metadata.version('mlx')}, {mx.device_info().get('device_name')}", flush=True)
    print(compiler.identity if compiler else "no compiler of kernels is loaded", flush=True)
    wrong = check()
    print("\n".join(f"WRONG: {line}" for line in wrong) or "all right", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
