"""``LLM.replan``: memory changes under running requests, which go on with the same tokens."""

from collections.abc import Iterator

import pytest

from engine.errors import ConfigError, ContextLengthError, MemoryInUseError, MemoryPlanError
from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from tests.engine.parity.oracle import assert_nothing_is_held, mixed_prompts
from tests.engine.parity.tiny_architectures import CONFIGS

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
KINDS = {
    "full": ("llama", {}),
    "sliding": ("gemma3_text", {}),
    "state": ("lfm2", CONFIGS["lfm2"]),
    "contiguous": ("llama", {}),
}


@pytest.fixture(scope="module", params=KINDS)
def llm(request, tiny_model_dir) -> Iterator[LLM]:
    architecture, config = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0" if request.param == "contiguous" else "1")
        options = {"max_model_len": 512, "max_num_seqs": 6, "max_num_batched_tokens": 32}
        with LLM(str(tiny_model_dir(architecture, **config)), **options) as llm:
            yield llm


@pytest.fixture(scope="module")
def plain(tiny_model_dir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512, max_num_seqs=6, max_num_batched_tokens=32) as llm:
        yield llm


def fraction_for(llm: LLM, num_blocks: int, **changes: int) -> float:
    """The fraction that leaves ``num_blocks`` blocks after ``changes`` of length and number of sequences."""
    plan = llm.what_if(**changes)
    size = plan.model_memory + plan.overhead + plan.state_memory + (num_blocks + 0.5) * plan.per_block_bytes
    return size / plan.device_limit


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def watch_moves(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each later resize moves."""
    moved: list[int] = []

    def watch(engine) -> None:
        resize = engine.runner.resize

        def spy(sizes, moves):
            moved.append(sum(map(len, moves)))
            resize(sizes, moves)

        monkeypatch.setattr(engine.runner, "resize", spy)

    llm._thread.call(watch)
    return moved


def test_requests_go_on_with_the_same_tokens_while_memory_shrinks_and_grows(llm, monkeypatch):
    prompts = [*mixed_prompts(3, 199, 60, seed=5), [9 + i * 5 % 170 for i in range(150)]]
    expected = tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False))
    llm.reset_prefix_cache()
    moved = watch_moves(llm, monkeypatch)
    changes = {"max_num_seqs": 4, "max_model_len": 256}
    small, large = fraction_for(llm, 36, **changes), 0.5
    in_front = llm.submit_prompt(
        [7 + i % 150 for i in range(300)], GREEDY.replace(max_tokens=200)
    )  # has the first blocks
    streams = [llm.submit_prompt(prompt, GREEDY) for prompt in prompts[:3]]
    next(streams[0])
    streams.append(llm.submit_prompt(prompts[3], GREEDY))
    in_front.abort()
    rounds = 0
    while not all(stream.finished for stream in streams):  # in prompts' chunks as in decodes
        llm.replan(fraction=small, **changes)
        assert llm.stats().num_blocks == llm.plan.num_blocks == 36
        llm.replan(fraction=large, max_num_seqs=6, max_model_len=512)
        rounds += 1
    assert tokens_of(stream.result() for stream in streams) == expected
    assert rounds >= 4
    assert max(moved) > 0
    assert_nothing_is_held(llm)
    assert tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_pages_and_slots_that_are_given_up_are_freed(llm):
    prompts = mixed_prompts(6, 199, 200, seed=6)
    llm.replan(fraction=0.5, max_num_seqs=6, max_model_len=512)
    few = GREEDY.replace(max_tokens=4)
    expected = tokens_of(llm.generate(prompts, few, use_tqdm=False))
    before = llm.stats().num_cached_blocks
    changes = {"fraction": fraction_for(llm, 40, max_num_seqs=2), "max_num_seqs": 2}
    previewed = llm.what_if(**changes)
    plan = llm.replan(**changes)
    assert plan == previewed == llm.plan
    sizes = [plan.num_blocks_of(spec) for spec in plan.groups]
    pools = llm._thread.call(lambda engine: list(getattr(engine.runner.backend, "pools", [])))
    for pool, spec, size in zip(pools, plan.groups, sizes, strict=False):
        assert pool.num_blocks <= size
        per_block = spec.state_bytes if spec.kind == "state" else spec.block_size * spec.bytes_per_token
        assert pool.nbytes == pool.num_blocks * per_block
    assert llm.stats().num_cached_blocks <= min(before, 40)
    assert llm._thread.call(lambda engine: engine.scheduler.max_num_seqs) == 2
    assert tokens_of(llm.generate(prompts, few, use_tqdm=False)) == expected
    llm.replan(fraction=0.5, max_num_seqs=6)
    assert_nothing_is_held(llm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda llm: {"fraction": fraction_for(llm, 34)}, "34 KV blocks is less than what is in use"),
        (lambda _: {"max_num_seqs": 1}, "max_num_seqs=1 is less than the requests that run"),
        (lambda _: {"max_model_len": 300}, "max_model_len=300 is less than requests under way need"),
    ],
)
def test_shrinking_below_what_is_in_use_names_who_must_end_and_changes_nothing(plain, change, words):
    plain.replan(fraction=0.5, max_num_seqs=6, max_model_len=512)
    params = GREEDY.replace(max_tokens=60)
    prompts = [[11 + (i * k) % 150 for i in range(300)] for k in (3, 7)]
    streams = [plain.submit_prompt(prompt, params, request_id=name) for prompt, name in zip(prompts, "ab", strict=True)]
    for stream in streams:
        next(stream)
    before = plain.plan
    with pytest.raises(MemoryInUseError, match=words) as failed:
        plain.replan(**change(plain))
    assert "nothing was changed" in str(failed.value)
    assert failed.value.requests[-1].request_id == "b"
    assert failed.value.requests[-1].num_tokens > 300
    assert failed.value.requests[-1].num_blocks >= 18
    assert plain.plan is before
    disturbed = tokens_of(stream.result() for stream in streams)
    assert disturbed == tokens_of(plain.generate(prompts, params, use_tqdm=False))
    assert_nothing_is_held(plain)


def test_a_plan_that_does_not_fit_or_makes_no_sense_changes_nothing(plain):
    plain.replan(fraction=0.5, max_num_seqs=6, max_model_len=512)
    before = plain.plan, plain.args
    with pytest.raises(MemoryPlanError):
        plain.replan(fraction=fraction_for(plain, 20))
    with pytest.raises(ConfigError, match=r"--memory-fraction 1\.5: must be"):
        plain.replan(fraction=1.5)
    with pytest.raises(ConfigError, match=r"2\.5"):
        plain.replan(max_num_seqs=2.5)
    with pytest.raises(ConfigError, match="context length"):
        plain.replan(max_model_len=10**6)
    assert (plain.plan, plain.args) == before


def test_the_new_plan_is_what_everyone_sees(plain):
    plain.replan(fraction=0.4, max_num_seqs=3, max_model_len=128)
    with pytest.raises(ContextLengthError, match="maximum context length is 128"):
        plain.submit_prompt([5] * 200, GREEDY)
    assert (plain.args.memory_fraction, plain.args.max_model_len, plain.args.max_num_seqs) == (0.4, 128, 3)
    (info,) = (family for family in plain.metrics.registry.collect() if family.name == "vllm:cache_config_info")
    labels = info.samples[0].labels
    assert (labels["num_gpu_blocks"], labels["gpu_memory_utilization"]) == (str(plain.plan.num_blocks), "0.4")
    open_ended = plain.submit_prompt([5, 6, 7], GREEDY.replace(max_tokens=None))
    next(open_ended)
    plain.replan(max_model_len=100)
    assert len(open_ended.result().outputs[0].token_ids) == 100 - 3
    plain.replan(max_model_len=512, max_num_seqs=6)
    assert_nothing_is_held(plain)


def test_a_request_made_under_the_plan_before_is_refused_by_the_new_one(plain):
    plain.replan(fraction=0.5, max_num_seqs=6, max_model_len=512)
    late = plain._requests.make("late", [5] * 100, GREEDY, max_model_len=512)
    stream = RequestStream("late", None, late.prompt_token_ids, GREEDY, abort=lambda: None)
    plain.replan(max_model_len=128)
    with pytest.raises(ContextLengthError, match="maximum context length is 128"):
        plain._thread.call(lambda engine: engine.add_request(late, stream))
    plain.replan(max_model_len=512)
