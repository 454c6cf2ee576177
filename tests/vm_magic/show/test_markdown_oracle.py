"""A model's Markdown on a page that believes all of it, as markdown-it-py and html.parser read it."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.nightly import size
from tests.vm_magic.show.html_oracle import OF_MARKDOWN, faults_of_markdown, read, trusting
from tests.vm_magic.show.test_safe_markdown import PIECES
from vm_magic.show.growing_markdown import steady
from vm_magic.show.safe_markdown import safe_markdown

HOSTILE = [
    *PIECES,
    *(
        "!",
        "![",
        "!!",
        "[",
        ")",
        "(",
        "![a][b]",
        "[b]: http://x/y.png",
        "javascript:",
        "\r",
        "\x0c",
        "\ufeff",
        "\u2028",
    ),
    *(
        "- ```",
        "1. ```py",
        "> ```",
        "    ```",
        "* ~~~",
        "  ```",
        "\n    ",
        "\n> ",
        "\n- ",
        "</div>",
        "</details>",
        "<br>",
    ),
    *(
        "&#60;script&#62;",
        "[a](&#106;avascript:x)",
        "[a](\\javascript:x)",
        "[a](data:text/html,x)",
        "<style>",
        "<svg/onload=x>",
    ),
    *(
        "\\[",
        "\\(",
        "=\n",
        "# ",
        "***",
        "*",
        "_",
        "``` \n",
        "```\t\n",
        "\x00",
        "<?",
        "<![CDATA[",
        "]]>",
        "https://x.y/$z",
    ),
]


@pytest.mark.nightly
@settings(max_examples=size(120, 20_000), deadline=None)
@given(st.lists(st.sampled_from(HOSTILE), max_size=12).map("".join))
@example("!![a](http://x/y.png)")
@example("> [a](\n> javascript:x)")
@example("[a]\n\n> [a]:\n> javascript:x")
@example("[a](\rjavascript:x)")
@example("    ```\nfoo\n```\n```\n<script>alert(1)</script>\n```")
@example("- ```\n  code\n  ```\nafter")
@example("```\nfoo\n    ```\nbar")
@example("- a\n  ```\nfoo\n  ```")
@example("2. ```\n   code\n   ```\nafter")
@example("\\`<script>alert(1)</script>`")
@example("\\\\`<b>`")
@example("\\\\$")
@example("```py`<script>alert(1)</script>`")
@example("``` \n```py 1. ```[</details>```")
@example("```\u00a0x\ny\n```\u00a0")
def test_no_text_of_a_model_does_more_than_show_text(text: str) -> None:
    assert faults_of_markdown(safe_markdown(text), OF_MARKDOWN) == []


@pytest.mark.nightly
@settings(max_examples=size(12, 2_000), deadline=None)
@given(st.lists(st.sampled_from(HOSTILE), max_size=8).map("".join))
def test_nor_does_a_text_that_is_still_growing(text: str) -> None:
    for end in range(len(text) + 1):
        assert faults_of_markdown(safe_markdown(steady(text[:end])), OF_MARKDOWN) == []


WORDS = st.sampled_from(
    [
        "plain",
        "**bold**",
        "*it*",
        "`code`",
        "`<b>x</b>`",
        "a < b",
        "<b>",
        "</div>",
        "<!--",
        "it's",
        "[link](https://x.y/z)",
        "5 > 3",
    ]
)
LINE = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
CODE = st.lists(
    st.sampled_from(["x = 1", "", "    y", "<b>x</b>", "if a < b:", "[a](b)", "`z`"]), min_size=1, max_size=4
)
BLOCK = st.one_of(
    LINE,
    LINE.map("## {}".format),
    st.lists(LINE, min_size=1, max_size=3).map(lambda lines: "\n".join(f"- {line}" for line in lines)),
    st.lists(LINE, min_size=1, max_size=3).map(
        lambda lines: "\n".join(f"{i + 1}. {one}" for i, one in enumerate(lines))
    ),
    st.tuples(LINE, LINE).map(lambda cells: f"| a | b |\n|---|---|\n| {cells[0]} | {cells[1]} |"),
    LINE.map("> {}".format),
    CODE.map(lambda lines: "\n".join(["```python", *lines, "```"])),
    CODE.map(lambda lines: "\n".join(["~~~", *lines, "~~~"])),
)
escaping = MarkdownIt("commonmark", {"html": False}).enable("table")
"""A reader that shows tags as text."""


@pytest.mark.nightly
@settings(max_examples=size(60, 10_000), deadline=None)
@given(st.lists(BLOCK, min_size=1, max_size=6).map("\n\n".join))
def test_a_page_shows_the_words_and_the_structure_that_were_written(text: str) -> None:
    shown, meant = read(trusting.render(safe_markdown(text))), read(escaping.render(text))
    assert (shown.text, shown.elements) == (meant.text, meant.elements)


@pytest.mark.parametrize(
    "text",
    [
        "1. one\n   ```js\n   let a = 1\n   ```\n2. two",
        "- a\n    - b\n\n      ```py\n      x = 1\n\n      y = 2\n      ```\n\n- c",
        "10. ten\n    ```\n    code\n    ```",
        "```mermaid\ngraph TD\n  A[one] --> B\n  style A fill:#f9f\n```",
    ],
)
def test_code_in_lists_and_drawings_stay_as_they_are(text: str) -> None:
    assert safe_markdown(text) == text


def test_code_right_behind_the_mark_of_an_item_is_a_block_of_its_own() -> None:
    page = read(trusting.render(safe_markdown("- ```py\n  if a:\n      b\n  ```\n\nafter")))
    assert [text for text, around in page.texts if "code" in around] == ["if a:\n    b\n"]
    assert page.text.endswith("after")


@pytest.mark.parametrize(
    "body",
    [
        'flowchart TD\n  A@{ img: "https://x.example/p.png" }',
        "%%{init: {'themeCSS': '.a{}'}}%%\ngraph TD",
        "---\nconfig:\n  theme: base\n---\ngraph TD",
        "graph TD\n  style A fill:URL(#a)",
        'graph TD\n  A["<img src=x>"]',
    ],
)
def test_a_drawing_that_could_fetch_something_is_shown_as_text(body: str) -> None:
    shown = safe_markdown(f"```mermaid\n{body}\n```")
    assert "```mermaid" not in shown
    assert body in shown


REPEATED = [
    *("`<b>` ", "` ", "](", "\\", "<", "$a ", "$x\\", "![ ", "[a](java&#", "]( >"),
    *("```\n", "- ", "- `", "\n", "``` `"),
]


@pytest.mark.parametrize("piece", REPEATED)
def test_no_text_makes_a_page_wait(piece: str) -> None:
    """Repeated thousands of times it takes a fraction of a second; where each looks at all others, minutes."""
    text = piece * (40_000 // len(piece))
    started = time.process_time()
    safe_markdown(text)
    assert time.process_time() - started < 5


def test_an_address_may_be_long_and_hides_no_scheme_in_its_length() -> None:
    links = f"[a](https://x.y/{'z' * 900}) [b]({'&Tab;' * 200}javascript:x) [c]({'z' * 900})"
    page = trusting.render(safe_markdown(links))
    assert page.count("href=") == 1
    assert "javascript:x)" in page


def test_a_price_in_an_address_leaves_the_link_whole() -> None:
    page = trusting.render(safe_markdown("[a](https://x.y/?p=$5) costs $5"))
    assert 'href="https://x.y/?p=%245"' in page
