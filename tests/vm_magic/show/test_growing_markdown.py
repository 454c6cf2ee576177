"""Markdown while it is being written."""

import itertools

import mistune
import pytest

from vm_magic.show.growing_markdown import steady
from vm_magic.show.safe_markdown import safe_markdown

TEXT = """\
Intro with **bold** and `code`.
- one
- two

| a | b |
|---|---|
| 1 | 2 |

```python
x = [1] * 2  # **not bold**
```
# Head
1. first

Last words"""
RENDER = mistune.create_markdown(plugins=["table"])


def tags(page: str) -> list[str]:
    return [part.split(">")[0].split()[0] for part in page.split("<")[1:]]


def test_what_is_shown_never_changes_its_kind_while_it_grows() -> None:
    pages = [str(RENDER(safe_markdown(steady(TEXT[:end])))) for end in range(1, len(TEXT) + 1)]
    for before, after in itertools.pairwise(pages):
        opened = [tag for tag in tags(before) if not tag.startswith("/")]
        assert [tag for tag in tags(after) if not tag.startswith("/")][: len(opened)] == opened
    assert pages[-1] == str(RENDER(TEXT))


def test_bars_and_open_marks_are_never_seen() -> None:
    for end in range(1, len(TEXT) + 1):
        page = str(RENDER(safe_markdown(steady(TEXT[:end]))))
        outside = page.split("<pre>")[0]
        assert "|" not in outside
        assert "```" not in page
        assert "**" not in outside
        assert "`" not in outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n-", "a\n"),
        ("a\n==", "a\n"),
        ("a **b", "a **b**"),
        ("a `b", "a `b`"),
        ("```py", ""),
        ("```py\nx\n``", "```py\nx"),
        ("| a |", ""),
        ("| a |\n|--", ""),
        ("| a |\n|---|\n", "| a |\n|---|\n"),
        ("a | b", "a | b"),
        ("plain", "plain"),
    ],
)
def test_the_end_waits_until_its_kind_is_known(text: str, shown: str) -> None:
    assert steady(text) == shown
