"""``LLM`` as people use it, on a tiny model: outputs, sampling, streams, ends, failures."""

import asyncio
import gc
import threading
import time

import numpy as np
import pytest

from engine.errors import ConfigError, ContextLengthError, EngineClosedError, GenerationError, RequestError
from engine.llm import LLM, memory_in_use
from engine.params.sampling_params import SamplingParams
from tests.engine.parity.oracle import assert_nothing_is_held, mixed_prompts, oracle_logprobs, oracle_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, max_model_len=512, served_model_name="tiny") as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "llm" in request.fixturenames:
        assert_nothing_is_held(request.getfixturevalue("llm"))


def test_text_is_the_text_of_the_tokens(llm):
    output = llm.generate("Once upon a time", GREEDY)[0]
    completion = output.outputs[0]
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert output.prompt_token_ids == llm.tokenize("Once upon a time")
    assert (completion.finish_reason, output.finished) == ("length", True)


def test_prompts_and_values_come_in_every_form_that_vllm_takes(llm):
    tokens = llm.tokenize("Once upon a time")
    forms = ["Once upon a time", tokens, {"prompt": "Once upon a time"}, {"prompt_token_ids": tokens}]
    outputs = llm.generate(forms, sampling_params=[GREEDY] * 4, use_tqdm=False)
    outputs += [llm.generate(form, sampling_params=GREEDY)[0] for form in (*forms, np.array(tokens))]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    message = [{"role": "user", "content": "hi"}]
    assert llm.chat(message, sampling_params=GREEDY)[0].outputs[0].finish_reason == "length"
    assert "".join(delta.text for delta in llm.stream("Once upon a time", sampling_params=GREEDY))
    with pytest.raises(RequestError, match="lengths of prompts and params"):
        llm.generate(["a", "b"], [GREEDY])
    for wrong in ([None], [{"text": "a"}], [1.5]):
        with pytest.raises(RequestError, match="a prompt is a string"):
            llm.generate(wrong, GREEDY)


def test_deltas_add_up_to_the_result(llm):
    deltas = list(llm.stream("Once upon a time", GREEDY))
    assert "".join(delta.text for delta in deltas) == llm.generate("Once upon a time", GREEDY)[0].outputs[0].text
    assert [delta.finish_reason for delta in deltas] == [None] * 9 + ["length"]


def test_async_streams_give_the_same(llm):
    async def collect():
        return [delta async for delta in llm.astream("Once upon a time", GREEDY)]

    assert asyncio.run(collect()) == list(llm.stream("Once upon a time", GREEDY))


def test_leaving_a_stream_early_frees_its_blocks(llm):
    for _ in llm.stream("Once upon a time", GREEDY.replace(max_tokens=400)):
        break
    deadline = time.monotonic() + 60
    while llm.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert llm.stats().num_used_blocks == 0
    assert llm.request_log.latest().outcome.completions[0].finish_reason == "abort"


def test_an_abort_gives_what_was_there_and_says_so(llm):
    stream = llm.submit_prompt("Once upon a time", GREEDY.replace(max_tokens=400))
    first = next(stream)
    stream.abort()
    stream.abort()
    output = stream.result().outputs[0]
    assert output.finish_reason == "abort"
    assert output.token_ids[: len(first.token_ids)] == first.token_ids
    assert len(output.token_ids) < 400


def test_a_chat_is_rendered_with_the_models_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, GREEDY)[0]
    assert llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) == llm.render_chat(messages)
    assert llm.render_chat(messages).endswith("<|im_start|>assistant\n")


