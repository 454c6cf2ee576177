"""A model's Markdown is shown, and nothing of it runs."""

import re
from types import SimpleNamespace

import mistune
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter

from engine.outputs import Reply
from vm_magic.shell.hooks import add_formatters
from vm_magic.show.safe_markdown import DOLLAR, open_fence, safe_markdown

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
    "$",
    "$5",
    "$$",
    "\\$",
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


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 today and $6 tomorrow.",
        "US$5, ($6) or `x` $7",
        "from $5-$10, $5/$6 or $1,000.50",
        "- $5\n- $6 **more**",
        "| $5 | $6 |\n|---|---|\n|$7|$8|",
        "$5 a month, or 50$/year",
        r"\$5 and \$6",
        "a lone $",
    ],
)
def test_prices_are_no_maths(text: str) -> None:
    safe = safe_markdown(text)
    assert "$" not in safe
    assert safe.replace(DOLLAR, "$") == text.replace("\\$", "$")


@pytest.mark.parametrize(
    "text",
    [
        "$x^2$ and $a_1$, $5$, ($2x + 3 = 7$).",
        "$$\n\\int_0^1 x\\,dx\n$$",
        r"\(x\) and \[y\]",
        r"$\$5$ is $n \text{ more}$",
        "`$5` and\n```sh\necho $HOME $PATH\n```",
    ],
)
def test_maths_and_code_stay_as_they_are(text: str) -> None:
    assert safe_markdown(text) == text


def test_a_price_beside_maths_is_still_a_price() -> None:
    assert safe_markdown("$x < y$ costs $5, <b>") == rf"$x \lt  y$ costs {DOLLAR}5, &lt;b>"


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
    shell = SimpleNamespace(display_formatter=DisplayFormatter())
    add_formatters(shell)
    shown = shell.display_formatter.format(Reply("<img src=x> and **bold**"))[0]
    assert shown["text/markdown"] == "&lt;img src=x> and **bold**"
