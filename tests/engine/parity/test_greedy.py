"""Greedy tokens equal mlx-lm's, whatever shares the batch and however the work was cut."""

from collections.abc import Iterator

import pytest

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from tests.engine.parity.oracle import assert_nothing_is_held, mixed_prompts, oracle_tokens, shrink_pool

pytestmark = pytest.mark.timeout(900)  # mlx-lm's own tokens on real weights: seconds here, minutes on a busy machine
MODELS = ("smollm2", "llama", "qwen2", "qwen3")
NUM_TOKENS = 4
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=MODELS)
def model(request, smollm2_gguf, tiny_model_dir) -> str:
    return request.param if request.param == "smollm2" else str(tiny_model_dir(request.param))


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    return mixed_prompts(32, 49152, 40 if model == "smollm2" else 120)


@pytest.fixture(scope="module")
def num_some(model) -> int:
    """How many prompts the variations take: real weights cost seconds here."""
    return 6 if model == "smollm2" else 12


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
    return [oracle_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.fixture(scope="module", params=["paged", "contiguous"])
def llm(request, model) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "1" if request.param == "paged" else "0")
        with LLM(model, max_model_len=512) as llm:
            assert llm._thread.call(lambda engine: engine.runner.backend.paged) == (request.param == "paged")
            yield llm


@pytest.fixture
def fresh(llm) -> Iterator[LLM]:
    """The engine with an empty cache and its planned pool; afterwards nothing may be held."""
    shrink_pool(llm, min(llm.plan.num_blocks, 2000))
    chunk = llm._thread.call(lambda engine: engine.scheduler.max_num_batched_tokens)
    yield llm
    llm._thread.call(lambda engine: setattr(engine.scheduler, "max_num_batched_tokens", chunk))
    assert_nothing_is_held(llm)


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_requests_alone(fresh, prompts, expected):
    for i in (0, 7, 20):
        assert tokens_of(fresh.generate([prompts[i]], GREEDY)) == [expected[i]]


def test_thirty_two_requests_of_mixed_lengths_at_once(fresh, prompts, expected):
    assert tokens_of(fresh.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_prompts_found_in_the_prefix_cache(fresh, prompts, expected, num_some):
    prompts, expected = prompts[:num_some], expected[:num_some]
    fresh.generate(prompts, GREEDY, use_tqdm=False)
    again = fresh.generate(prompts, GREEDY, use_tqdm=False)
    assert tokens_of(again) == expected
    paged = fresh._thread.call(lambda engine: engine.runner.backend.paged)
    hits = [output.num_cached_tokens for output in again]
    assert hits == [(len(prompt) - 1) // 16 * 16 if paged else 0 for prompt in prompts]
    assert max(map(len, prompts)) > 32


def test_a_next_turn_that_continues_a_cached_one(fresh, model, prompts):
    first = max(prompts, key=len)
    reply = tokens_of(fresh.generate([first], GREEDY))[0]
    turn = [*first, *reply, 11, 12, 13]
    output = fresh.generate([turn], GREEDY)
    assert tokens_of(output) == [oracle_tokens(model, turn, NUM_TOKENS)]


def test_chunks_of_sixteen_tokens(fresh, prompts, expected, num_some):
    fresh._thread.call(lambda engine: setattr(engine.scheduler, "max_num_batched_tokens", 16))
    assert tokens_of(fresh.generate(prompts[:num_some], GREEDY, use_tqdm=False)) == expected[:num_some]


def test_requests_that_were_preempted(fresh, prompts, expected):
    """The pool holds the prompts and no more, and each grows into another block while it generates."""
    blocks = [-(-len(prompt) // 16) for prompt in prompts]
    growing = [i for i, prompt in enumerate(prompts) if len(prompt) + NUM_TOKENS - 1 > 16 * blocks[i]]
    assert len(growing) > 3
    shrink_pool(fresh, sum(blocks[i] for i in growing))
    before = fresh.stats().num_preemptions
    outputs = fresh.generate([prompts[i] for i in growing], GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == [expected[i] for i in growing]
    assert fresh.stats().num_preemptions > before


def test_four_completions_of_one_prompt_share_its_blocks(fresh, prompts, expected):
    outputs = fresh.generate(prompts[:3], GREEDY.replace(n=4), use_tqdm=False)
    assert [[c.token_ids for c in output.outputs] for output in outputs] == [[tokens] * 4 for tokens in expected[:3]]