def test_many_chats_come_back_in_order(llm):
    chats = [[{"role": "user", "content": f"Number {i}"}] for i in range(5)]
    together = [output.outputs[0].text for output in llm.chat(chats, GREEDY)]
    assert together == [llm.chat(chat, GREEDY)[0].outputs[0].text for chat in chats]


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.05, "presence_penalty": 1.0}, {"repetition_penalty": 1.3}]
)
def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(llm, more):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True, **more)
    prompts = mixed_prompts(9, 49152, 60, seed=3)
    alone = llm.generate([prompts[4]], params)[0].outputs[0].token_ids
    others = [params.replace(seed=i, temperature=0.5 + i / 10) for i in range(9)]
    others[4] = params
    together = llm.generate(prompts, others, use_tqdm=False)[4].outputs[0].token_ids
    assert together == alone
    assert llm.generate([prompts[4]], params.replace(seed=8))[0].outputs[0].token_ids != alone


def test_completions_of_one_seeded_request_differ_and_repeat(llm):
    params = SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=8, ignore_eos=True)
    first, second = (llm.generate("Once", params)[0] for _ in range(2))
    texts = [output.token_ids for output in first.outputs]
    assert texts == [output.token_ids for output in second.outputs]
    assert len({tuple(text) for text in texts}) == 3


def test_penalties_count_the_token_in_flight(llm):
    """A strong penalty forbids every repetition, also that of the token the host has not read yet."""
    params = GREEDY.replace(max_tokens=60, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1e6)
    tokens = llm.generate("Once upon a time", params)[0].outputs[0].token_ids
    assert len(set(tokens)) == len(tokens)


def test_logprobs_are_mlx_lms(llm, model):
    prompt = llm.tokenize("Once upon a time there was")
    output = llm.generate([prompt], GREEDY.replace(logprobs=3))[0].outputs[0]
    expected = oracle_logprobs(model, [*prompt, *output.token_ids])
    for place, (token, found) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        row = expected[len(prompt) - 1 + place]
        assert next(iter(found)) == token
        assert list(found) == np.argsort(-row)[:3].tolist()
        for token_id, logprob in found.items():
            assert logprob.logprob == pytest.approx(row[token_id], abs=2e-4)
    taken = sum(position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True))
    assert output.cumulative_logprob == pytest.approx(taken)


