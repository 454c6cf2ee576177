"""Kernels that are compiled once per machine, with a stand-in for NVIDIA's compiler and for MLX's launch."""

import itertools
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from engine.runner.kernels import kernel_cache  # noqa: E402
from engine.runner.kernels.cuda_source import KernelText  # noqa: E402
from engine.runner.kernels.kernel_cache import (  # noqa: E402
    CachedKernel,
    KernelCompiler,
    cached_kernel,
    collecting,
    compile_all,
    machine_architecture,
    probe,
)
from engine.runner.kernels.kernel_store import KernelStore  # noqa: E402
from engine.runner.kernels.module_folder import ModuleFolder  # noqa: E402
from engine.runner.kernels.nvrtc import CompileError  # noqa: E402


class StandIn:
    """Compiles a text to its name and a number; notes the texts and the threads."""

    def __init__(self, identity: str = "NVRTC 13.0", wait: threading.Barrier | None = None) -> None:
        self.identity = identity
        self.compiled: list[tuple[str, str]] = []
        self._numbers = itertools.count()
        self._wait = wait

    def compile(self, source: str, architecture: str) -> bytes:
        if "wrong" in source:
            raise CompileError('kernel.cu(3): error: identifier "wrong" is undefined')
        if self._wait is not None:
            self._wait.wait(5)  # broken, and so an error, unless as many compile at once
        self.compiled.append((source, architecture))
        return f"code {next(self._numbers)} of {len(source)}".encode()


class Launches(list[dict[str, Any]]):
    """What MLX was told to launch; gives zeros."""

    def __call__(self, **launch: Any) -> list[Any]:
        self.append(launch)
        return [mx.zeros(shape, d) for shape, d in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", made)
    return made


def compiler_of(stand_in: StandIn, folder: Path, modules: ModuleFolder | None = None, **changes: str) -> KernelCompiler:
    named = {"architecture": "sm_90a", "identity": "MLX 0.32.4 H200", **changes}
    return KernelCompiler(stand_in, KernelStore(folder / "kernels"), modules=modules, **named)


def kernel(compiler: KernelCompiler, source: str = "y[0] = x_shape[0] * SIZE;", mlx: Any = None) -> CachedKernel:
    def by_mlx() -> Any:
        assert mlx is not None, "MLX must not compile this"
        return mlx

    return CachedKernel(KernelText("scale", ("x",), ("y",), source), compiler, by_mlx)


def launch(called: Any, rows: int = 3, size: int = 2, dtype: Any = None) -> Any:
    return called(
        inputs=[mx.zeros((rows, 4), dtype or mx.float32)], template=[("SIZE", size)], grid=(64, 2, 1),
        threadgroup=(32, 1, 1), output_shapes=[(rows,)], output_dtypes=[mx.float16],
    )  # fmt: skip


def test_a_launch_passes_code_arrays_and_shapes(tmp_path: Path, launches: Launches) -> None:
    (given,) = launch(kernel(compiler_of(StandIn(), tmp_path)))
    assert (given.shape, given.dtype) == ((3,), mx.float16)
    (told,) = launches
    assert told.pop("compiled_source").startswith(b"code 0 of ")
    assert [array.shape for array in told.pop("inputs")] == [(3, 4)]
    assert told == {
        "name": "vm_magic_scale", "scalars": [3, 4], "grid": (64, 2, 1), "threadgroup": (32, 1, 1),
        "output_shapes": [(3,)], "output_dtypes": [mx.float16], "ensure_row_contiguous": True,
    }  # fmt: skip


def test_each_signature_is_compiled_once_whatever_the_sizes(tmp_path: Path, launches: Launches) -> None:
    stand_in = StandIn()
    called = kernel(compiler_of(stand_in, tmp_path))
    for rows, size, dtype in [(3, 2, None), (5, 2, None), (3, 7, None), (3, 2, mx.bfloat16), (9, 7, None)]:
        launch(called, rows, size, dtype)
    assert len(stand_in.compiled) == 3
    assert [told["scalars"] for told in launches] == [[3, 4], [5, 4], [3, 4], [3, 4], [9, 4]]
    assert launches[0]["compiled_source"] == launches[1]["compiled_source"]
    assert launches[2]["compiled_source"] == launches[4]["compiled_source"] != launches[0]["compiled_source"]


def test_another_process_finds_what_was_compiled(tmp_path: Path, launches: Launches) -> None:
    launch(kernel(compiler_of(StandIn(), tmp_path)))
    second = StandIn()
    launch(kernel(compiler_of(second, tmp_path)))
    assert not second.compiled
    assert launches[0]["compiled_source"] == launches[1]["compiled_source"]


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "sm_100a"},
        {"identity": "MLX 0.33.0 H200"},
        {"compiler": "NVRTC 13.1"},
        {"source": "y[0] = SIZE;"},
    ],
    ids=["architecture", "MLX or device", "compiler", "text"],
)
def test_what_would_give_other_code_is_another_key(tmp_path: Path, launches: Launches, changes: dict[str, str]) -> None:
    launch(kernel(compiler_of(StandIn(), tmp_path)))
    second = StandIn(changes.pop("compiler", "NVRTC 13.0"))
    text = {"source": changes.pop("source")} if "source" in changes else {}
    launch(kernel(compiler_of(second, tmp_path, **changes), **text))
    assert len(second.compiled) == 1
    assert second.compiled[0][1] == changes.get("architecture", "sm_90a")


