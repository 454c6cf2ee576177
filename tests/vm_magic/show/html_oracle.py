"""What a page of ours may hold, read by other people's parsers: html.parser and markdown-it-py."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser

from markdown_it import MarkdownIt

VOID = {"br", "hr", "img", "input", "wbr"}
OF_MARKDOWN = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em"),
    *("strong", "a", "table", "thead", "tbody", "tr", "th", "td", "span"),
}
OF_OURS = {*OF_MARKDOWN, "div", "details", "summary", "b", "small", "i", "progress", "button", "style"}
ATTRIBUTES = {"style", "class", "title", "href", "start", "scope", "role", "aria-label", "open", "value", "max", "type"}
SCHEMES = ("http:", "https:", "mailto:")
_FETCHING_STYLE = re.compile(r"url|import|expression|\\|behavior|/\*", re.IGNORECASE)

trusting = MarkdownIt("commonmark", {"html": True}).enable("table")
"""A reader that believes everything, as notebooks do with a cell's own output."""
trusting.validateLink = lambda url: True  # type: ignore[method-assign]


@dataclass
class Page(HTMLParser):
    """A page's elements, and what is wrong with it. ``handlers``: the only ``onclick`` texts that may be there."""

    allowed: Collection[str] = frozenset(OF_OURS)
    handlers: Collection[str] = ()
    problems: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)
    texts: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in self.allowed:
            self.problems.append(f"<{tag}>")
        self.problems += [bad for name, value in attrs if (bad := self._bad(tag, name, value or ""))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.problems.append(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.texts.append((data, tuple(self.open)))

    def handle_comment(self, data: str) -> None:
        self.problems.append(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.problems.append(f"<!{decl}>")

    def handle_pi(self, data: str) -> None:
        self.problems.append(f"<?{data}>")

    def unknown_decl(self, data: str) -> None:
        self.problems.append(f"<![{data}]>")

    def _bad(self, tag: str, name: str, value: str) -> str:
        if name == "onclick" and value in self.handlers:
            return ""
        if name not in ATTRIBUTES and not re.fullmatch(r"data-[\w-]+", name):
            return f"{tag} {name}={value}"
        plain = re.sub(r"[^!-~]", "", value).lower()
        if name == "href" and re.match(r"[a-z][a-z0-9+.-]*:", plain) and not plain.startswith(SCHEMES):
            return f"{tag} {name}={value}"
        return f"{tag} {name}={value}" if name == "style" and _FETCHING_STYLE.search(value) else ""

    @property
    def text(self) -> str:
        """What is to be read, with single spaces."""
        return " ".join("".join(text for text, _ in self.texts).split())


def read(page: str, *, allowed: Collection[str] = OF_OURS, handlers: Collection[str] = ()) -> Page:
    read_page = Page(allowed, handlers)
    read_page.feed(page)
    read_page.close()
    read_page.problems += [f"<{tag}> is not closed" for tag in read_page.open]
    return read_page


def faults_of_markdown(text: str, allowed: Collection[str] = OF_OURS) -> list[str]:
    """What is wrong with ``text`` as Markdown on a page that believes it, between others' outputs."""
    page = read(trusting.render(f'<div class="around">\n\n{text}\n\n</div>\n\nBEHIND'), allowed={*allowed, "div"})
    behind = [around for text, around in page.texts if "BEHIND" in text]
    return page.problems + ([] if behind == [("p",)] else [f"what comes behind it is in {behind}"])


def faults_of_bundle(data: Mapping[str, object], handlers: Collection[str] = ()) -> list[str]:
    """The same of a mime bundle's pages."""
    faults = []
    if "text/html" in data:
        faults += read(str(data["text/html"]), handlers=handlers).problems
    if "text/markdown" in data:
        faults += faults_of_markdown(str(data["text/markdown"]))
    return faults
