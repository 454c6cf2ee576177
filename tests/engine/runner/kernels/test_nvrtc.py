"""Finding NVIDIA's compiler and its headers, and calling a library that behaves like it."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from engine.runner.kernels.nvrtc import (
    CompileError,
    Nvrtc,
    find_compiler,
    first_error,
    include_folders,
    loaded_nvrtc,
)

LIBRARY = """
#include <stdlib.h>
#include <string.h>
typedef struct { char log[4096]; char code[4096]; char* source; } Program;
int nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 7; return 0; }
const char* nvrtcGetErrorString(int code) { return code == 5 ? "NVRTC_ERROR_INVALID_OPTION" : "NVRTC_ERROR"; }
int nvrtcCreateProgram(void** program, const char* source, const char* name, int n, const char** h, const char** i) {
  if (n || h || i || strcmp(name, "kernel.cu")) return 1;
  Program* made = calloc(1, sizeof(Program)); made->source = strdup(source); *program = made; return 0; }
int nvrtcCompileProgram(void* given, int n, const char** options) {
  Program* program = given;
  if (strstr(program->source, "wrong")) {
    strcpy(program->log, "kernel.cu(1): warning: odd\\nkernel.cu(2): error: identifier \\"wrong\\" is undefined\\n");
    return 6; }
  strcpy(program->code, program->source);
  for (int i = 0; i < n; ++i) { strcat(program->code, "|"); strcat(program->code, options[i]); }
  return 0; }
int nvrtcGetProgramLogSize(void* program, size_t* size) { *size = strlen(((Program*)program)->log) + 1; return 0; }
int nvrtcGetProgramLog(void* program, char* log) { strcpy(log, ((Program*)program)->log); return 0; }
int nvrtcGetCUBINSize(void* program, size_t* size) {
  *size = strlen(((Program*)program)->code); return strstr(((Program*)program)->source, "no code") ? 5 : 0; }
int nvrtcGetCUBIN(void* program, char* code) {
  memcpy(code, ((Program*)program)->code, strlen(((Program*)program)->code)); return 0; }
int nvrtcDestroyProgram(void** program) { free(((Program*)*program)->source); free(*program); *program = 0; return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library with the compiler's functions, whose code is the text and the options."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("nvrtc")
    (folder / "nvrtc.c").write_text(LIBRARY)
    path = folder / "libnvrtc.so.13"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "nvrtc.c"], check=True)
    return path


def test_a_text_is_compiled_for_one_architecture_with_mlxs_options(library: Path) -> None:
    code = Nvrtc(library, [Path("/a"), Path("/b c")]).compile("text é", "sm_90a")
    assert code.decode() == (
        "text é|--gpu-architecture=sm_90a|--device-as-default-execution-space|--include-path=/a|--include-path=/b c"
    )


def test_what_the_compiler_says_is_one_line(library: Path) -> None:
    with pytest.raises(CompileError, match=r'^kernel\.cu\(2\): error: identifier "wrong" is undefined$'):
        Nvrtc(library, []).compile("wrong", "sm_90a")


def test_any_call_that_fails_is_named(library: Path) -> None:
    with pytest.raises(CompileError, match=r"^nvrtcGetCUBINSize: NVRTC_ERROR_INVALID_OPTION$"):
        Nvrtc(library, []).compile("no code", "sm_90a")


def test_compilers_and_headers_are_told_apart(library: Path) -> None:
    assert Nvrtc(library, [Path("/a")]).identity != Nvrtc(library, [Path("/b")]).identity
    assert Nvrtc(library, []).identity.startswith("NVRTC 13.7 ")


def test_the_log_of_a_compiler_that_says_nothing_is_a_line_too() -> None:
    assert first_error("") == "no reason given"
    assert first_error("\n  something\n") == "something"


def test_the_library_that_the_process_has_loaded_is_found(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0-7f1 r-xp 00000000 00:00 0 \n"
        "7f1-7f2 r-xp 00000000 08:01 12                         /site/nvidia/cu13/lib/libnvrtc-builtins.so.13.0\n"
        "7f2-7f3 r-xp 00000000 08:01 13                         /my site/nvidia/cu13/lib/libnvrtc.so.13\n"
    )
    assert loaded_nvrtc(maps) == Path("/my site/nvidia/cu13/lib/libnvrtc.so.13")
    maps.write_text("7f0-7f1 r-xp 00000000 00:00 0 [heap]\n")
    assert loaded_nvrtc(maps) is None
    assert loaded_nvrtc(tmp_path / "missing") is None


def test_headers_are_looked_for_where_mlx_looks_for_them(tmp_path: Path) -> None:
    mlx, wheel, toolkit = tmp_path / "mlx", tmp_path / "nvidia" / "cu13", tmp_path / "toolkit"
    for folder in (mlx / "include" / "cccl", wheel / "include", wheel / "lib", toolkit / "include"):
        folder.mkdir(parents=True)
    library, environment = wheel / "lib" / "libnvrtc.so.13", {"CUDA_HOME": str(toolkit)}
    own = [mlx / "include", mlx / "include" / "cccl"]
    assert include_folders(library, mlx, environment) == own
    (toolkit / "include" / "cuda_fp16.h").write_text("")
    assert include_folders(library, mlx, environment) == [*own, toolkit / "include"]
    (wheel / "include" / "cuda_fp16.h").write_text("")
    assert include_folders(library, mlx, environment) == [*own, wheel / "include"]


def test_a_process_without_the_library_has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runner.kernels.nvrtc.loaded_nvrtc", lambda: None)
    assert find_compiler() is None


def test_a_library_that_is_none_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libnvrtc.so.13").write_text("not a library")
    monkeypatch.setattr("engine.runner.kernels.nvrtc.loaded_nvrtc", lambda: tmp_path / "libnvrtc.so.13")
    assert find_compiler() is None
