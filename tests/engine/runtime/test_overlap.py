"""How steps overlap on a GPU: a decode step is submitted ahead, a long prompt's chunk is waited for."""

import math
from collections.abc import Sequence

import pytest

from engine.core.request import NewRequest
from engine.params.sampling_params import SamplingParams
from engine.runtime import llm_engine
from engine.runtime.llm_engine import LLMEngine
from engine.runtime.stream import RequestStream
from tests.benchmarks.step_host import VOCAB_SIZE, IdleBackend, make_engine, random_prompts, submit


def add(engine: LLMEngine, name: str, prompt: list[int], max_tokens: int) -> RequestStream:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    stream = RequestStream(name, None, prompt, params, lambda: None)
    engine.add_request(NewRequest(name, prompt, params, max_tokens, frozenset(), seed=0), stream)
    return stream


def steps_to_a_token(engine: LLMEngine) -> int:
    """Steps until a short request has a token that comes while one decodes and a long prompt is computed."""
    engine.scheduler.max_num_batched_tokens = 64
    long, short, running = random_prompts(3, VOCAB_SIZE, 4000)
    add(engine, "running", running[:8], 100)
    add(engine, "long", long, 1)
    for _ in range(5):
        engine.step()
    stream = add(engine, "short", short[:20], 1)
    for number in range(1, 10):
        engine.step()
        if stream.metrics.first_token_time is not None:
            return number
    raise AssertionError("no token")


@pytest.mark.parametrize(("long_step", "steps"), [(0.0, 1), (math.inf, 2)])
def test_a_request_that_comes_while_a_long_chunk_is_computed_is_in_the_next_step(
    long_step: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_engine, "LONG_STEP", long_step)
    engine = make_engine(IdleBackend(8), 8, VOCAB_SIZE, num_tokens=4100)
    engine._chunk_seconds = 0.0  # as measured on a short step
    assert steps_to_a_token(engine) == steps


@pytest.mark.parametrize("long_step", [0.0, math.inf])
def test_decode_steps_are_submitted_before_the_last_ones_tokens_are_read(
    long_step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_engine, "LONG_STEP", long_step)
    engine = make_engine(IdleBackend(4), 4, VOCAB_SIZE)
    engine._chunk_seconds = 0.0
    prompts: Sequence[list[int]] = random_prompts(4, VOCAB_SIZE, 30)
    submit(engine, prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    engine.step()
    assert (engine._in_flight is None) == (long_step == 0.0)
    for _ in range(3):
        engine.step()
        assert engine._in_flight is not None
