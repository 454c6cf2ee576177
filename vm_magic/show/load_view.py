"""What a load shows: a headline, lines for people, and vllm-metal's line for those who look for it."""

import html
import sys
from collections.abc import Sequence

from engine.memory.plan import LOG_LABEL
from vm_magic.show.display_handle import Bundle
from vm_magic.show.tables import log_line_html

_FAINT, _RESET = "\x1b[2m", "\x1b[22m"


def load_bundle(headline: str, lines: Sequence[str], log_line: str) -> Bundle:
    """All of it in one place of a notebook, the log line folded; as text it stands last."""
    shown = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
    text = "\n".join([headline, *lines, f"{LOG_LABEL}: {log_line}"])
    style = "font-size:13px;line-height:1.5"
    page = f'<div style="{style}"><div><b>{html.escape(headline)}</b></div>{shown}{log_line_html(log_line)}</div>'
    return {"text/plain": text, "text/html": page}


def print_load(lines: Sequence[str], log_line: str) -> None:
    """What follows the headline where nothing can be folded; the log line last, faint in a terminal."""
    last = f"{LOG_LABEL}: {log_line}"
    print(*lines, f"{_FAINT}{last}{_RESET}" if sys.stdout.isatty() else last, sep="\n")
