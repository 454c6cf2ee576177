"""What people install and run first: the wheel, its dependencies, the set-up script, the Makefile, Binder."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
THROUGH = {
    "comm": "ipywidgets",
    "starlette": "fastapi",
    "traitlets": "ipython",
    "transformers": "mlx-lm",
    "pydantic-core": "pydantic",
}
"""Imported distributions that another, declared one brings and speaks in terms of."""
OPTIONAL = {"pandas", "psutil", "ipykernel"}
"""Imported only where a user works with it; without it an error says how to get it."""
NOT_IMPORTED = {"ipywidgets"}
"""Dependencies that act unseen: tqdm draws its bars with ipywidgets in a notebook."""
HEAVY = (
    "mlx",
    "mlx_lm",
    "transformers",
    "fastapi",
    "uvicorn",
    "pydantic",
    "huggingface_hub",
    "numpy",
    "ipywidgets",
    "pandas",
    "httpx",
)


def names_of(requirements: list[str]) -> set[str]:
    """Distribution names without versions and extras."""
    return {
        "".join(char if char.isalnum() or char in "-_." else " " for char in one).split()[0] for one in requirements
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=120)
    return next(folder.glob("vm_magic-*.whl"))


def test_the_wheel_holds_both_packages_the_licence_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"engine", "vm_magic", f"vm_magic-{PROJECT['version']}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shipped = {name for name in names if name.endswith(".py")}
    in_tree = {str(path.relative_to(ROOT)) for top in ("engine", "vm_magic") for path in (ROOT / top).rglob("*.py")}
    assert shipped == in_tree


def test_building_again_gives_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    """From a copy elsewhere, with other times, other rights and another hash seed: who builds it can compare."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "engine", "vm_magic"):
        source = ROOT / name
        ours = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, clone / name, ignore=ours) if source.is_dir() else shutil.copy(source, clone / name)
    for path in clone.rglob("*.py"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o600)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(build, cwd=clone, env=env, check=True, capture_output=True, timeout=120)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


