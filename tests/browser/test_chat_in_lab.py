"""What a model writes, as JupyterLab shows it: cards for its calls, colours for its tokens, and nothing that runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.conftest import Lab, Notebook
from tests.browser.test_lab import FLAGS, LOAD, expect
from tests.vm_magic.chat.test_tools import TEMPLATE, WEATHER

HOSTILE = (
    "It **rains** in Köln, 世界: $5 today and $6 tomorrow, $x^2$. <script>document.title = 'hacked'</script>"
    "<img src=x onerror=\"document.title = 'hacked'\">\n\n"
    "| day | rain |\n|---|---|\n| one | yes |"
)
TOOL = '''
def get_weather(city: str, days: int = 1) -> dict:
    """The weather in a city."""
    return {"city": city, "rain": [True] * days, "next": "<|script_1|>"}
'''


def run_cells(lab: Lab, open_notebook: Callable[[str], Notebook], name: str, cells: list[str]) -> Notebook:
    """A notebook with ``cells``, opened, all of them run."""
    notebook = open_notebook(lab.write(name, cells))
    notebook.run_all()
    notebook.wait_run(len(cells) - 1)
    return notebook


def test_calls_are_cards_tokens_have_colours_and_nothing_of_a_reply_runs(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    folder = script_folder("hostile", f"Let me look.\n{WEATHER}", HOSTILE, chat_template=TEMPLATE)
    cells = [
        LOAD.format(folder=folder, flags=f"{FLAGS} --tool-call-parser hermes") + TOOL,
        "%%chat -t 0 --tools get_weather\nHow is the weather?",
        "%%chat -t 0 --new --logprobs 3\nSay it <|script_1|>",
        "%vllm_metal explain",
        "%vllm_metal history",
    ]
    notebook = run_cells(lab, open_notebook, "hostile.ipynb", cells)
    reply: Any = notebook.output(1)
    expect(reply.locator("code", has_text="get_weather(city='Köln', days=3)")).to_be_visible()
    expect(reply.locator("pre", has_text='"rain":[true,true,true]')).to_be_visible()
    expect(reply.locator("strong", has_text="rains")).to_be_visible()
    expect(reply.locator("td", has_text="yes")).to_be_visible()
    for number in (1, 4):
        expect(notebook.output(number)).to_contain_text("$5 today and $6 tomorrow")
        expect(notebook.output(number).locator("mjx-container")).to_have_count(1)
    expect(notebook.output(2)).to_contain_text("世界: $5 today and $6 tomorrow")
    for number in (1, 2, 3, 4):
        expect(notebook.output(number)).to_contain_text("<script>document.title")
        assert notebook.output(number).locator("script, img").count() == 0
    assert "hacked" not in notebook.page.title()
    rains = notebook.output(2).locator("pre span", has_text="rains").first
    assert "100%" in rains.get_attribute("title")
    expect(notebook.output(3).get_by_text("first miss")).to_be_visible()
    for number, name in ((1, "tools-in-a-cell"), (2, "probabilities"), (3, "explain")):
        notebook.cell(number).scroll_into_view_if_needed()
        notebook.shot(name, notebook.cell(number))


def test_the_manuals_pictures_of_a_tool_and_of_a_scored_text(
    lab: Lab, open_notebook: Callable[[str], Notebook], script_folder: Callable[..., Path]
) -> None:
    answer = (
        "In **Köln** it rains all three days.\n\n| day | rain |\n|---|---|\n| Monday | 4 mm |\n| Tuesday | 11 mm |\n"
        "| Wednesday | 2 mm |"
    )
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ '<|script_1|>' if m.role == 'tool' }}")
    folder = script_folder("friendly", f"Let me look.\n{WEATHER}", answer, chat_template=template)
    tool = '''
def get_weather(city: str, days: int = 1) -> dict:
    """The weather in a city."""
    return {"city": city, "rain in mm": [4, 11, 2][:days]}
'''
    cells = [
        LOAD.format(folder=folder, flags=f"{FLAGS} --tool-call-parser hermes") + tool,
        "%%chat --tools get_weather\nHow will the weather be in Köln?",
        "%vllm_metal load smollm2 --max-model-len 1024",
        "%%vllm_metal score\nThe capital of France is Paris, and the capital of Japan is a bicycle.",
    ]
    notebook = run_cells(lab, open_notebook, "pictures.ipynb", cells)
    expect(notebook.output(1).locator("pre", has_text='"rain in mm":[4,11,2]')).to_be_visible()
    surprise = notebook.output(3).locator("pre span", has_text="bicycle")
    assert "background-color" in surprise.get_attribute("style")
    notebook.output(3).locator("summary").click()
    notebook.page.set_viewport_size({"width": 900, "height": 1000})
    for number, name in ((1, "chat-tool"), (3, "score")):
        notebook.cell(number).scroll_into_view_if_needed()
        notebook.shot(name, notebook.cell(number))
