"""Steps over mlx-lm's own caches, in whatever pieces the scheduler cuts a prompt."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.params.sampling_params import SamplingParams
from engine.runner.backends import ContiguousBackend
from engine.runner.kv.input_batch import InputBatch
from tests.engine.parity.tiny_architectures import VOCAB, tiny_model

PROMPT = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()


def compute(backend: ContiguousBackend, step: Sequence[tuple[Request, int, int]]) -> mx.array:
    """Logits of (request, start, end) computed together."""
    scheduled = []
    for request, start, end in step:
        samples = end == request.num_tokens
        scheduled.append(ScheduledRequest(request, start, end - start, ([],), samples=samples, pending=False))
        request.num_computed_tokens = end
    batch = InputBatch.build(scheduled)
    wanted = [np.array([one.num_tokens - 1] if one.samples else [], dtype=np.int32) for one in batch.scheduled_requests]
    return backend.forward(batch, mx.array(batch.token_ids), wanted)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("cuts", [(8, 9, 20), (8, 9, 10, 20), (19, 20), (1, 2, 20)], ids=str)
def test_a_chunk_of_one_token_may_come_before_others(name: str, cuts: tuple[int, ...]) -> None:
    model = tiny_model(name)
    backend = ContiguousBackend(model)
    request = Request("a", PROMPT, SamplingParams(temperature=0))
    for start, end in zip((0, *cuts), cuts, strict=False):
        logits = compute(backend, [(request, start, end)])
    assert mx.allclose(logits[-1], model(mx.array([PROMPT]))[0, -1], atol=1e-3)
    backend.close()


def test_a_chunk_of_one_token_stays_out_of_the_batch_of_replies() -> None:
    model = tiny_model("llama")
    backend = ContiguousBackend(model)
    replying = Request("reply", PROMPT[:5], SamplingParams(temperature=0), output_token_ids=[7])
    long = Request("long", PROMPT, SamplingParams(temperature=0))
    compute(backend, [(replying, 0, 5), (long, 0, 8)])
    first = compute(backend, [(replying, 5, 6), (long, 8, 9)])
    last = compute(backend, [(long, 9, 20)])
    assert mx.allclose(first[0], model(mx.array([[*PROMPT[:5], 7]]))[0, -1], atol=1e-3)
    assert mx.allclose(last[0], model(mx.array([PROMPT]))[0, -1], atol=1e-3)
    backend.close()