def test_a_torn_file_is_compiled_again_and_replaced(tmp_path: Path, launches: Launches) -> None:
    launch(kernel(compiler_of(StandIn(), tmp_path)))
    (path,) = (tmp_path / "kernels").glob("*.kernel")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    second = StandIn()
    launch(kernel(compiler_of(second, tmp_path)))
    assert len(second.compiled) == 1
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path, launches: Launches) -> None:
    (tmp_path / "kernels").write_text("a file in its place")
    stand_in = StandIn()
    called = kernel(compiler_of(stand_in, tmp_path))
    launch(called), launch(called)
    assert len(stand_in.compiled) == 1
    assert len(launches) == 2


def test_a_token_stands_for_code_where_mlx_looks_for_it(tmp_path: Path, launches: Launches) -> None:
    modules = ModuleFolder(tmp_path)
    launch(kernel(compiler_of(StandIn(), tmp_path, modules)))
    (path,) = tmp_path.glob("*.ptx")
    assert path.read_bytes().startswith(b"code 0 of ")
    assert len(launches[0]["compiled_source"]) == 32


def test_without_a_place_for_code_it_is_given_itself(tmp_path: Path, launches: Launches) -> None:
    launch(kernel(compiler_of(StandIn(), tmp_path, ModuleFolder(tmp_path / "missing"))))
    assert launches[0]["compiled_source"].startswith(b"code 0 of ")


