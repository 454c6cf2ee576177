"""The moving picture of the README: what the first two minutes look like, filmed in JupyterLab with real weights."""

import io
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from tests.browser.conftest import ARTEFACTS, Lab, Notebook
from tests.browser.test_lab import expect

CELLS = [
    "%load_ext vm_magic\n%vllm_metal serve smollm2",
    "%%chat -t 0\nWhat is the capital of France?",
    "%vllm_metal panel",
    "%%chat -t 0 --new --max-tokens 100\nWhy do people like notebooks? Answer in a short list.",
]
SIZE = (920, 940)
MOST_PICTURES = 26
"""Of a scene: of more, some are left out."""
USUAL, LAST_OF_SCENE, LAST = 110, 1400, 3500
"""Milliseconds that a picture is shown."""


class Film:
    """Screenshots of the page, scene by scene; one that shows nothing new is left out."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.milliseconds: list[int] = []

    def scene(self, done: Callable[[], bool]) -> None:
        """Film until ``done``."""
        shots = [self.page.screenshot()]
        deadline = time.monotonic() + 240
        while not done():
            assert time.monotonic() < deadline, "the scene does not end"
            self.page.wait_for_timeout(80)  # pictures cost as much as what they show
            self._add(shots)
        self.page.wait_for_timeout(1000)  # the panel follows
        self._add(shots)
        step = max(1, (len(shots) - 1) / (MOST_PICTURES - 1))
        chosen = [shots[round(i * step)] for i in range(int((len(shots) - 1) / step) + 1)]
        self.frames += [Image.open(io.BytesIO(shot)).convert("RGB") for shot in chosen]
        self.milliseconds += [USUAL] * (len(chosen) - 1) + [LAST_OF_SCENE]

    def _add(self, shots: list[bytes]) -> None:
        shot = self.page.screenshot()
        if shot != shots[-1]:
            shots.append(shot)

    def save(self, name: str) -> bytes:
        """Write a GIF to the artefacts; all frames share one palette, so that nothing flickers."""
        palette = _palette(self.frames)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        ARTEFACTS.mkdir(exist_ok=True)
        path, times = ARTEFACTS / name, [*self.milliseconds[:-1], LAST]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True, disposal=1)
        return path.read_bytes()


def _palette(frames: list[Image.Image]) -> Image.Image:
    """64 colours of the pictures that differ most: the first, the middle ones, the last."""
    chosen = [frames[round(i * (len(frames) - 1) / 5)] for i in range(6)]
    width, height = chosen[0].size
    sheet = Image.new("RGB", (width, height * len(chosen)))
    for i, frame in enumerate(chosen):
        sheet.paste(frame, (0, i * height))
    return sheet.quantize(64, dither=Image.Dither.NONE)


def _ended(notebook: Notebook, number: int) -> bool:
    text: str = notebook.cell(number).locator(".jp-InputPrompt").inner_text()
    return text.strip("[]: ").isdigit()


@pytest.mark.weights
def test_the_readmes_moving_picture_shows_a_load_a_chat_and_the_panel_at_work(
    lab: Lab, open_notebook: Callable[[str], Notebook]
) -> None:
    notebook = open_notebook(lab.write("first_minutes.ipynb", CELLS))
    page = notebook.page
    page.set_viewport_size({"width": SIZE[0], "height": SIZE[1]})
    film = Film(page)
    for number in range(len(CELLS)):
        notebook.run(number)
        if number == 2:  # the panel and the reply below it fill the page
            expect(notebook.output(2).locator(".vmp-head")).to_contain_text("smollm2")
            notebook.cell(number).evaluate("node => node.scrollIntoView({block: 'start'})")
        film.scene(lambda number=number: _ended(notebook, number))  # type: ignore[misc]
    assert "Paris" in notebook.output(1).inner_text()
    picture = film.save("first-minutes.gif")
    assert len(film.frames) >= 8, "a film is more than its ends"
    assert len(picture) < 1_500_000, "a README is read on slow lines, too"
