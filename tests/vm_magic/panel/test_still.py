"""What stays of the panel in a saved notebook, and the line that tells the device's share: without a browser."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter

from engine import LLM
from tests.engine.test_live_settings import COUNTING, PROMPT, wait_until
from tests.vm_magic.helpers import line
from vm_magic.panel import close_panel, open_panel
from vm_magic.panel.copying import copied_block
from vm_magic.panel.panel import Panel
from vm_magic.state.session import current_session

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def llm(engine_shell: Any, scripted_llm: Callable[..., LLM]) -> Iterator[LLM]:
    loaded = scripted_llm(COUNTING, max_model_len=512, gpu_memory_utilization=0.02)
    current_session().llm = loaded
    yield loaded
    close_panel()
    current_session().llm = None


def outputs(shell: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = shell.display_pub.outputs
    return found


def answer(llm: LLM) -> None:
    llm.submit_prompt(PROMPT, llm.sampling_params(max_tokens=20, temperature=0)).result()


def test_below_the_widgets_stands_a_picture_that_their_own_sheet_hides(engine_shell: Any, llm: LLM) -> None:
    line(engine_shell, "set temperature=0.25")
    line(engine_shell, "panel")
    widget, still = (output["data"] for output in outputs(engine_shell)[-2:])
    assert WIDGET in widget
    assert WIDGET not in still
    page = still["text/html"]
    (name,) = set(re.findall(r"vm-still-\w+", page))
    panel = open_panel()
    assert f".{name}" in panel.widget.children[0].value
    for words in ("scripted", "port closed", "temperature=0.25", "KV blocks", "weights"):
        assert words in page
    assert "<svg" not in page, "taken out of a notebook that is not trusted"
    assert "<script" not in page
    assert "onclick" not in page
    assert len(page) < 60_000


def test_it_is_drawn_anew_when_the_engine_rests_or_settings_change_and_not_otherwise(
    engine_shell: Any, llm: LLM
) -> None:
    line(engine_shell, "panel --close")
    panel = Panel(current_session, refresh_seconds=None)
    panel.show(engine_shell, "a line")
    shown = len(outputs(engine_shell))
    panel.refresh()
    assert len(outputs(engine_shell)) == shown
    answer(llm)

    def drawn() -> bool:
        panel.refresh()
        return "peak" in outputs(engine_shell)[-1]["data"]["text/html"]

    wait_until(drawn)
    assert outputs(engine_shell)[-1]["update"] is True
    current_session().settings.update(top_p=0.5)
    panel.refresh()
    assert "top_p=0.5" in outputs(engine_shell)[-1]["data"]["text/html"]
    panel.close()
    assert "The panel was closed." in outputs(engine_shell)[-1]["data"]["text/html"]


def test_nbconvert_shows_the_picture_of_a_notebook_that_kept_no_widgets(engine_shell: Any, llm: LLM) -> None:
    line(engine_shell, "panel")
    cell = nbformat.v4.new_code_cell("%vllm_metal panel")
    cell.outputs = [
        nbformat.v4.new_output("display_data", data=output["data"]) for output in outputs(engine_shell)[-2:]
    ]
    page, _ = HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert "KV blocks" in page
    assert "widget-view" not in page.split("<body")[1]


def test_the_line_asks_first_then_tells_the_share_and_the_reasons_on_demand(llm: LLM) -> None:
    panel = Panel(current_session, refresh_seconds=None)
    speed = panel.activity.speed
    panel.refresh()
    assert "How much of this device" in speed.text.value
    speed.measure.click()
    panel.refresh()
    assert speed.measure.layout.display == "none"
    assert "shows while tokens are generated" in speed.text.value
    answer(llm)

    def told() -> bool:
        panel.refresh()
        return "of what the memory's speed allows" in speed.text.value and speed.why.layout.display == ""

    wait_until(told)
    assert speed.reasons.value == ""
    speed.why.value = True
    panel.refresh()
    assert "measured on this device" in speed.reasons.value
    panel.close()


def test_while_requests_run_the_button_says_when_to_try_again(llm: LLM) -> None:
    panel = Panel(current_session, refresh_seconds=None)
    stream = llm.submit_prompt(PROMPT, llm.sampling_params(max_tokens=480, temperature=0, ignore_eos=True))
    try:
        llm.gauge.device = None
        panel.refresh()
        panel.activity.speed.measure.click()
        panel.refresh()
        said = panel.activity.speed.text.value
        assert stream.finished or "only while no request runs" in said
    finally:
        stream.abort()
        panel.close()


def test_a_text_that_copies_is_escaped_and_its_handler_is_the_same_for_all() -> None:
    one, other = copied_block("<img src=x onerror=alert(1)>", 'a"b'), copied_block("';alert(1)//", "b")
    assert "<img" not in one
    assert 'title="copy a&quot;b"' in one
    handlers = [re.findall(r'onclick="([^"]*)"', text) for text in (one, other)]
    assert handlers[0] == handlers[1]
    assert len(handlers[0]) == 1
