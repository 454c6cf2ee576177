"""Why it is slow: shares and reasons from numbers, without a model; and a tiny model's against floors by hand."""

from array import array
from dataclasses import replace
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.chat.request import Account
from engine.explain.gauge import BUSY
from engine.explain.request_log import FinishedCompletion, Outcome, RequestRecord
from engine.explain.request_speed import RequestFacts, request_speed, sampling_reasons, thought_share
from engine.explain.speed import Reason, Speed, SpeedFacts, costliest_first, flops_text, rate_text, running_speed
from engine.memory.cache_spec import FullAttentionSpec
from engine.memory.roofline import DeviceSpeed, ModelWork
from engine.outputs import RequestMetrics, StepMark, StepTotals
from engine.params.structured_outputs import Constraints, StructuredOutput
from engine.runner.device_speed import gpu_flops
from engine.runner.kv.attention_path import NO_KERNELS_ON_CPU, AttentionPath
from tests.conftest import TinyModelDir
from tests.memory_plans import make_plan
from tests.tiny_models import VOCAB_SIZE

GPU = DeviceSpeed(100e9, 1e13, "bfloat16", "by hand")
GROUP = FullAttentionSpec((0, 1), 1000)
FACTS = SpeedFacts(
    plan=make_plan(groups=[GROUP]),
    work=ModelWork(dense_bytes=10**9, dense_products=5 * 10**8, dtype="bfloat16"),
    attention_paths=(AttentionPath("full", (0, 1), "paged"),),
    on_cpu=False,
)
FIRST = StepTotals(prompts=1, prompt_seconds=0.1, prompt_tokens=500, context=(0,), pairs=(125_250,))
LAST = FIRST._replace(decodes=99, decode_seconds=9.9 / 4, rows=99, context=(54_450,))


def metrics(**given: Any) -> RequestMetrics:
    times = {"arrival_time": 0.0, "scheduled_time": 0.0, "first_token_time": 0.1, "last_token_time": 2.6}
    steps = {"steps_before": StepTotals(), "steps_first": FIRST, "steps": StepMark(given.pop("steps_last", LAST))}
    return RequestMetrics(**{**times, **steps, **given})


def record(measured: RequestMetrics, **given: Any) -> RequestRecord:
    one = FinishedCompletion("x", array("i", range(100)), "stop", None)
    values = {"params": SamplingParams(), "constraints": None, "prompt_token_ids": array("i", range(500)), **given}
    return RequestRecord(
        number=2,
        request_id="req",
        prompt=None,
        max_tokens=100,
        cache_salt=None,
        stream=None,
        account=Account(),
        _outcome=Outcome((one,), 0, measured, True),
        **values,
    )


def told(measured: RequestMetrics | None = None, facts: SpeedFacts = FACTS, **given: Any) -> Speed:
    seen = given.pop("seen", RequestFacts())
    return request_speed(record(measured or metrics(), **given), seen, facts, GPU, "never")


def reasons(speed: Speed) -> str:
    return "\n".join(map(str, speed.reasons))


def test_the_line_says_bytes_time_rate_and_share() -> None:
    speed = told()
    assert speed.lines[0] == (
        "decode: 39.6 tokens/s; a step moved 1.00GB (weights 1.00GB, KV cache 551.0kB) in 25 ms: 40 GB/s, 40% of the "
        "100 GB/s measured on this device"
    )
    assert speed.lines[1].startswith("prefill: 1 step with 500 tokens took 100 ms: 5")
    assert "of the 10 TFLOP/s measured on this device for products of bfloat16" in speed.lines[1]


def test_weights_that_are_not_packed_are_named_with_what_four_bits_give_and_packed_ones_are_not() -> None:
    assert "the weights are bfloat16, 1.00GB a step; what helps: a 4-bit model moves about a quarter" in reasons(told())
    packed = replace(FACTS, work=replace(FACTS.work, packed=True))
    assert "4-bit" not in reasons(told(facts=packed))


def test_a_gpus_step_for_few_requests_is_told_and_that_of_many_or_near_the_floor_is_not() -> None:
    alone = "a step reads all weights and starts all kernels for one request as it would for more"
    assert alone in reasons(told())
    many = LAST._replace(rows=99 * 16)
    assert "starts all kernels" not in reasons(told(metrics(steps_last=many)))
    fast = metrics(steps_last=LAST._replace(decode_seconds=99 * 0.0112), last_token_time=1.3)
    assert "starts all kernels" not in reasons(told(fast))


