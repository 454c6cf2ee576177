"""The manual's pictures of the panel, made anew: ``python -m pytest tests/browser/make_pictures.py``.

Not collected with the tests. Figures of speed are part of the pictures: let nothing else run meanwhile.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.conftest import PATIENCE, ROOT, Lab, Notebook
from tests.browser.test_lab import PanelPage, expect

IMAGES = ROOT / "notebooks" / "images"
LOAD = """\
%load_ext vm_magic
server = %vllm_metal serve smollm2 --port 0 --max-model-len 2048 --max-num-seqs 8 --gpu-memory-utilization 0.10"""
ASK = """\
import threading, time, vm_magic
from openai import OpenAI
llm = vm_magic.current()
system = "You explain the natural world to curious people. " * 12
def messages(name):
    return [{"role": "system", "content": system}, {"role": "user", "content": f"Tell me about {name}."}]
def from_the_notebook(name, temperature):
    prompt = llm.tokenize(llm.render_chat(messages(name)), add_special_tokens=False)
    params = llm.sampling_params(temperature=temperature, max_tokens=900, ignore_eos=True)
    llm.submit_prompt(prompt, params, request_id=f"req-{name}")
def from_the_port(name, temperature):
    client = OpenAI(base_url=server.base_url, api_key=server.api_key)
    for _ in client.chat.completions.create(
        model="smollm2", messages=messages(name), stream=True, temperature=temperature, max_tokens=900,
        extra_body={"ignore_eos": True, "request_id": name},
    ):
        pass
from_the_notebook("tides", 1.0)
while not any(request.num_output_tokens for request in llm.activity().requests):
    time.sleep(0.1)
from_the_notebook("rivers", 0.7)
for name, temperature in (("alps", 0.0), ("reefs", 0.2)):
    threading.Thread(target=from_the_port, args=(name, temperature), daemon=True).start()"""


@pytest.mark.timeout(600)
def test_pictures_of_the_panel(lab: Lab, open_notebook: Callable[[str], Notebook], smollm2_gguf: Any) -> None:
    lab.write("pictures.ipynb", [LOAD, "%vllm_metal panel", ASK])
    notebook = open_notebook("pictures.ipynb")
    notebook.page.set_viewport_size({"width": 1440, "height": 1000})
    panel = PanelPage(notebook.page)
    for number in (0, 1):
        notebook.run(number)
        prompt = notebook.cell(number).locator(".jp-InputPrompt")
        expect(prompt).to_have_text(f"[{number + 1}]:", timeout=5 * PATIENCE)
    panel.button("Measure").click()
    expect(panel.root.get_by_text("once tokens are generated")).to_be_visible(timeout=PATIENCE)
    notebook.run(2)
    expect(panel.requests).to_have_count(4, timeout=PATIENCE)
    for number in range(4):
        expect(panel.requests.nth(number)).to_contain_text("tok/s", timeout=PATIENCE)
    notebook.page.wait_for_timeout(15_000)  # a line of some length
    expect(panel.root.get_by_text("of what the memory's speed allows")).to_be_visible(timeout=PATIENCE)
    _keep(notebook, panel, "panel-activity")
    panel.tab("Memory")
    panel.press("fraction", "ArrowRight", "0.15")
    expect(panel.root.get_by_text("Not applied yet.")).to_be_visible(timeout=PATIENCE)
    _keep(notebook, panel, "panel-memory")
    panel.button("Undo").click()
    panel.tab("Sampling")
    panel.root.get_by_label("preset").select_option("qwen-coding")
    expect(panel.readout("top_p")).to_have_text("0.95", timeout=PATIENCE)
    panel.press("temperature", "ArrowLeft", "0.55")
    expect(panel.root.get_by_text("set", exact=True)).to_be_visible(timeout=PATIENCE)
    _keep(notebook, panel, "panel-sampling")


def _keep(notebook: Notebook, panel: PanelPage, name: str) -> None:
    notebook.page.wait_for_timeout(500)
    shutil.copy(notebook.shot(name, panel.root), IMAGES)
