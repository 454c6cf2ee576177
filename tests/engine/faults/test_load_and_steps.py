"""Out of memory, a bug or a panic at each call of MLX, one after the other: while a model loads and in each step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import MemoryPlanError, ModelLoadError
from engine.llm import LLM
from tests.engine.faults import scenes
from tests.engine.faults.points import MAKES, Make, Points, mlx_points, on_engine_thread
from tests.engine.faults.scenes import assert_goes_on, nothing_leaks, outcome_of
from tests.nightly import size

pytestmark = pytest.mark.nightly
MODELS = {
    "llama": {"num_hidden_layers": 2},
    "gemma3_text": {"num_hidden_layers": 2},
    "qwen3_5": {"num_hidden_layers": 4},
}
SCENES = ("mixed", "guided", "replanned", "scored")
CASES = [(model, scene, ahead) for model in MODELS for scene in SCENES for ahead in (False, True)]
BRIEF = [("llama", "mixed", True), ("qwen3_5", "mixed", False), ("gemma3_text", "replanned", True)]
"""The architecture, what runs, and whether a step is submitted before the last one's tokens are read."""


@pytest.fixture(scope="module")
def points() -> Iterator[Points]:
    with mlx_points(on_engine_thread) as points:
        yield points


def load(folder: Path, *, ahead: bool = False) -> LLM:
    options = {"max_model_len": 256, "max_num_seqs": 6, "max_num_batched_tokens": 32, "gpu_memory_utilization": 0.5}
    llm = LLM(str(folder), **options)
    llm._thread.call(lambda engine: setattr(engine, "_submit_first", ahead))
    return llm


def chosen(total: int, brief: int) -> list[tuple[int, Make]]:
    """All points with all kinds of failure in the long form; else ``brief`` points, each with the next kind."""
    if size(0, 1):
        return [(number, make) for make in MAKES for number in range(total)]
    step = max(1, total // brief)
    return [(number, MAKES[i % len(MAKES)]) for i, number in enumerate(range(step // 2, total, step))]


@pytest.mark.parametrize(("model", "scene", "ahead"), CASES if size(0, 1) else BRIEF)
def test_whatever_fails_in_a_step_ends_its_requests_in_a_line_and_nothing_else(
    tiny_model_dir, points: Points, model: str, scene: str, *, ahead: bool
) -> None:
    folder = tiny_model_dir(model, **MODELS[model])
    start = getattr(scenes, scene)
    with load(folder, ahead=ahead) as llm:
        wanted = outcome_of(start(llm))
        assert not wanted.lines
        llm.reset_prefix_cache()
        points.count()
        assert outcome_of(start(llm)) == wanted
        total = points.passed
        assert total > 50
        for number, make in chosen(total, 5):
            points.armed = False
            llm.reset_prefix_cache()
            points.fail(number, make)
            found = outcome_of(start(llm))
            points.armed = False
            told = f"{make.__name__} at {points.failed}, the {number}th call of MLX: {found.lines}"
            assert not llm.closed, told
            if llm.plan.max_num_seqs != 6:  # the failure was a replan's
                llm.replan(fraction=0.5, max_num_seqs=6)
            assert found.tokens == {name: wanted.tokens[name] for name in found.tokens}, told
            assert all("; " in line for line in found.lines.values()), told
            assert_goes_on(llm, str(folder))


def test_whatever_fails_in_a_load_is_said_in_a_line_and_leaves_nothing(tiny_model_dir, points: Points) -> None:
    folder = tiny_model_dir("llama", **MODELS["llama"])
    load(folder).close()
    points.count()
    with load(folder) as llm:
        total, notes = points.passed, llm.notes
        points.armed = False
        assert_goes_on(llm, str(folder))
    for number, make in chosen(total, 4):
        with nothing_leaks():
            points.fail(number, make)
            try:
                with load(folder) as llm:  # some parts have another way where a model has a bug, and say so
                    assert make is not scenes.OUT_OF_MEMORY, f"{points.failed} for lack of memory: {llm.notes}"
                    assert set(notes) <= set(llm.notes)
            except (ModelLoadError, MemoryPlanError) as error:
                line = str(error)
                assert "\n" not in line
                assert ("out of memory while loading" in line) == (make in scenes.OUT_OF_MEMORY)
            finally:
                points.armed = False
    with load(folder) as llm:
        assert_goes_on(llm, str(folder))
