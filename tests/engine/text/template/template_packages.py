"""Chat templates that packages of the Python index carry: fetched once, checked by hash, kept in the cache."""

import os
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from engine.models.pypi import _installer_command, cache_folder


@dataclass(frozen=True)
class TemplatePackage:
    """A wheel or source archive with a folder of ``.jinja`` files. ``large`` ones are fetched only when asked for."""

    requirement: str
    sha256: str
    folder: str
    large: bool = False


TRL = TemplatePackage(
    "trl==1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396", "trl/chat_templates/"
)
LLAMA_CPP = TemplatePackage(
    "llama-cpp-python==0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    "vendor/llama.cpp/models/templates/",
    large=True,
)


def template_names(package: TemplatePackage) -> list[str]:
    """All its templates, but for copies that only mark what to train on. Skips as :func:`template_source` does."""
    names = sorted(file.stem for file in _folder(package).glob("*.jinja"))
    return [name for name in names if not name.endswith("_training")]


def template_source(package: TemplatePackage, name: str) -> str:
    """The text of a template. Skips the test where a large package is neither here nor asked for."""
    return (_folder(package) / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def _folder(package: TemplatePackage) -> Path:
    folder = cache_folder().parent / "test-templates" / package.requirement
    if not folder.is_dir():
        if package.large and not os.environ.get("VM_MAGIC_TEST_DOWNLOADS"):
            pytest.skip(f"VM_MAGIC_TEST_DOWNLOADS=1 fetches {package.requirement} (77 MB, two minutes) for this")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _fetch(package, Path(work))
            try:
                (Path(work) / "templates").rename(folder)
            except OSError:  # another test process was quicker
                if not folder.is_dir():
                    raise
    return folder


def _fetch(package: TemplatePackage, work: Path) -> None:
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = _installer_command(requirements, work)
    if package.large:
        command = ["--no-binary" if word == "--only-binary" else word for word in command]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    target = work / "templates"
    target.mkdir()
    for archive in [*work.glob("*.whl"), *work.glob("*.tar.gz")]:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                members = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".jinja")}
        else:
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".jinja")]
                members = {m.name: tar.extractfile(m).read() for m in wanted}  # type: ignore[union-attr]
        for name, content in members.items():
            if package.folder in name:
                (target / Path(name).name).write_bytes(content)
    for unpacked in (work / package.folder).glob("*.jinja"):  # uv unpacks
        (target / unpacked.name).write_bytes(unpacked.read_bytes())
    assert any(target.iterdir()), f"{package.requirement} holds no templates in {package.folder}"
