"""The plan's picture and tables as HTML, and what a shell shows of them."""

from html.parser import HTMLParser
from typing import Any

import pytest

from engine.memory.cache_spec import FullAttentionSpec, KVVectors, SlidingWindowSpec, StateSpec
from engine.memory.plan import MemoryPlan, parts
from engine.memory.plan_table import tabulate
from engine.memory.planner import what_if
from tests.memory_plans import make_plan
from vm_magic.show.plan_view import plan_html, plan_picture_html, plan_table_html

GROUPS = [
    FullAttentionSpec((2, 5), 20_480, vectors=(KVVectors(10, 512, 2),) * 2),
    SlidingWindowSpec((0, 1, 3, 4), 204_800, window=1024, vectors=(KVVectors(200, 256, 2),) * 2),
    StateSpec((6,), state_bytes=64_000_000),
]


def a_plan(**changes: Any) -> MemoryPlan:
    given: dict[str, Any] = {
        "groups": GROUPS,
        "device_limit": 51_540_000_000,
        "fraction": 0.75,
        "model_memory": 21_640_000_000,
        "overhead": 1_080_000_000,
        "block_size": 16,
        "context_length": 262_144,
        "max_model_len": 131_072,
    }
    return make_plan(**{**given, **changes})


class Page(HTMLParser):
    """Tags that were left open, attributes by tag, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_the_picture_shows_every_part_in_proportion_and_says_it_to_a_screen_reader() -> None:
    plan = a_plan()
    page = Page(plan_picture_html(plan))
    image = next(attributes for _, attributes in page.attributes if attributes.get("role") == "img")
    pieces = [a["style"] or "" for _, a in page.attributes if (a.get("style") or "").startswith("flex:")]
    assert len(pieces) == len(parts(plan)) == 6
    for part, piece in zip(parts(plan), pieces, strict=True):
        assert float(piece.removeprefix("flex:").partition(" ")[0]) == pytest.approx(
            part.num_bytes / plan.device_limit, abs=1e-5
        )
        assert f"{part.name} " in str(image["aria-label"])
        assert part.name in page.text
        assert part.remark in page.text
    assert "21.64GB" in str(image["aria-label"])


def test_pictures_bring_no_script_no_style_sheet_and_nothing_from_outside() -> None:
    page = Page(plan_html(a_plan()))
    assert not {tag for tag, _ in page.attributes} & {"script", "style", "link", "img", "iframe"}
    assert not [a for _, attributes in page.attributes for a in attributes if a.startswith("on")]
    assert "http" not in plan_html(a_plan())


def test_the_page_holds_the_log_line_the_groups_and_what_the_plan_means() -> None:
    plan = a_plan()
    text = Page(plan_html(plan)).text
    for words in (plan.log_line(), "full", "sliding", "state", "20,480B", "0-1, 3-4", "51.54GB", "38.65GB"):
        assert words in text
    assert f"{plan.max_concurrency:.2f} requests of full length at once" in text


def test_names_in_a_plan_cannot_become_markup() -> None:
    page = Page(plan_html(a_plan(memory_flag="<b onclick=x>")))
    assert "<b onclick=x>" in page.text


def test_plans_side_by_side_say_what_does_not_fit_and_by_how_much() -> None:
    plan = a_plan()
    table = tabulate(
        lambda **given: what_if(plan, **given), {"fraction": [0.5, 0.75], "max_model_len": [32768, 262144]}
    )
    assert [row.fits for row in table.rows] == [True, False, True, True]
    text = str(table)
    assert text.splitlines()[0].split()[:2] == ["fraction", "max_model_len"]
    refused = table.rows[1].error
    assert refused is not None
    assert "short" in text.splitlines()[2]
    assert f"{refused.max_model_len_that_fits:,}" in text.splitlines()[2]
    page = Page(plan_table_html(table))
    assert [a["scope"] for tag, a in page.attributes if tag == "th"] == ["col"] * len(table.header)
    assert sum(tag == "tr" for tag, _ in page.attributes) == 5


def test_a_notebook_shows_html_while_the_extension_is_loaded_and_text_after(shell: Any) -> None:
    plan = a_plan()
    table = tabulate(lambda **given: what_if(plan, **given), {"fraction": [0.75]})
    for _ in range(2):
        shell.display_formatter.active_types = ["text/plain", "text/html"]
        assert "<table" in shell.display_formatter.format(plan)[0]["text/html"]
        assert "<table" in shell.display_formatter.format(table)[0]["text/html"]
        assert shell.display_formatter.format(table)[0]["text/plain"] == str(table)
        shell.extension_manager.unload_extension("vm_magic")
        assert set(shell.display_formatter.format(plan)[0]) == {"text/plain"}
        assert set(shell.display_formatter.format(table)[0]) == {"text/plain"}
        shell.extension_manager.load_extension("vm_magic")
