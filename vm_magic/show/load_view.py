"""What a load leaves: a headline, with vllm-metal's line of the plan for those who look for it."""

import html

from engine.memory.plan import LOG_LABEL
from vm_magic.show.display_handle import Bundle
from vm_magic.show.tables import log_line_html
from vm_magic.show.terminal import say


def load_bundle(headline: str, log_line: str) -> Bundle:
    """The headline in a notebook; a click on it shows the log line, which as text stands below it."""
    mark = f'<span style="opacity:.6;margin-left:8px">{LOG_LABEL}</span>'
    page = log_line_html(log_line, "font-size:13px", f"<b>{html.escape(headline)}</b>{mark}")
    return {"text/plain": f"{headline}\n{LOG_LABEL}: {log_line}", "text/html": page}


def print_log_line(log_line: str) -> None:
    """The log line where nothing can be folded: faint in a terminal."""
    say(f"{LOG_LABEL}: {log_line}", faint=True)
