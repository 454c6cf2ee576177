"""Short names for what the tests do to a shell."""

from typing import Any

import pytest

Capture = pytest.CaptureFixture[str]


def line(shell: Any, text: str) -> Any:
    """``%vllm_metal text``; raises what the magic raised."""
    return shell.run_line_magic("vllm_metal", text)


def cell(shell: Any, head: str, body: str = "") -> Any:
    """``%%head`` with ``body``: the cell's result; raises what the cell raised."""
    result = shell.run_cell(f"%%{head}\n{body}\n", store_history=True)
    result.raise_error()
    return result.result


def shown(shell: Any) -> dict[str, Any]:
    """The mime bundle displayed last."""
    data: dict[str, Any] = shell.display_pub.outputs[-1]["data"]
    return data
