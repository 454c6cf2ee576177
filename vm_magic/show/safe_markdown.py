"""Markdown from a model, made safe to show: a page must not run what a model wrote, nor fetch it.

Notebooks trust a cell's own output, so raw HTML in a reply would run. Here tags become text, images become
links, and links keep only schemes that open a page. Code and maths stay as written; a dollar that is not maths is
kept from becoming some: a page would typeset all between two prices.
"""

import html
import re
from collections.abc import Iterator

_FENCE = re.compile(r"^((?:[ \t]*(?:[-*+]|\d{1,9}[.)])(?=[ \t]))*[ \t]*)(`{3,}|~{3,})(.*)$")
"""One that opens may stand right behind the mark of a list's item."""
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_DESTINATION = re.compile(r"\](\(|:)(?=[\s>]*([^\s)]{0,400}))")
"""What a link leads to, on the next line too, and there behind the marks of a quotation."""
_NO_FENCE_YET = re.compile(r"([ \t>*+\-\d.)]*)(`{3,})([^`\n]*)$")
"""What would begin a code block, were it not for the backtick behind it."""
_SCHEME = re.compile(r"^([a-z][a-z0-9+.\-]*):", re.IGNORECASE)
_MATHS = re.compile(r"(?<!\\)\$\$.+?\$\$|(?<![\\\w$])\$(?![\s$])((?:\\.|[^\\$])+?)(?<!\s)\$(?![\w$])", re.DOTALL)
"""As pandoc has it: no space behind the first dollar or before the last, and no digit (or letter) behind that."""
_WORDS, _SIGNS = re.compile(r"\d.*[A-Za-z]{2}", re.DOTALL), re.compile(r"[\\^_={}+*<>]")
_ACTIVE = re.compile(r"<[A-Za-z/!?]|\][(:]|!\[")
"""What would mean something outside of code."""
_IMAGES = re.compile(r"(!*)!\[")
_FETCHES = re.compile(r"@\{|%%\{|//|url|^\s*---\s*$|<[a-z!/?]", re.IGNORECASE | re.MULTILINE)
"""What one of Mermaid's drawings needs to name pictures or style sheets from elsewhere: a page fetches them at once."""
_LINKED = re.compile(r"(?<=\]\()[^\s)]*")
DOLLAR = "<span>&#36;</span>"
"""A dollar that neither a reader of Markdown nor MathJax on the page takes for a mark."""
SAFE_SCHEMES = frozenset({"http", "https", "mailto"})


def safe_markdown(text: str) -> str:
    """``text`` with HTML shown as text, images as links and other schemes' links dead; open code blocks are closed."""
    return "\n".join(_safe_parts(re.sub(r"\r\n?", "\n", text)))


def plain_html(text: str) -> str:
    """``text`` as a part of a page, with neither tags nor maths."""
    return html.escape(text).replace("$", DOLLAR)


def open_fence(text: str) -> str | None:
    """The fence that would close the code block in which ``text`` ends; None outside of code."""
    fence: str | None = None
    for line in text.split("\n"):
        fence = _fence_after(line, fence)
    return fence


def _fence_after(line: str, fence: str | None) -> str | None:
    """The open fence behind ``line``, given the one before it."""
    found = _FENCE.match(line)
    if not found:
        return fence
    before, marks, rest = found.groups()
    if fence is None:
        return None if marks[0] == "`" and "`" in rest else marks
    return None if not before.strip() and marks.startswith(fence) and not rest.strip(" \t") else fence


def _safe_parts(text: str) -> Iterator[str]:
    """Text and code blocks in turn, each safe by itself."""
    fence: str | None = None
    opening, part = "", list[str]()
    for line in text.split("\n"):
        after = _fence_after(line, fence)
        if after == fence:
            part.append(line)
            continue
        if after is not None:
            if part:
                yield _safe_text("\n".join(part))
            opening, part = line, []
        else:
            yield _code_block(opening, part, line)
            part = []
        fence = after
    if fence is not None:
        yield _code_block(opening, part, None)
    elif part:
        yield _safe_text("\n".join(part))