OFFLINE_PYTHON = "#!/bin/sh\necho 'Connection refused' >&2\nexit 1\n"
AUDITING_PYTHON = """#!/bin/sh
# Stands for a Python: its environments hold a pip-audit that gets an answer without any advisory.
case "$*" in
    *"-m venv"*) for target; do :; done; mkdir -p "$target/bin"; cp "$0" "$target/bin/python"
        printf '#!/bin/sh\nfor report; do :; done; echo "{}" >"$report"\n' '{answer}' >"$target/bin/pip-audit"
        chmod +x "$target/bin/pip-audit" ;;
    *freeze*) echo "a==1" ;;
esac
"""


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (OFFLINE_PYTHON, "nothing was checked: no environment for pip-audit: Connection refused"),
        (
            AUDITING_PYTHON.replace("{answer}", "none"),
            "nothing was checked: the index that answers knows no advisories",
        ),
    ],
)
def test_the_audit_says_so_where_nobody_answers(tmp_path: Path, python: str, said: str) -> None:
    """No "nothing found" of `make audit` that nobody looked for."""
    fake = tmp_path / "python"
    fake.write_text(python, encoding="utf-8")
    fake.chmod(0o755)
    run = [str(ROOT / ".ci" / "audit"), str(fake)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_the_wheel_imports_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import engine, vm_magic; print(engine.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert str(tmp_path.resolve()) in done.stdout


@pytest.mark.parametrize("package", ["engine", "vm_magic"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_every_import_is_of_a_declared_dependency() -> None:
    assert names_of(PROJECT["optional-dependencies"]["test"]) >= OPTIONAL
    declared = names_of(PROJECT["dependencies"]) | OPTIONAL
    distributions = packages_distributions()
    undeclared = set()
    for path in (path for top in ("engine", "vm_magic") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"engine", "vm_magic"}:
                owners = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
                if not {THROUGH.get(owner, owner) for owner in owners} & declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared


def test_every_dependency_is_imported_somewhere() -> None:
    text = "\n".join(
        path.read_text(encoding="utf-8") for top in ("engine", "vm_magic") for path in (ROOT / top).rglob("*.py")
    )
    modules = {
        top: {name.lower().replace("_", "-") for name in names} for top, names in packages_distributions().items()
    }
    for dependency in names_of(PROJECT["dependencies"]) - NOT_IMPORTED:
        tops = [top for top, owners in modules.items() if dependency in owners]
        assert any(f"import {top}" in text or f"from {top}" in text for top in tops), f"{dependency} is not used"


FAKE_PYTHON = """#!/bin/sh
# Stands for a Python: knows its version, makes environments that are copies of itself, notes what pip is asked.
echo "$0 $*" >>"$LOG"
case "$*" in
    *version_info*) exit {too_old} ;;
    *ensurepip*) exit {no_venv} ;;
    "-m venv"*) for target; do :; done; mkdir -p "$target/bin"; cp "$0" "$target/bin/python" ;;
    "-V") echo "Python 3.12.0" ;;
esac
"""


class SetUp:
    """The set-up script in a folder of its own, with made-up Pythons first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        self.log.touch()
        (folder / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
        for name in ("setup", "apt"):
            shutil.copy(ROOT / ".ci" / name, folder)

    def script(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def python(self, name: str, *, too_old: bool = False, no_venv: bool = False) -> None:
        self.script(name, FAKE_PYTHON.format(too_old=int(too_old), no_venv=int(no_venv)))

    def run(self, python: str, extra: str = "none") -> subprocess.CompletedProcess[str]:
        self.log.write_text("", encoding="utf-8")
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        env = {"PATH": path, "HOME": str(self.folder), "LOG": str(self.log), "PYTHON": python}
        command = ["bash", "setup", "venv", *([extra] if extra else [])]
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def installs(self) -> list[str]:
        return [line for line in self.log.read_text(encoding="utf-8").splitlines() if "-m pip install" in line]


@pytest.fixture
def setup(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


def test_set_up_passes_over_a_shim_that_fails_and_a_python_that_is_too_old(setup: SetUp) -> None:
    setup.script("shim", "#!/bin/sh\nexit 127\n")
    setup.python("old", too_old=True)
    setup.python("good")
    done = setup.run("missing shim old good")
    assert done.returncode == 0, done.stderr
    assert (setup.folder / "venv" / "bin" / "python").exists()
    assert len(setup.installs) == 1
    assert setup.installs[0].endswith("-e .[test]")


def test_set_up_does_nothing_the_second_time(setup: SetUp) -> None:
    setup.python("good")
    assert setup.run("good").returncode == 0
    again = setup.run("good")
    assert (again.returncode, again.stderr, setup.installs) == (0, "", [])


def test_set_up_installs_again_after_a_change_of_pyproject_in_the_same_environment(setup: SetUp) -> None:
    setup.python("good")
    setup.run("good")
    kept = setup.folder / "venv" / "kept"
    kept.touch()
    (setup.folder / "pyproject.toml").write_text("[project]\nname = 'new'\n", encoding="utf-8")
    assert setup.run("good").returncode == 0
    assert len(setup.installs) == 1
    assert kept.exists()
    assert not any("-m venv" in line for line in setup.log.read_text(encoding="utf-8").splitlines())


def test_set_up_says_in_one_line_what_is_missing(setup: SetUp) -> None:
    setup.python("old", too_old=True)
    done = setup.run("missing old")
    assert done.returncode == 1
    assert done.stderr == "setup: Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.12\n"


def test_set_up_asks_for_the_venv_package_where_it_cannot_install_it(setup: SetUp) -> None:
    setup.python("bare", no_venv=True)
    setup.script("id", "#!/bin/sh\necho 1000\n")
    setup.script("sudo", "#!/bin/sh\nexit 1\n")
    done = setup.run("bare")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "setup: this Python cannot make virtual environments; run: sudo apt install python3-venv"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS needs no extra")
@pytest.mark.parametrize(("cuda", "extra"), [("13.0", "cuda13"), ("12.8", "cuda12")])
def test_set_up_chooses_the_mlx_build_by_the_driver(setup: SetUp, cuda: str, extra: str) -> None:
    setup.python("good")
    setup.script("nvidia-smi", f"#!/bin/sh\necho '| NVIDIA-SMI 999  Driver Version: 999  CUDA Version: {cuda}  |'\n")
    assert setup.run("good", extra="").returncode == 0
    assert setup.installs[0].endswith(f"-e .[test,{extra}]")


def test_make_test_checks_everything_and_ci_runs_just_that() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    steps = ("bash .ci/setup .venv", "ruff check .", "ruff format --check .", "-m mypy", "-m pytest")
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_binder_asks_only_for_what_the_project_offers() -> None:
    requirements = (ROOT / "binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert requirements[0] == "-e .[cpu]"
    assert "cpu" in PROJECT["optional-dependencies"]
    runtime = (ROOT / "binder" / "runtime.txt").read_text(encoding="utf-8").strip()
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert [int(part) for part in runtime.removeprefix("python-").split(".")] >= [int(p) for p in floor.split(".")]
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