def test_rates_beyond_a_thousand_tera_have_their_own_letter() -> None:
    assert (flops_text(1.5e15), flops_text(690e12), rate_text(31.2e9)) == ("1.5 PFLOP/s", "690 TFLOP/s", "31.2 GB/s")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chain_of_products_is_measured_without_what_its_ends_cost(dtype: str) -> None:
    assert 1e6 < gpu_flops(64, dtype) < 1e15


def test_near_the_floor_only_fewer_bytes_would_help() -> None:
    facts = replace(FACTS, attention_paths=(AttentionPath("full", (0, 1), "reference", "wrong here"),))
    fast = metrics(steps_last=LAST._replace(decode_seconds=99 * 0.0112), last_token_time=1.3)
    assert "a 4-bit model" in reasons(told(fast, facts))
    assert "wrong here" not in reasons(told(fast, facts))
    assert "wrong here" in reasons(told(facts=facts))


def test_waiting_preemptions_and_thoughts_are_told_by_size() -> None:
    waited = metrics(arrival_time=-20.0, num_preemptions=2)
    speed = told(waited, seen=RequestFacts(thought_share=0.5))
    lines = [str(reason) for reason in speed.reasons]
    assert lines[0].startswith("it waited 20.00 s behind other requests (max_num_seqs ")
    assert any(line.startswith("about 50% of the output was thought") for line in lines)
    assert any(line.startswith("it lost its KV blocks to other requests 2 times") for line in lines)


def test_steps_that_computed_others_prompts_too_and_time_between_steps_are_told() -> None:
    mixed = LAST._replace(prompts=11, prompt_seconds=5.1, mixed=10, mixed_seconds=5.0)
    speed = told(metrics(steps_last=mixed, last_token_time=12.6))
    assert "10 of 109 steps also computed prompts of other requests, 38% of the time" in reasons(speed)
    assert "40% of the time lay between steps" in reasons(speed)


def test_a_prompt_that_was_known_and_computed_again_says_why() -> None:
    slow = metrics(first_token_time=5.0, last_token_time=7.5)
    off = RequestFacts(num_known=400, nearest=1, caches_nothing="prefix caching is off (--no-enable-prefix-caching)")
    assert "400 prompt tokens of request 1 were computed again" in reasons(told(slow, seen=off))
    assert "leave out --no-enable-prefix-caching" in reasons(told(slow, seen=off))
    evicted = RequestFacts(num_known=400, nearest=1)
    assert "400 prompt tokens were known from request 1 and not in the cache any more" in reasons(
        told(slow, seen=evicted)
    )
    parted = RequestFacts(num_known=17, nearest=1)
    assert "the prompt differs from all before after 17 tokens" in reasons(told(slow, seen=parted))
    assert "prompt tokens were new" not in reasons(told(slow)), "a first request misses nothing"


def test_what_was_asked_of_sampling_is_a_reason_where_a_kernel_does_the_rest() -> None:
    asked = SamplingParams(repetition_penalty=1.1, logit_bias={1: 2.0}, logprobs=2)
    on_gpu = [str(one) for one in sampling_reasons(asked, None, kernels=True)]
    assert on_gpu[-1] == (
        "repetition_penalty, logit_bias need operations of MLX's beside the sampling kernel; what helps: drop "
        "repetition_penalty and logit_bias, or take presence_penalty"
    )
    on_cpu = [str(one) for one in sampling_reasons(asked, Constraints(StructuredOutput(regex="a+")), kernels=False)]
    assert [line.split()[0] for line in on_cpu] == ["each", "log-probabilities"]
    assert not list(sampling_reasons(SamplingParams(), None, kernels=True))


def test_paths_that_were_not_taken_are_told_but_not_that_a_cpu_has_no_gpu() -> None:
    paths = (AttentionPath("full", (0, 1), "reference", "head size 200 has no kernel"),)
    assert "attention of 2 layers full by MLX's own operations (head size 200 has no kernel)" in reasons(
        told(facts=replace(FACTS, attention_paths=paths))
    )
    asked = replace(FACTS, attention_paths=paths, attention_backend="reference")
    assert "what helps: --attention-backend auto" in reasons(told(facts=asked))
    cpu = (AttentionPath("full", (0, 1), "reference", NO_KERNELS_ON_CPU),)
    assert "attention" not in reasons(told(facts=replace(FACTS, attention_paths=cpu, on_cpu=True)))
    contiguous = replace(FACTS, attention_paths=(AttentionPath("full", (0, 1), "contiguous"),))
    assert "leave out VLLM_METAL_USE_PAGED_ATTENTION=0" in reasons(told(facts=contiguous))