def _code_block(opening: str, lines: list[str], closing: str | None) -> str:
    """A code block as written; one that readers could leave early, or end elsewhere, is written anew at the margin."""
    found = _FENCE.match(opening)
    assert found is not None, "a code block begins with a fence"
    before, marks, info = found.groups()
    closing = before + marks if closing is None else closing
    body = "\n".join(lines)
    language = re.match(r"[\w+#.\-]*", info.strip())
    named = language[0] if language else ""
    if named.lower() == "mermaid" and _FETCHES.search(body):
        named = info = ""
    if _ends_alike(before, marks, lines, closing) and not _ACTIVE.search(f"{info}\n{body}"):
        return "\n".join([f"{before}{marks}{info}", *lines, closing])
    longest = max((len(run) for run in re.findall(r"`{3,}|~{3,}", body)), default=2)
    fence = "`" * (longest + 1)
    at_margin = [line[min(len(before), len(line) - len(line.lstrip(" \t"))) :] for line in lines]
    return "\n".join([f"\n{fence}{named}", *at_margin, fence])


def _ends_alike(before: str, marks: str, lines: list[str], closing: str) -> bool:
    """Whether every reader of Markdown sees the block begin and end where we do, or nowhere.

    An item of a list ends with a line that is indented less, and a fence that is indented more is none.
    """
    if before.strip(" ") or any(line.lstrip(" \t").startswith(marks) for line in lines):
        return False
    alike = closing.startswith(before + marks[0]) and "\t" not in closing
    return alike and all(line.startswith(before) for line in lines if line.strip())


def _safe_text(text: str) -> str:
    """Text outside of code blocks, paragraph by paragraph: a code span ends with its paragraph."""
    return "".join(part if not part.strip() else _safe_paragraph(part) for part in re.split(r"(\n[ \t]*\n)", text))


def _safe_paragraph(text: str) -> str:
    result, position = "", 0
    for span in _CODE_SPAN.finditer(text):
        before, code = text[position : span.start()], _code_span(span)
        position = span.end()
        if code is span[0]:
            result += _plain(before) + code
            continue
        # A tag now: a backslash before it would make text of it, and backticks that begin a line, with none behind
        # them any more, a code block of what follows.
        escaping = (len(before) - len(before.rstrip("\\"))) % 2
        result += f"{_plain(before[:-1])}&#92;" if escaping else _plain(before)
        line = result.rfind("\n") + 1
        if fence := _NO_FENCE_YET.match(result, line):
            result = f"{result[:line]}{fence[1]}{'&#96;' * len(fence[2])}{fence[3]}"
        result += code
    return result + _plain(text[position:])


def _code_span(span: re.Match[str]) -> str:
    body = span[2].strip()
    if not _ACTIVE.search(body):
        return span[0]
    # as HTML whose every mark is an entity, the same whether a reader takes the backticks for code or not
    coded = "".join(one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in body)
    return f"<code>{coded}</code>"


def _plain(text: str) -> str:
    without_images = _IMAGES.sub(lambda found: "&#33;" * len(found[1]) + "[", _with_dollars(text))
    with_prices = _LINKED.sub(lambda found: found[0].replace(DOLLAR, "%24"), without_images)
    return _DESTINATION.sub(lambda found: _inert(found) if _unsafe(found[2]) else found[0], with_prices)


def _with_dollars(text: str) -> str:
    """No tags, and dollars apart from those around maths as :data:`DOLLAR`."""
    result, position = [], 0
    for maths in _MATHS.finditer(text):
        if maths[1] and _WORDS.match(maths[1]) and not _SIGNS.search(maths[1]):
            continue  # "$5 a month, or 50$"
        result += [_without_maths(text[position : maths.start()]), maths[0].replace("<", r"\lt ")]
        position = maths.end()
    return "".join([*result, _without_maths(text[position:])])


def _without_maths(text: str) -> str:
    """No mark stays behind a backslash, which would make text of what stands for it."""

    def replaced(found: re.Match[str]) -> str:
        return found[1][: len(found[1]) // 2 * 2] + (DOLLAR if found[2] == "$" else "&lt;")

    return re.sub(r"(?<!\\)(\\*)([$<])", replaced, text)


def _inert(found: re.Match[str]) -> str:
    return found[0].replace("](", "]\\(", 1) if found[1] == "(" else found[0].replace("]:", "]\\:", 1)


def _unsafe(destination: str) -> bool:
    """Whether a link would do more than open a page, however its scheme is written."""
    plain = html.unescape(html.unescape(destination.replace("\\", ""))).lstrip("<")
    scheme = _SCHEME.match(re.sub(r"[^!-~]", "", plain))
    if scheme is None:  # not within what was looked at
        return len(destination) == 400 and not re.search(r"[/?#]", plain)
    return scheme[1].lower() not in SAFE_SCHEMES


def fenced(text: str, language: str = "") -> str:
    """``text`` as a Markdown code block, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
