"""Texts with a button beside them that copies: inline, so that no extension of the front end is needed.

ipywidgets has no such button, and a kernel cannot reach a browser's clipboard. Its HTML widget, unlike a cell's output,
keeps handlers: this one is a constant that reads the text beside it from the page. Where a page may not write to the
clipboard (no HTTPS) it copies a selection, and where that is not possible either, the text is left selected for Ctrl+C.
"""

import html

_COPY = (
    "const b=this,e=b.closest('.vmp-copied').querySelector('[data-text]'),t=e.textContent,"
    "say=w=>{b.textContent=w;setTimeout(()=>{b.textContent='Copy'},1600)},"
    "hand=()=>{const s=getSelection(),r=document.createRange();r.selectNodeContents(e);"
    "s.removeAllRanges();s.addRange(r);"
    "let ok=false;try{ok=document.execCommand('copy')}catch(x){}say(ok?'Copied':'Press Ctrl+C')};"
    "const c=navigator.clipboard;c&&c.writeText?c.writeText(t).then(()=>say('Copied'),hand):hand()"
)


def copy_button(what: str) -> str:
    """A button that copies the text in the element around it (class ``vmp-copied``) that is marked ``data-text``."""
    label = html.escape(f"copy {what}")
    return (
        f'<button type="button" class="vmp-copy" title="{label}" aria-label="{label}" onclick="{html.escape(_COPY)}">'
        "Copy</button>"
    )


def copied_code(text: str, name: str, *, copies: bool = True) -> str:
    """``text`` in one line with its button."""
    button = copy_button(name) if copies else ""
    return (
        f'<span class="vmp-copied"><code data-text style="user-select:all" data-name="{html.escape(name)}">'
        f"{html.escape(text)}</code>{button}</span>"
    )


def copied_block(text: str, name: str) -> str:
    """``text`` of several lines with its button in the corner."""
    return (
        f'<div class="vmp-copied vmp-block"><pre data-text data-name="{html.escape(name)}">{html.escape(text)}</pre>'
        f"{copy_button(name)}</div>"
    )