def test_a_processor_is_told_its_blas_its_load_and_what_one_row_reads() -> None:
    cpu = replace(
        FACTS, on_cpu=True, blas_note="CPU without OpenBLAS: prompts are slower", load=3.0, attention_paths=()
    )
    device = replace(GPU, row_bytes_per_second=10e9)
    speed = running_speed(LAST, cpu, device)
    text = reasons(speed)
    assert "pip install scipy-openblas32" in text
    assert "3.0 threads want each processor of this machine now" in text
    assert "a product of one row reads 10 GB/s on this processor, 10% of what its memory gives" in text
    assert "no less time on a CPU" in text


def test_a_long_context_is_told_with_smaller_pages() -> None:
    long = LAST._replace(context=(99 * 1_000_000,))
    assert "the KV cache is 50% of what a step reads; what helps: load with --kv-cache-dtype int8" in reasons(
        told(metrics(steps_last=long))
    )


def test_reasons_of_unknown_size_come_last_and_thoughts_are_counted_in_characters() -> None:
    one, two, three = Reason("a"), Reason("b", seconds=1.0), Reason("c", seconds=2.0)
    assert costliest_first([one, two, three]) == [three, two, one]
    assert thought_share([("abc", "d"), (None, "efgh")]) == 3 / 8
    assert thought_share([(None, "")]) == 0


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_models_work_is_that_of_its_config(tiny_model_dir: TinyModelDir, name: str) -> None:
    with LLM(str(tiny_model_dir(name)), max_model_len=256) as llm:
        facts = llm.gauge.facts(llm.plan)
    assert facts is not None
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # queries, keys and values, output, MLP
    assert facts.work.dense_products == 4 * layer
    assert facts.work.head_products == VOCAB_SIZE * 64, "the embedding, which is the head"
    looked_up = VOCAB_SIZE * 64 * 4 if name == "gemma3_text" else 0  # beside a head with weights of its own
    assert facts.work.dense_bytes == llm.plan.model_memory - looked_up
    assert facts.work.pair_products == 2 * 4 * 16


def test_of_a_mixture_the_experts_are_told_apart(tiny_model_dir: TinyModelDir) -> None:
    folder = tiny_model_dir(
        "qwen3_moe",
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=32,
        norm_topk_prob=True,
    )
    with LLM(str(folder), max_model_len=256) as llm:
        facts = llm.gauge.facts(llm.plan)
        llm.gauge.measure()
        llm.generate("One two three", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        speed = llm.explain().speed
    assert facts is not None
    work = facts.work
    assert (work.chosen, work.num_experts) == (2, 8)
    assert work.expert_products == 4 * 8 * 3 * 64 * 32
    assert work.expert_bytes == 4 * work.expert_products, "float32"
    assert work.dense_bytes + work.expert_bytes == llm.plan.model_memory
    assert any("2 of 8 a token would take if they were chosen evenly" in line for line in speed.estimates)


def test_a_request_of_a_tiny_model_is_measured_by_its_own_steps(tiny_model_dir: TinyModelDir) -> None:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512) as llm:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        prompt = llm.tokenize("One two three four five six seven eight nine ten.")
        llm.generate(prompt, params, use_tqdm=False)
        explained = llm.explain()
        reached = explained.speed.decode
        device = llm.gauge.device
        assert reached is not None
        assert device is not None
        assert (reached.steps, reached.rows) == (8, 1.0)
        context = sum(range(len(prompt) + 1, len(prompt) + 9))
        per_token = llm.plan.groups[0].bytes_per_token
        assert reached.cache_bytes == (context + 8) * per_token / 8
        floor = (llm.plan.model_memory + reached.cache_bytes) / device.bytes_per_second
        assert reached.floor_seconds == pytest.approx(floor)
        assert explained.speed.prompt is not None
        assert explained.speed.prompt.steps == 1
        together = llm.gauge.running(llm.activity().steps, llm.plan)
        assert together.decode is not None
        assert together.decode.steps == 8
    after = llm.gauge.running(StepTotals(), llm.plan)
    assert after.lines == ()


def test_while_requests_run_the_device_is_left_alone(scripted_llm: Any) -> None:
    llm: LLM = scripted_llm("one two three four five", step_seconds=0.05)
    stream = llm.submit_prompt("Count!", SamplingParams(max_tokens=500, ignore_eos=True))
    try:
        next(iter(stream))
        assert llm.gauge.measure() is None
        assert llm.explain().speed.missing == BUSY
    finally:
        stream.abort()
    stream.result()
