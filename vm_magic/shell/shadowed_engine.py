"""Recognizes a module of the user's that is named ``engine``, as ours is. Imports nothing of the project."""

import sys
from importlib.util import find_spec
from pathlib import Path

_OURS = Path(__file__).resolve().parents[2] / "engine"


class EngineShadowedError(ImportError):
    """Python takes another ``engine`` for ours. ``path`` is its file or folder, if it has one."""

    def _render_traceback_(self) -> list[str]:
        return [f"\x1b[31m{type(self).__name__}\x1b[39m: {self}"]


def shadow_report(error: EngineShadowedError, line: str) -> str | None:
    """What ``%vllm_metal doctor`` says where nothing else of ours can run; None if ``line`` asks for another command.

    With ``--report`` without the place.
    """
    words = line.split()
    if words[:1] != ["doctor"]:
        return None
    text = str(error)
    return f"problem: {text.replace(error.path, '(path)') if '--report' in words and error.path else text}"


def check_engine() -> None:
    """Raise EngineShadowedError if ``engine`` is not our package; runs no code of it.

    IPython puts the notebook's folder first on ``sys.path``, so that an ``engine.py`` there goes before ours. A mere
    folder ``engine`` without ``__init__.py`` mostly does not: what Python finds decides.
    """
    path = _place_of_engine()
    if path is not None and path.resolve() == _OURS:
        return
    where, what = ("a module made in this session", "module") if path is None else (path, _kind(path))
    raise EngineShadowedError(
        f"{where} is imported as `engine` in place of the package of that name that vm_magic brings; "
        f"rename that {what}, then restart the kernel",
        name="engine",
        path=None if path is None else str(path),
    )


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def _place_of_engine() -> Path | None:
    """The file or the package's folder that ``engine`` is or would be imported from."""
    module = sys.modules.get("engine")
    if module is not None:
        file, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
    else:
        spec = find_spec("engine")
        if spec is None:
            raise ModuleNotFoundError("vm_magic is installed without its package engine", name="engine")
        file, folders = spec.origin, spec.submodule_search_locations
    found = file or next(iter(folders or ()), None)
    if found is None:
        return None
    path = Path(found)
    return path.parent if path.name == "__init__.py" else path
