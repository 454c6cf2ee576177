import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from engine.runner.device import blas, blas_redirect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux needs another BLAS")
needs_pip_openblas = pytest.mark.skipif(
    importlib.util.find_spec("scipy_openblas32") is None, reason="scipy-openblas32 is not installed"
)


def test_openblas_dir_comes_first_then_the_environment_then_the_system(tmp_path: Path) -> None:
    for name in ("given/lib", "prefix/lib", "system/openblas-pthread"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "libopenblas.so.0").touch()
    env = {"OPENBLAS_DIR": str(tmp_path / "given")}
    found = list(blas.find_openblas(env, tmp_path / "prefix", (str(tmp_path / "system"),)))
    assert [path.relative_to(tmp_path).parts[0] for path in found[:3]] == ["given", "prefix", "system"]


def test_a_file_that_is_no_library_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "libopenblas.so.0").write_text("not a library")
    assert blas._load(tmp_path / "libopenblas.so.0", globally=False) is None


def test_a_machine_without_openblas_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "find_openblas", lambda *_: iter(()))
    monkeypatch.setattr(blas, "_pip_openblas", lambda: None)
    assert blas.use_openblas({}, Path("nowhere")) is None


REDIRECTED = """
import ctypes
from pathlib import Path
{first}
from engine.runner.device import blas
from engine.runner.device import blas_redirect
blas.find_openblas = lambda *_: iter({found!r} and [Path({found!r})])
version = blas.use_openblas({{}}, Path("nowhere"))
assert version and version.startswith("OpenBLAS "), version
import mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
a, b = rng.normal(size=(33, 257)).astype(np.float32), rng.normal(size=(257, 65)).astype(np.float32)
np.testing.assert_allclose(np.array(mx.array(a) @ mx.array(b)), a @ b, rtol=1e-4, atol=1e-4)
lines = list(blas_redirect._read_maps(Path("/proc/self/maps")))
base = next(line.start for line in lines if line.path.endswith("/libmlx.so") and line.offset == 0)
path = Path(next(line.path for line in lines if line.path.endswith("/libmlx.so")))
slots = dict(blas_redirect._call_slots(path, blas_redirect._JUMP_SLOT[__import__("platform").machine()]))
called = ctypes.c_uint64.from_address(base + slots["cblas_sgemm"]).value
target = next(line.path for line in lines if line.start <= called < line.end)
assert "openblas" in target, target
"""


@needs_pip_openblas
@pytest.mark.parametrize("first", ["", "import mlx.core"], ids=["mlx-later", "mlx-first"])
def test_pips_openblas_serves_mlx_where_the_system_has_none(first: str) -> None:
    subprocess.run([sys.executable, "-c", REDIRECTED.format(first=first, found="")], check=True)


def test_an_mlx_imported_first_is_redirected_to_the_systems_openblas() -> None:
    found = next(blas.find_openblas({}, Path(sys.prefix)), None)
    if found is None:
        pytest.skip("no OpenBLAS on this system")
    subprocess.run([sys.executable, "-c", REDIRECTED.format(first="import mlx.core", found=str(found))], check=True)


@needs_pip_openblas
def test_wrong_products_undo_the_redirection() -> None:
    code = """
import ctypes
from pathlib import Path
import mlx.core as mx
from engine.runner.device import blas
from engine.runner.device import blas_redirect
blas_redirect._products_are_right = lambda: False
library = ctypes.CDLL(str(blas._pip_openblas()))
writes = []
blas_redirect._write = (lambda write: lambda places, values: (writes.append(values), write(places, values)))(
    blas_redirect._write
)
assert not blas_redirect.redirect(library, "scipy_")
assert len(writes) == 2 and writes[0] != writes[1]
assert mx.array_equal(mx.ones((4, 4)) @ mx.ones((4, 4)), mx.full((4, 4), 4.0))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_without_the_functions_or_an_unknown_layout_is_left_alone(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    assert not blas_redirect.redirect(libc, "no_such_prefix_")
    empty = tmp_path / "maps"
    empty.write_text("")
    assert not blas_redirect.redirect(libc, "", empty)
    (tmp_path / "libmlx.so").write_bytes(b"not ELF at all")
    assert list(blas_redirect._call_slots(tmp_path / "libmlx.so", 7)) == []
