"""What ``doctor`` looks at in the shell: IPython, the kernel, widgets, a connection, and kinds of errors in the log."""

import builtins
import http.client
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from engine.checkup.findings import Finding
from engine.checkup.packages import installed, numbers

if TYPE_CHECKING:
    from vm_magic.commands.base import Context
    from vm_magic.remote.llm import RemoteLLM
    from vm_magic.state.session import Session

AREA = "front end"
_LINE = re.compile(r"\d\d:\d\d:\d\d (?P<level>WARNING|ERROR|CRITICAL) (?P<logger>[\w.]+): (?P<text>.*)", re.DOTALL)
_ERROR = re.compile(r"\b[A-Z][A-Za-z]*(?:Error|Exception|Interrupt)\b")
_FIRST_KERNEL = (6, 29)
_WIDGETS = {"jupyterlab_widgets": {8: 3}, "widgetsnbextension": {8: 4}}
"""By what shows widgets: its first number that goes with ipywidgets' first number."""
_PATIENCE = 2.0
"""Seconds that a server has for an answer."""


def session_of(context: "Context") -> "Session | None":
    """The notebook's session; None where what it is made of cannot be imported."""
    try:
        return context.session
    except Exception:  # noqa: BLE001 - a broken package is among the findings
        return None


def check_shell(shell: Any) -> Iterator[Finding]:
    """IPython, and the kernel that it runs in."""
    yield Finding(AREA, "IPython", f"{installed('ipython') or 'of an unknown version'}, {_kind(shell)}")
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return
    version = installed("ipykernel")
    if version is None:
        yield Finding(AREA, "kernel", f"a {type(kernel).__name__} that is not ipykernel's", "warning", "use ipykernel")
    elif numbers(version) < _FIRST_KERNEL:
        text = f"ipykernel {version} is older than 6.29, the oldest that was tried"
        yield Finding(AREA, "kernel", text, "warning", "pip install -U ipykernel, then restart the kernel")
    else:
        yield Finding(AREA, "kernel", f"ipykernel {version}")


def _kind(shell: Any) -> str:
    from vm_magic.show.front_end import front_end

    kinds = {"terminal": "in a terminal", "console": "in a console", "notebook": "in a notebook", "capture": "captured"}
    return kinds[front_end(shell)]


def check_widgets(shell: Any) -> Iterator[Finding]:
    """Whether the panel and progress bars can be shown: ipywidgets, what shows them, and comms to the page."""
    version = installed("ipywidgets")
    if version is None:
        fix = "pip install ipywidgets, then restart the kernel and reload the page"
        yield Finding(AREA, "widgets", "ipywidgets is not installed: no panel, and bars are text", "warning", fix)
        return
    major = (numbers(version) or (0,))[0]
    for name, fitting in _WIDGETS.items():
        there, wanted = installed(name), fitting.get(major)
        if there is not None and wanted is not None and (numbers(there) or (0,))[0] != wanted:
            text = f"{name} {there} does not go with ipywidgets {version}"
            fix = f"pip install -U ipywidgets '{name}=={wanted}.*', then reload the page"
            yield Finding(AREA, "widgets", text, "problem", fix)
            return
    if getattr(shell, "kernel", None) is None:
        yield Finding(AREA, "widgets", f"ipywidgets {version}; a terminal shows none")
    elif find_spec("comm") is None or not _has_comms():
        fix = "restart the kernel; if it stays so, use JupyterLab, Notebook 7 or VS Code"
        yield Finding(AREA, "widgets", f"ipywidgets {version}, but this kernel has no comms to a page", "problem", fix)
    else:
        yield Finding(AREA, "widgets", f"ipywidgets {version}, with comms to the page")


def _has_comms() -> bool:
    """Whether the kernel put its own manager of comms in place: comm's own reaches nobody."""
    import comm

    return type(comm.get_comm_manager()) is not comm.base_comm.CommManager


def check_remote(remote: "RemoteLLM") -> Iterator[Finding]:
    """Whether the server that the notebook is connected to answers."""
    url, private = remote.base_url, (remote.base_url, remote.model, remote.address.key or "")
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc.rpartition("@")[2], timeout=_PATIENCE)
    headers = {"Authorization": f"Bearer {remote.address.key}"} if remote.address.key else {}
    try:
        connection.request("GET", f"{parts.path}/models", headers=headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        text = f"{url} does not answer directly ({type(error).__name__})"
        fix = "look whether the server runs, and whether a proxy stands between; %vllm_metal connect --close goes back"
        yield Finding("connection", "server", text, "warning", fix, private)
        return
    finally:
        connection.close()
    refused = status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN)
    fix = "%vllm_metal connect URL --api-key KEY" if refused else ""
    text = f"{url} answers{f' {status} to the key that it is sent' if refused else ''}"
    yield Finding("connection", "server", text, "problem" if refused else "ok", fix, private)


def log_facts(lines: Sequence[str]) -> list[tuple[str, str]]:
    """How many warnings and errors of which kinds the log has: their words may quote what was typed, and stay here."""
    found = Counter(filter(None, map(_kind_of_line, lines)))
    if not found:
        return [("log", "no warnings or errors")]
    counted = ", ".join(f"{kind} ×{number}" for kind, number in found.most_common(10))
    return [("log", f"{counted} (%vllm_metal logs has the words)")]


def _kind_of_line(line: str) -> str | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    errors = [name for name in _ERROR.findall(match["text"]) if _is_known(name)]
    return " ".join([match["level"], match["logger"], *errors[-1:]])


def _is_known(name: str) -> bool:
    """Whether that is the name of an error of Python's or ours, and not of something that was typed."""
    from engine import errors

    return isinstance(getattr(builtins, name, None) or getattr(errors, name, None), type)