@pytest.mark.parametrize("source", ["wrong", "y[0] = x_strides[0];"], ids=["does not compile", "reads strides"])
def test_what_does_not_compile_here_is_left_to_mlx_with_a_line_in_the_debug_log(
    tmp_path: Path, launches: Launches, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    by_mlx = Launches()
    called = kernel(compiler_of(StandIn(), tmp_path), source, by_mlx)
    with caplog.at_level(logging.DEBUG, "engine"):
        launch(called), launch(called, size=9)
    assert not launches
    assert [told["template"] for told in by_mlx] == [[("SIZE", 2)], [("SIZE", 9)]]
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == ["kernel scale is left to MLX"]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_collected_kernels_compile_at_the_same_time_and_each_once(tmp_path: Path, launches: Launches) -> None:
    stand_in = StandIn(wait=threading.Barrier(2))
    called = kernel(compiler_of(stand_in, tmp_path))
    with collecting() as awaited:
        given = [launch(called, rows, size)[0] for rows, size in [(3, 2), (4, 5), (5, 2)]]
    assert [array.tolist() for array in given] == [[0.0] * 3, [0.0] * 4, [0.0] * 5]
    assert not launches
    assert not stand_in.compiled
    seen: list[tuple[int, int]] = []
    compile_all(awaited, lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    assert len(stand_in.compiled) == 2
    launch(called, 3, 2), launch(called, 3, 5)
    assert len(stand_in.compiled) == 2
    assert len(launches) == 2


def test_an_interrupt_ends_compiling_and_collecting(tmp_path: Path) -> None:
    stand_in = StandIn()
    called = kernel(compiler_of(stand_in, tmp_path))
    with pytest.raises(KeyboardInterrupt), collecting():
        raise KeyboardInterrupt
    assert kernel_cache._awaited.get() is None
    with collecting() as awaited:
        for size in range(40):
            launch(called, size=size)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all(awaited, interrupt)


def test_signatures_that_share_a_text_are_compiled_once_however_many_threads_ask(
    tmp_path: Path, launches: Launches
) -> None:
    class Slow(StandIn):
        def compile(self, source: str, architecture: str) -> bytes:
            time.sleep(0.05)
            return super().compile(source, architecture)

    stand_in = Slow()
    compiler = compiler_of(stand_in, tmp_path)
    threads = [threading.Thread(target=compiler, args=("k", "one text")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stand_in.compiled) == 1
    assert compiler("k", "one text") == b"code 0 of 8"


def test_kernels_of_other_threads_are_not_collected(tmp_path: Path, launches: Launches) -> None:
    called = kernel(compiler_of(StandIn(), tmp_path))
    with collecting() as awaited:
        thread = threading.Thread(target=launch, args=(called,))
        thread.start()
        thread.join()
    assert not awaited
    assert len(launches) == 1


def test_nothing_collected_is_nothing_to_compile() -> None:
    compile_all([])


def test_kernels_work_inside_a_compiled_function(tmp_path: Path, launches: Launches) -> None:
    called = kernel(compiler_of(StandIn(), tmp_path))
    step = mx.compile(lambda x: x * 2 + called(
        inputs=[x], template=[("SIZE", 2)], grid=(1, 1, 1), threadgroup=(1, 1, 1),
        output_shapes=[x.shape], output_dtypes=[x.dtype])[0])  # fmt: skip
    assert [step(mx.ones((2, 3)) * number).tolist()[0][0] for number in (1, 4)] == [2.0, 8.0]
    assert len(launches) == 1  # traced once
    assert launches[0]["scalars"] == [2, 3]


def test_a_small_kernel_says_whether_any_can_be_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler_of(StandIn(), tmp_path)

    def right(**told: Any) -> list[Any]:
        return [told["inputs"][0] + 3 * told["scalars"][0]]

    def broken(**told: Any) -> list[Any]:
        raise RuntimeError("Failed to load compiled vm_magic_probe kernel: .")

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", right)
    assert probe(compiler) is None
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", lambda **told: told["inputs"])
    assert probe(compiler) == "a small kernel gave wrong results"
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", broken)
    assert probe(compiler) == "RuntimeError: Failed to load compiled vm_magic_probe kernel: ."


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with CUDA as far as this module can see; ``right(told)`` says whether a launch works."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "find_compiler", StandIn)
    monkeypatch.setattr(kernel_cache, "_modules", lambda own: ModuleFolder(tmp_path))
    info = {"architecture": "sm_90", "compute_capability_major": 9, "device_name": "H200"}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    kernel_cache.kernel_compiler.cache_clear()

    def set_up(right: Any) -> None:
        def run(**told: Any) -> list[Any]:
            if not right(told):
                raise RuntimeError("Failed to load")
            return [told["inputs"][0] + 3 * told["scalars"][0]]

        monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", run)

    yield set_up
    kernel_cache.kernel_compiler.cache_clear()


def test_tokens_are_used_where_the_small_kernel_runs_by_one(machine: Any) -> None:
    machine(lambda told: len(told["compiled_source"]) == 32)
    compiler = kernel_cache.kernel_compiler()
    assert compiler is not None
    assert compiler.modules is not None


def test_code_is_given_itself_where_mlx_does_not_know_the_token(machine: Any) -> None:
    machine(lambda told: told["compiled_source"].startswith(b"code"))
    compiler = kernel_cache.kernel_compiler()
    assert compiler is not None
    assert compiler.modules is None


def test_mlx_compiles_where_nothing_can_be_launched(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(lambda told: False)
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **told: made.append(told) or "a kernel of MLX")
    assert kernel_cache.kernel_compiler() is None
    assert cached_kernel("k", ("x",), ("y",), "source", "header") == "a kernel of MLX"
    assert made == [{"name": "k", "input_names": ["x"], "output_names": ["y"], "source": "source", "header": "header"}]


def test_kernels_are_kept_beside_the_projects_models(machine: Any, tmp_path: Path) -> None:
    machine(lambda told: True)
    kernel_cache.kernel_compiler()
    assert len(list((tmp_path / "vm-magic" / "kernels").glob("*.kernel"))) == 1


def test_without_a_compiler_mlx_compiles(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "find_compiler", lambda: None)
    assert kernel_cache.kernel_compiler() is None


@pytest.mark.parametrize(
    ("architecture", "major", "named"), [("sm_90", 9, "sm_90a"), ("sm_120", 12, "sm_120a"), ("sm_86", 8, "sm_86")]
)
def test_architectures_are_named_as_mlx_names_them(architecture: str, major: int, named: str) -> None:
    assert machine_architecture({"architecture": architecture, "compute_capability_major": major}) == named
