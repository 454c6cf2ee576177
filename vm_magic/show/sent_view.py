"""What was sent along with a message: one line, with the text folded away below it."""

from collections.abc import Sequence

from engine.format.text import shortened
from vm_magic.show.display_handle import Bundle
from vm_magic.show.safe_markdown import fenced
from vm_magic.show.token_html import escaped

_MOST = 8
_LONGEST = 60


def sent_bundle(names: Sequence[str], text: str, server: str | None = None) -> Bundle:
    """``sent with: In [3], In [5] · 1,234 characters``; ``server`` is where it went, if not to this kernel's model."""
    shown = [shortened(" ".join(name.split()), _LONGEST) for name in names[:_MOST]]
    more = [f"{len(names) - _MOST} more"] if len(names) > _MOST else []
    where = f"sent to {server} with" if server is not None else "sent with"
    title = f"{where}: {', '.join([*shown, *more])} · {len(text):,} characters"
    fold = f'<details><summary><span style="opacity:0.7">{escaped(title)}</span></summary>'
    return {"text/plain": title, "text/markdown": f"{fold}\n\n{fenced(text, 'markdown')}\n\n</details>"}
