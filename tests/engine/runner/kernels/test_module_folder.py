"""Machine code that MLX finds by a short token, in a folder that only this user writes to."""

import os
import tempfile
from pathlib import Path

import pytest

from engine.runner.kernels import module_folder as module_folder_module
from engine.runner.kernels.module_folder import ModuleFolder, module_folder, standard_hash

CODE = b"\x7fELF" + bytes(5000)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder))
    monkeypatch.setattr(module_folder_module.metadata, "version", lambda _: "0.1.2")
    return folder


def test_the_hash_is_the_cplusplus_librarys() -> None:
    # Of std::hash<std::string> in a program compiled by g++ 12.
    assert standard_hash(b"hello") == 0x26553298FDBE39C8


def test_code_lies_under_the_name_that_mlx_makes_of_the_token(tmp_path: Path) -> None:
    folder = ModuleFolder(tmp_path)
    token = folder.token("vm_magic_k", CODE)
    assert token is not None
    assert len(token) == 32
    module = tmp_path / f"vm_magic_k_{standard_hash(token):x}.ptx"
    assert module.read_bytes() == CODE
    assert module.with_suffix(".txt").read_text() == "vm_magic_k\tvm_magic_k\n"
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_what_lies_there_already_is_replaced_once_and_again_when_it_is_gone(tmp_path: Path) -> None:
    token = ModuleFolder(tmp_path).token("k", CODE)
    (module,) = tmp_path.glob("*.ptx")
    module.write_bytes(b"torn")
    folder = ModuleFolder(tmp_path)
    assert folder.token("k", CODE) == token
    assert module.read_bytes() == CODE
    written = module.stat().st_mtime_ns
    assert folder.token("k", CODE) == token
    assert module.stat().st_mtime_ns == written
    module.unlink()
    assert folder.token("k", CODE) == token
    assert module.read_bytes() == CODE


def test_a_folder_that_cannot_be_written_gives_no_token(tmp_path: Path) -> None:
    assert ModuleFolder(tmp_path / "missing").token("k", CODE) is None


def test_mlxs_own_folder_is_used_where_it_is_this_users(temporary: Path, tmp_path: Path) -> None:
    found = module_folder(tmp_path / "own")
    assert found is not None
    assert found.folder == temporary / "mlx" / "0.1.2" / "ptx"
    assert found.folder.is_dir()
    assert "MLX_PTX_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("part", ["mlx", "mlx/0.1.2", "mlx/0.1.2/ptx"])
def test_mlx_is_sent_elsewhere_where_others_may_write_to_its_folder(
    temporary: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")  # so that it is put back
    (temporary / "mlx" / "0.1.2" / "ptx").mkdir(parents=True)
    (temporary / part).chmod(0o777)
    found = module_folder(tmp_path / "own")
    assert found is not None
    assert found.folder == tmp_path / "own"
    assert os.environ["MLX_PTX_CACHE_DIR"] == str(tmp_path / "own")
    assert found.folder.stat().st_mode & 0o777 == 0o700


def test_mlx_is_sent_elsewhere_where_its_folder_is_someone_elses(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")
    (temporary / "mlx").symlink_to(tmp_path)
    found = module_folder(tmp_path / "own")
    assert found is not None
    assert found.folder == tmp_path / "own"


def test_a_folder_that_the_user_named_is_used_or_none(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "named"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(named))
    found = module_folder(tmp_path / "own")
    assert found is not None
    assert found.folder == named
    named.chmod(0o777)
    assert module_folder(tmp_path / "own") is None
    assert os.environ["MLX_PTX_CACHE_DIR"] == str(named)