@pytest.mark.parametrize("chunk", [16, 512])
def test_prompt_logprobs_are_mlx_lms_also_when_the_prompt_comes_in_chunks(llm, model, chunk):
    prompt = mixed_prompts(1, 49152, 50, seed=2)[0] * 2
    before = llm._thread.call(lambda engine: engine.scheduler.max_num_batched_tokens)
    llm._thread.call(lambda engine: setattr(engine.scheduler, "max_num_batched_tokens", chunk))
    output = llm.generate([prompt], GREEDY.replace(prompt_logprobs=2, max_tokens=1))[0]
    llm._thread.call(lambda engine: setattr(engine.scheduler, "max_num_batched_tokens", before))
    expected = oracle_logprobs(model, prompt)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for place in range(1, len(prompt)):
        found = output.prompt_logprobs[place][prompt[place]]
        assert found.logprob == pytest.approx(expected[place - 1][prompt[place]], abs=2e-4)


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = llm.generate("Once upon a time", GREEDY.replace(max_tokens=20))[0].outputs[0].text
    stop = whole[10:14]
    output = llm.generate("Once upon a time", GREEDY.replace(max_tokens=20, stop=[stop]))[0].outputs[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    shown = "".join(d.text for d in llm.stream("Once upon a time", GREEDY.replace(max_tokens=20, stop=[stop])))
    assert shown == output.text


def test_bad_words_and_allowed_tokens_are_kept(llm):
    free = llm.generate("Once upon a time", GREEDY)[0].outputs[0]
    word = llm.tokenizer.decode(free.token_ids[3:4])
    kept = llm.generate("Once upon a time", GREEDY.replace(bad_words=[word.strip() or word]))[0].outputs[0]
    assert free.token_ids[3] not in kept.token_ids
    allowed = llm.generate("Once upon a time", GREEDY.replace(allowed_token_ids=[40, 41]))[0].outputs[0]
    assert set(allowed.token_ids) <= {40, 41}


@pytest.mark.parametrize(
    ("prompt", "params", "error", "text"),
    [
        ([], GREEDY, RequestError, "empty"),
        ([10**6], GREEDY, RequestError, "out of vocabulary"),
        ([1, -5], GREEDY, RequestError, "Token id -5 is out of vocabulary"),
        ([5] * 512, GREEDY, ContextLengthError, "This model's maximum context length is 512 tokens"),
        ([5] * 10, GREEDY.replace(max_tokens=503), ContextLengthError, "you requested 503 output tokens"),
        ([5], GREEDY.replace(logit_bias={10**6: 1.0}), RequestError, "out-of-vocab"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(llm, prompt, params, error, text):
    with pytest.raises(error, match=text):
        llm.submit_prompt(prompt, params)


@pytest.mark.parametrize("wrong", [None, 5, [None]])
def test_what_is_no_prompt_and_no_conversation_is_refused_in_one_line(llm, wrong):
    with pytest.raises(RequestError, match="a prompt is a string, a list of token ids"):
        llm.generate(wrong)
    if not isinstance(wrong, list):
        with pytest.raises(RequestError, match="messages must be a list"):
            llm.chat(wrong)


def test_more_completions_than_one_request_may_have_are_refused():
    with pytest.raises(RequestError, match="n must be at most 1024"):
        SamplingParams(n=1025)
    assert SamplingParams(n=1024).n == 1024


def test_a_bad_word_without_letters_is_refused():
    for word in ("", " "):
        with pytest.raises(RequestError, match="bad_words cannot contain an empty string"):
            SamplingParams(bad_words=["fine", word])


def test_without_a_limit_a_reply_goes_to_the_end_of_the_context(llm):
    output = llm.generate([[5] * 500], llm.sampling_params(temperature=0).replace(ignore_eos=True))[0].outputs[0]
    assert len(output.token_ids) == 12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size is not supported"),
        ({"gpu_memory_utilization": 1.5}, r"--gpu-memory-utilization 1.5: must be \(0, 1\]"),
        ({"max_model_len": "long"}, "--max-model-len"),
    ],
)
def test_bad_options_are_refused_by_name(model, options, text):
    with pytest.raises(ConfigError, match=text):
        LLM(model, **options)


def test_a_failing_model_tells_everyone_and_the_engine_goes_on(llm, model, monkeypatch):
    engine = llm._thread.call(lambda engine: engine)
    streams = [llm.submit_prompt(prompt, GREEDY.replace(max_tokens=300)) for prompt in ("One", "Two")]
    next(streams[0])

    def broken(*_, **__):
        raise RuntimeError("no such luck")

    llm._thread.call(lambda engine: monkeypatch.setattr(engine.runner.backend, "forward", broken))
    for stream in streams:
        with pytest.raises(GenerationError, match="the model failed: RuntimeError: no such luck"):
            stream.result()
    llm._thread.call(lambda _: monkeypatch.undo())
    prompt = llm.tokenize("Once upon a time")
    assert llm.generate([prompt], GREEDY)[0].outputs[0].token_ids == oracle_tokens(model, prompt, 10)
    del engine


def test_logits_that_are_not_numbers_fail_their_request_only(llm, monkeypatch):
    import mlx.core as mx

    backend = llm._thread.call(lambda engine: engine.runner.backend)
    forward = backend.forward

    def poisoned(batch, tokens, wanted):
        logits = forward(batch, tokens, wanted)
        scheduled = zip(batch.scheduled_requests, wanted, strict=True)
        bad = [one.request.prompt_token_ids[0] == 7 for one, rows in scheduled if len(rows)]
        return mx.where(mx.array(bad)[:, None], mx.array(float("nan")), logits)

    llm._thread.call(lambda _: monkeypatch.setattr(backend, "forward", poisoned))
    good, bad = llm.submit_prompt([5, 6], GREEDY), llm.submit_prompt([7, 6], GREEDY)
    assert good.result().outputs[0].finish_reason == "length"
    with pytest.raises(GenerationError, match="no finite logits"):
        bad.result()
    llm._thread.call(lambda _: monkeypatch.undo())


def test_an_interrupt_while_waiting_aborts_the_requests(llm, monkeypatch):
    from engine.runtime.stream import RequestStream

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(RequestStream, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["One", "Two"], GREEDY.replace(max_tokens=400), use_tqdm=False)
    deadline = time.monotonic() + 60
    while llm.stats().num_running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_closing_ends_requests_threads_and_memory(model):
    gc.collect()
    before, threads = memory_in_use(), set(threading.enumerate())
    llm = LLM(model, max_model_len=512)
    stream = llm.submit_prompt("Once upon a time", GREEDY.replace(max_tokens=400))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match="closed"):
        stream.result()
    with pytest.raises(EngineClosedError):
        llm.submit_prompt("again", GREEDY)
    with pytest.raises(EngineClosedError):
        llm.serve()
    assert llm.closed
    assert llm.server is None
    assert set(threading.enumerate()) <= threads
    assert memory_in_use() <= before


def test_dropping_the_object_gives_everything_back(model):
    gc.collect()
    before = memory_in_use()
    llm = LLM(model, max_model_len=512)
    assert memory_in_use() > before
    del llm
    gc.collect()
    assert memory_in_use() <= before


def test_a_cancelled_load_leaves_nothing(model):
    gc.collect()
    before, threads = memory_in_use(), set(threading.enumerate())

    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LLM(model, progress=stop)
    assert memory_in_use() <= before
    assert set(threading.enumerate()) <= threads


def test_a_step_that_nobody_needs_any_more_leaves_no_trace_in_the_pages(model):
    with LLM(model, max_model_len=512) as llm:
        if llm._thread.call(lambda engine: engine._submit_first):
            pytest.skip("on this device the next step is always computed")
        prompt = [5, 6, 7, 8, 9]
        third = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids[2]
        llm._thread.call(lambda engine: engine.fail_all(GenerationError("empty pages, please")))
        output = llm.generate(prompt, GREEDY.replace(stop_token_ids=[third]))[0].outputs[0]
        assert len(output.token_ids) == 3
        pages = llm._thread.call(lambda engine: np.array(engine.runner.backend.pools[0].keys[-1].arrays[0]))
        written = np.flatnonzero(np.abs(pages).sum(axis=(0, 1, 3)))
        assert len(written) == len(prompt) + 2  # the token that stopped it was never fed to the model


def test_settings_reach_requests_that_say_nothing_else(llm):
    llm.settings.update(temperature=0.25, top_k=5)
    try:
        assert llm.sampling_params().temperature == 0.25
        assert llm.sampling_params(temperature=0.5).temperature == 0.5
        assert llm.sampling_params(temperature=0.5).sources["top_k"] not in ("default", "request")
    finally:
        llm.settings.reset()
    assert llm.sampling_params().temperature == 1.0


@pytest.mark.parametrize("prompt", [b"abc", bytearray(b"abc"), [True], [5, False], {}, {"text": "Hi"}, None])
def test_what_is_no_prompt_is_refused_in_a_line(llm, prompt):
    with pytest.raises(RequestError, match=r"^a prompt is a string, a list of token ids"):
        llm.generate([prompt])


def test_what_cannot_be_scored_or_explained_is_refused_in_a_line(llm):
    for text in (None, 5, ["a"], b"a"):
        with pytest.raises(RequestError, match=r"^score takes a text, not "):
            llm.score(text)
    with pytest.raises(RequestError, match=r"^num_alternatives must be a whole number, got None"):
        llm.score("a b c", num_alternatives=None)
    for count in (1.5, None, "1", True):
        with pytest.raises(RequestError, match=r"^count must be a whole number, got "):
            llm.explain(count)
