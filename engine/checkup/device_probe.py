"""MLX's device, asked in a process of its own: an MLX that ends its process, or never answers, is one of the answers.

That process imports MLX as a load does, and where there is a GPU checks one kernel; nothing of it stays.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from traceback import walk_tb

from engine.checkup.packages import modules_needed

PATIENCE = 60.0
"""Seconds: kernels of a GPU may have to be compiled."""
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from engine.checkup.device_probe import answer; answer()"
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What MLX says of its device; ``error`` instead where it says nothing. Sizes are bytes.

    ``broken``: what is needed and cannot be imported, and why; ``at`` the package in which asking failed.
    ``blas`` is the line on the CPU's BLAS; ``kernels`` is "" where a GPU's kernel was right, what was wrong with it
    otherwise, and None where there is no GPU, or nothing was checked.
    """

    kind: str = ""
    name: str = ""
    limit: int = 0
    free: int = 0
    blas: str | None = None
    kernels: str | None = None
    error: str = ""
    at: str = ""
    broken: dict[str, str] = field(default_factory=dict)


def ask_device(path: Sequence[str] | None = None, patience: float = PATIENCE) -> Probe:
    """Ask in a process of its own. Raises nothing."""
    if not sys.executable:
        return Probe(error="this Python does not know its own program")
    command = [sys.executable, "-W", "ignore", "-c", _CODE, json.dumps(list(sys.path if path is None else path))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patience, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Probe(error=f"importing MLX and asking for its device took longer than {patience:.0f} s")
    except OSError as error:
        return Probe(error=f"no process could be started: {error}")
    try:
        return Probe(**json.loads(done.stdout.strip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        return Probe(error=_end_of(done.returncode, done.stderr))


def _end_of(status: int, said: str) -> str:
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = str(-status)
        return f"importing MLX ends the process ({name})"
    last = said.strip().rpartition("\n")[2]
    return f"importing MLX ends the process (status {status}{': ' + last if last else ''})"


def answer() -> None:
    """Write what MLX says here as one line of JSON: what the other process runs."""
    try:
        found = here(check_kernels=True)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - told to who asked
        found = Probe(error=f"{type(error).__name__}: {error}", at=_package_of(error))
    found = replace(found, broken=broken_packages())
    sys.stdout.write("\n" + json.dumps(asdict(found)) + "\n")


def _package_of(error: BaseException) -> str:
    """The package whose code raised ``error``, by its name for an import."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""


def broken_packages() -> dict[str, str]:
    """What is needed and installed and cannot be imported, by where that fails, and what Python says of it."""
    found: dict[str, str] = {}
    for name in modules_needed():
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # else it is not installed
                found.setdefault(name, f"{type(error).__name__}: {error}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, it is told
            found.setdefault(_package_of(error) or name, f"{type(error).__name__}: {error}")
    return found


def here(*, check_kernels: bool) -> Probe:
    """What MLX says in this process. Raises what its import raises."""
    from engine.runner.device.devices import choose_blas, describe_device, prepare_backend
    from engine.runner.device.memory import FreeMemory

    prepare_backend()
    device = describe_device()
    kernels = _kernel_problem() if check_kernels and device.kind != "cpu" else None
    blas = choose_blas() if device.kind == "cpu" else None
    return Probe(device.kind, device.name, device.memory_limit, FreeMemory(device)(), blas, kernels)


def _kernel_problem() -> str | None:
    """What is wrong with attention at one common shape; "" if nothing is, None where no kernel can run."""
    from engine.runner.kernels.dialect import kernels_available

    if not kernels_available():
        return None
    from engine.runner.kernels.common_shapes import common_shapes
    from engine.runner.kernels.self_check import attention_problem

    _, shape = common_shapes()[0]
    return attention_problem(shape) or ""
