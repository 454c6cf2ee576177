"""OpenBLAS for MLX on Linux CPUs: find one and have MLX use it."""

import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from engine.runner.device.blas_redirect import redirect

_LIBRARY_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/opt/conda/lib",
)
_LIBRARY_NAMES = (
    "openblas-pthread/libopenblas.so.0",
    "openblas-openmp/libopenblas.so.0",
    "libopenblas.so.0",
    "libopenblasp.so.0",
    "libopenblaso.so.0",
    "libopenblas.so",
)
_GFORTRAN = "libgfortran.so.5"
_PIP_PACKAGE = "scipy_openblas32"
_PIP_PREFIX = "scipy_"
"""What that package puts before every symbol."""


def use_openblas(env: Mapping[str, str], prefix: Path) -> str | None:
    """Have MLX use OpenBLAS; its name and version, or None where there is none that works.

    A library loaded globally before MLX takes the place of MLX's own. After MLX, and for pip's
    ``scipy-openblas32``, MLX's calls are redirected.
    """
    early = "mlx.core" not in sys.modules
    for path in find_openblas(env, prefix):
        library = _load(path, globally=early)
        if library is not None and (early or redirect(library)):
            return _version(library)
    brought = _pip_openblas()
    if brought is not None:
        importlib.import_module("mlx.core")
        library = _load(brought, globally=False, prefix=_PIP_PREFIX)
        if library is not None and redirect(library, _PIP_PREFIX):
            return _version(library, _PIP_PREFIX)
    return None


def find_openblas(env: Mapping[str, str], prefix: Path, folders: tuple[str, ...] = _LIBRARY_FOLDERS) -> Iterator[Path]:
    """OpenBLAS libraries on this machine: ``OPENBLAS_DIR`` first, then the environment, then the system."""
    given = env.get("OPENBLAS_DIR")
    roots = [Path(given), Path(given, "lib")] if given else []
    roots += [prefix / "lib", *(Path(folder) for folder in folders)]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        roots.append(Path("/usr/lib", multiarch))
    for root in dict.fromkeys(roots):
        for name in _LIBRARY_NAMES:
            if (root / name).is_file():
                yield root / name


def _pip_openblas() -> Path | None:
    """The library of the package ``scipy-openblas32``, if it is installed."""
    spec = importlib.util.find_spec(_PIP_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in Path(folder, "lib").glob("libscipy_openblas*.so*")]
    return files[0] if files else None


def _load(path: Path, *, globally: bool, prefix: str = "") -> ctypes.CDLL | None:
    """Open ``path``, its symbols visible to libraries loaded later if ``globally``; None if it does not load."""
    mode = ctypes.RTLD_GLOBAL if globally else ctypes.RTLD_LOCAL
    for folder in (path.parent, path.parent.parent):
        if (folder / _GFORTRAN).is_file():
            try:
                ctypes.CDLL(str(folder / _GFORTRAN), mode=mode)
            except OSError:  # the library may still find its own
                continue
    try:
        library = ctypes.CDLL(str(path), mode=mode)
    except OSError:
        return None
    return library if hasattr(library, prefix + "cblas_sgemm") else None


def _version(library: ctypes.CDLL, prefix: str = "") -> str:
    """``OpenBLAS 0.3.21`` as the library itself says."""
    try:
        config = getattr(library, prefix + "openblas_get_config")
    except AttributeError:
        return "OpenBLAS"
    config.restype = ctypes.c_char_p
    return " ".join(config().decode().split()[:2])
