"""A model's Markdown is shown, and nothing of it runs."""

import re

import mistune
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.outputs import Reply
from engine.safe_markdown import open_fence, safe_markdown

PIECES = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<",
    ">",
    "`",
    "``",
    "```",
    "```py",
    "~~~",
    "~~~~",
    "\n",
    "\n\n",
    " ",
    "   ",
    "    ",
    "- ",
    "1. ",
    "> ",
    "\\",
    "text",
    "[a](javascript:alert(1))",
    "[a](java&#115;cript:x)",
    "](",
    "![a](http://x/y.png)",
    "[a]: javascript:alert(1)",
    "[a]",
    "|",
    "---",
    "<!--",
    "-->",
    "<pre>",
    "</pre>",
    "\t",
    "&lt;",
    "<a href='javascript:x'>",
    "<https://a.b>",
]
RAW_TAG = re.compile(r"<(script|img|a href='|!--)", re.IGNORECASE)
RENDER = mistune.create_markdown(escape=False)


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example("- a\n  ```\n<script>alert(1)</script>\n  ```")
@example("    ```\n<script>alert(1)</script>")
@example("```\n```~~\n<script>alert(1)</script>")
@example("> ```\n<script>alert(1)</script>")
@example("`a\n\n<script>alert(1)</script>`")
@example("[a](<javascript:x>)")
@example("[a](\njavascript:x)")
def test_whatever_a_model_writes_no_tag_of_it_reaches_the_page(text: str) -> None:
    page = str(RENDER(safe_markdown(text)))
    assert not RAW_TAG.search(page)
    assert not re.search(r'(?:href|src)="\s*javascript', page, re.IGNORECASE)


@pytest.mark.parametrize(
    "text",
    [
        "**bold**, *it*, `code`, a > b & c\n\n- x\n- y\n\n| a | b |\n|---|---|\n| 1 | 2 |",
        "```python\nif a < b:\n    print(`x`)\n```\nafter",
        "see [this](https://example.org/a_(b)) or <mailto",
        "> quoted\n\n1. one\n   ```js\n   let a = 1\n   ```\n2. two",
        "",
    ],
)
def test_ordinary_markdown_stays_as_it_is(text: str) -> None:
    assert safe_markdown(text) == text.replace("<mailto", "&lt;mailto")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <b>c</b>", "a &lt;b>c&lt;/b>"),
        ("![alt](http://x/y.png)", "[alt](http://x/y.png)"),
        ("[a](JavaScript:b)", "[a]\\(JavaScript:b)"),
        ("[a](data:text/html,b)", "[a]\\(data:text/html,b)"),
        ("```html\n<b>x</b>\n```", "\n```html\n<b>x</b>\n```"),
        ("```html\n<b>x</b>", "\n```html\n<b>x</b>\n```"),
        ("```\nopen", "```\nopen\n```"),
    ],
)
def test_what_is_changed(text: str, expected: str) -> None:
    assert safe_markdown(text) == expected


def test_code_with_tags_is_readable_as_code() -> None:
    page = str(RENDER(safe_markdown("Use `<div class=a>` and\n```html\n<script>x</script>\n```")))
    assert "<code>&lt;div class=a&gt;</code>" in page
    assert '<code class="language-html">&lt;script&gt;x&lt;/script&gt;\n</code>' in page


@pytest.mark.parametrize(
    ("text", "fence"),
    [
        ("a", None),
        ("```py\nx", "```"),
        ("````\n```", "````"),
        ("```\n```", None),
        ("~~~\n```", "~~~"),
        ("```a`b", None),
    ],
)
def test_the_fence_that_is_open_at_the_end(text: str, fence: str | None) -> None:
    assert open_fence(text) == fence


def test_a_reply_that_a_notebook_shows_is_safe_too() -> None:
    assert Reply("<img src=x> and **bold**")._repr_markdown_() == "&lt;img src=x> and **bold**"
