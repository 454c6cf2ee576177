"""Free greedy requests in a batch with constrained ones: their tokens stay mlx-lm's."""

import json
from collections.abc import Iterator

import pytest

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from tests.engine.parity.oracle import assert_nothing_is_held, mixed_prompts, oracle_tokens

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
FIELDS = (
    {"structured_outputs": {"json": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 5}}},
    {"structured_outputs": {"choice": ["left", "right"]}},
    {"repetition_detection": {"max_pattern_size": 1, "min_count": 100}},
)


@pytest.fixture(scope="module", params=["paged", "contiguous"])
def llm(request, tiny_model_dir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512, use_paged_attention=request.param == "paged") as llm:
        yield llm


@pytest.mark.parametrize("others", [0, 1, 5])
def test_free_requests_keep_their_tokens(llm: LLM, others: int) -> None:
    prompts = mixed_prompts(6 + others, 49152, 60)
    name = llm.args.model
    free = [llm.submit_prompt(prompt, GREEDY) for prompt in prompts[:3]]
    long = GREEDY.replace(max_tokens=40)
    constrained = [
        llm.submit_prompt(prompt, long, **FIELDS[number % len(FIELDS)]) for number, prompt in enumerate(prompts[6:])
    ]
    free += [llm.submit_prompt(prompt, GREEDY) for prompt in prompts[3:6]]
    assert [stream.result().outputs[0].token_ids for stream in free] == [
        oracle_tokens(name, prompt, NUM_TOKENS) for prompt in prompts[:6]
    ]
    for number, stream in enumerate(constrained):
        output = stream.result().outputs[0]
        if number % 3 == 0 and output.finish_reason == "stop":
            assert 3 <= len(json.loads(output.text)) <= 5
        if number % 3 == 1:
            assert output.text in ("left", "right")
        if number % 3 == 2:
            assert output.token_ids == oracle_tokens(name, prompts[6 + number], 40)
    assert_nothing_is_held(llm)
