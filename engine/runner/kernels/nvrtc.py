"""NVIDIA's run-time compiler through ctypes: CUDA text in, machine code for one architecture out."""

import contextlib
import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

_MAPS = Path("/proc/self/maps")
_HEADER = "cuda_fp16.h"
"""A header of CUDA's that every folder of its headers has."""


class CompileError(Exception):
    """A text that does not compile, or a compiler that does not work; one line."""


class Compiler(Protocol):
    """What compiles CUDA text. ``identity`` tells apart compilers that may give different code for one text."""

    identity: str

    def compile(self, source: str, architecture: str) -> bytes:
        """Machine code of ``source`` for ``sm_90a``, say. Raises :class:`CompileError`."""


class Nvrtc:
    """The shared library; several threads may compile at once, and Python runs on meanwhile."""

    def __init__(self, library: Path, include: Sequence[Path]) -> None:
        for built_ins in library.parent.glob("libnvrtc-builtins.so*"):
            with contextlib.suppress(OSError):  # found by its name later on, where it is not beside the library
                ctypes.CDLL(str(built_ins))
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        # MLX compiles its own kernels with the same options.
        self._options = ["--device-as-default-execution-space", *(f"--include-path={folder}" for folder in include)]
        self.identity = f"NVRTC {self._version()} {' '.join(self._options)}"

    def compile(self, source: str, architecture: str) -> bytes:
        """Machine code (a cubin) of ``source``."""
        options = [f"--gpu-architecture={architecture}", *self._options]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        try:
            if self._library.nvrtcCompileProgram(program, len(options), given):
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise CompileError(first_error(log))
            return self._read(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, content)
        return content.raw

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code:
            raise CompileError(f"nvrtc{name}: {self._library.nvrtcGetErrorString(code).decode()}")


def first_error(log: str) -> str:
    """The line of a compiler's log that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no reason given")[:200]


def loaded_nvrtc(maps: Path = _MAPS) -> Path | None:
    """The library that this process has loaded; MLX for CUDA brings it."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return None
    paths = (Path(fields[5]) for fields in (line.split(maxsplit=5) for line in lines) if len(fields) == 6)
    return next((path for path in paths if path.name.startswith("libnvrtc.so")), None)


def include_folders(library: Path, mlx_folder: Path, environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where headers are, in the order in which MLX looks: its own, those beside ``library``, the toolkit's."""
    own = [folder for folder in (mlx_folder / "include", mlx_folder / "include" / "cccl") if folder.is_dir()]
    toolkit = environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or "/usr/local/cuda"
    homes = [library.parent.parent, library.parent.parent.parent / "cuda_runtime", Path(toolkit)]
    found = next((home / "include" for home in homes if (home / "include" / _HEADER).is_file()), None)
    return own if found is None else [*own, found]


def find_compiler() -> Nvrtc | None:
    """The compiler of MLX for CUDA, None where there is none that works."""
    library = loaded_nvrtc()
    if library is None:
        return None
    try:
        return Nvrtc(library, include_folders(library, Path(mx.__file__).parent))
    except (OSError, AttributeError, CompileError):
        return None
