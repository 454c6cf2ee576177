"""The installation: Python, this package's requirements and their versions, MLX's build, modules that hide others."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from engine.batch.build import DISTRIBUTION, build
from engine.checkup.findings import Finding
from engine.checkup.tested import TESTED

AREA = "installation"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9][0-9.]*)\s*$")
_MODULES = {
    "docstring-parser": "docstring_parser",
    "huggingface-hub": "huggingface_hub",
    "ipython": "IPython",
    "mlx-lm": "mlx_lm",
    "prometheus-client": "prometheus_client",
    "pyyaml": "yaml",
}
"""What is imported of a distribution whose name is another."""
_MLX_PARTS = ("mlx-metal", "mlx-cpu", "mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")
_ROOT = Path(__file__).resolve().parents[2]


def requirements() -> dict[str, str]:
    """The lowest version of every distribution that this one needs; without extras."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found = (_REQUIREMENT.match(line.split(";")[0]) for line in lines if "extra ==" not in line)
    return {match[1]: match[2] for match in found if match}


def modules_needed() -> list[str]:
    """What is imported of every distribution that is needed, by its name."""
    return [_MODULES.get(name, name) for name in requirements()]


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """``1.10.0rc1`` as (1, 10): to be compared; zeros at the end mean nothing."""
    found = [int(part) for part in re.match(r"[0-9]+(?:\.[0-9]+)*", version or "0")[0].split(".")]  # type: ignore[index]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def check_python() -> Iterator[Finding]:
    """This package, Python and the machine."""
    yield Finding(AREA, "vm-magic", build())
    version = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        fix = "install a Python for Apple silicon: this one runs as if on an Intel Mac, for which there is no MLX"
        yield Finding(AREA, "Python", version, "problem", fix)
    elif sys.platform not in ("darwin", "linux"):
        yield Finding(AREA, "Python", version, "problem", "MLX runs on macOS and Linux; on Windows, in WSL")
    else:
        yield Finding(AREA, "Python", version)


def check_versions(tested: Mapping[str, str] = TESTED) -> Iterator[Finding]:
    """What is missing, too old, or newer than anything that was tested."""
    needed = requirements()
    if not needed:
        fix = f"pip install {DISTRIBUTION}: a folder on sys.path brings no requirements"
        yield Finding(AREA, "packages", "what is needed is not known: the code runs uninstalled", "warning", fix)
        return
    fine = 0
    for name, lowest in needed.items():
        version = installed(name)
        if version is None:
            yield Finding(AREA, name, "is not installed", "problem", f"pip install '{name}>={lowest}'")
        elif numbers(version) < numbers(lowest):
            fix = f"pip install -U '{name}>={lowest}', then restart the kernel"
            yield Finding(AREA, name, f"{version} is older than {lowest}, the oldest that works", "problem", fix)
        elif name in tested and _leap(version) > _leap(tested[name]):
            fix = f"if something fails: pip install '{name}=={tested[name]}'"
            yield Finding(AREA, name, f"{version} is newer than {tested[name]}, which was tested", "warning", fix)
        else:
            fine += 1
    yield Finding(AREA, "packages", f"{fine} of {len(needed)} that are needed have versions that were tested")


def _leap(version: str) -> tuple[int, ...]:
    """The part of a version that changes where interfaces may: the first number, or the second after 0."""
    found = (*numbers(version), 0, 0)
    return found[:1] if found[0] else found[:2]


def check_mlx_build() -> Iterator[Finding]:
    """Whether MLX and the part of it that computes are of one version, and whether it can use what is here."""
    core, parts = installed("mlx"), {name: version for name in _MLX_PARTS if (version := installed(name))}
    if core is None:
        return
    odd = {name: version for name, version in parts.items() if numbers(version) != numbers(core)}
    if odd:
        said = ", ".join(f"{name} {version}" for name, version in odd.items())
        yield Finding(AREA, "MLX's build", f"mlx {core} with {said}", "problem", mlx_fix(core))
    elif sys.platform == "linux" and not parts:
        yield Finding(AREA, "MLX's build", f"mlx {core} without what computes", "problem", mlx_fix(core))
    elif sys.platform == "linux" and gpus() and not any("cuda" in name for name in parts):
        text = f"mlx {core} computes on the CPU, and there is an NVIDIA GPU"
        yield Finding(AREA, "MLX's build", text, "warning", mlx_fix(core))
    else:
        yield Finding(AREA, "MLX's build", ", ".join([f"mlx {core}", *parts]))


def gpus() -> int:
    """How many NVIDIA GPUs there are."""
    from engine.runner.device.placement import count_gpus

    return count_gpus()


def mlx_fix(version: str | None = None) -> str:
    """How to get an MLX that computes here."""
    pin = f"=={version}" if version else ""
    if sys.platform == "darwin":
        return f"pip install --force-reinstall mlx{pin} mlx-metal{pin}"
    return f"pip install --force-reinstall 'mlx[{'cuda13' if gpus() else 'cpu'}]{pin}' (cuda12 for a driver of CUDA 12)"


def check_shadows() -> Iterator[Finding]:
    """Files of the user's that Python takes, or will take after a restart, for a package that is needed."""
    wanted = {_MODULES.get(name, name): name for name in requirements()}
    hidden = [found for module, name in wanted.items() if (found := _hidden(module, name)) is not None]
    own = [found for module in ("engine", "vm_magic") if (found := _before_ours(module)) is not None]
    for module, path in (*hidden, *own):
        text = f"{path} is taken for the package {module}"
        if (module, path) not in hidden:
            text = f"{path} will be taken for the package {module} by the next kernel in this folder"
        fix = f"rename {path}, then restart the kernel"
        yield Finding(AREA, f"module {module}", text, "problem", fix, private=(path,))
    if not hidden and not own:
        yield Finding(AREA, "modules", "no file of yours has the name of a package that is needed")


def _hidden(module: str, name: str) -> tuple[str, str] | None:
    """The module and where it comes from, if that is not where its distribution was installed."""
    try:
        root = Path(str(metadata.distribution(name).locate_file(""))).resolve()
    except metadata.PackageNotFoundError:
        return None
    place = _place(PathFinder.find_spec(module))
    if place is None or root in place.parents or "site-packages" in place.parts or "dist-packages" in place.parts:
        return None
    return module, str(place)


def _before_ours(module: str) -> tuple[str, str] | None:
    place = _place(PathFinder.find_spec(module, [path or os.getcwd() for path in sys.path]))
    return None if place is None or place.parent == _ROOT else (module, str(place))


def _place(spec: ModuleSpec | None) -> Path | None:
    """The file, or the folder of a package; None for what is no file."""
    if spec is None or not spec.origin:
        return None
    path = Path(spec.origin).resolve()
    return path.parent if path.name == "__init__.py" else path


def version_facts() -> list[tuple[str, str]]:
    """Every package that is needed, with its version."""
    names = [*requirements(), *_MLX_PARTS, "transformers", "starlette", "ipykernel", "jupyterlab", "jupyterlab_widgets"]
    return [("versions", ", ".join(f"{name} {version}" for name in names if (version := installed(name))))]
