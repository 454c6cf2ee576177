"""Lets nbval compare streamed cells: an updated display counts as what it shows in the end.

nbval keeps the first state of a display and drops every ``update_display_data``; the notebook file holds the last
state, as Jupyter saves it. Here an update changes the display that it belongs to.
"""

import os
from tempfile import TemporaryDirectory
from typing import Any

from nbformat import from_dict
from nbval.plugin import IPyNbFile

Message = dict[str, Any]
_SHOWS = ("display_data", "execute_result", "update_display_data")


def applying_updates(get_kernel_message: Any) -> Any:
    """``get_kernel_message`` wrapped: updates are folded into earlier displays and not handed on."""

    def get(self: IPyNbFile, timeout: float | None = None, stream: str = "iopub") -> Message:
        displays: dict[str, list[dict[str, Any]]] = self.__dict__.setdefault("displays_by_id", {})
        while True:
            message: Message = get_kernel_message(self, timeout=timeout, stream=stream)
            if message["msg_type"] not in _SHOWS:
                return message
            content = message["content"]
            display_id = content.get("transient", {}).get("display_id")
            if message["msg_type"] == "update_display_data":
                for data in displays.get(display_id, ()):
                    data.clear()
                    data.update(from_dict(content["data"]))
                continue
            content["data"] = from_dict(content["data"])
            if display_id:
                displays.setdefault(display_id, []).append(content["data"])
            return message

    get.applies_updates = True  # type: ignore[attr-defined]
    return get


def pytest_configure(config: Any) -> None:
    """Wrap nbval's reader, once; kernels of other test processes are not seen by those of this one."""
    runtime = TemporaryDirectory(prefix="vm-magic-")
    config.add_cleanup(runtime.cleanup)
    os.environ["XDG_RUNTIME_DIR"] = runtime.name
    if not hasattr(IPyNbFile.get_kernel_message, "applies_updates"):
        IPyNbFile.get_kernel_message = applying_updates(IPyNbFile.get_kernel_message)
