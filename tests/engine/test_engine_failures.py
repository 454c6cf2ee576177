"""What one failing part of the engine's loop costs: its own request, and nothing that others could find."""

import numpy as np
import pytest
from tokenizers import Regex, decoders

from engine.errors import GenerationError, RequestError
from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from tests.engine.parity.oracle import assert_nothing_is_held, oracle_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
LONG = GREEDY.replace(max_tokens=150)


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, max_model_len=512, served_model_name="tiny") as llm:
        yield llm


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no such luck")


@pytest.mark.parametrize(
    ("method", "ask", "words"),
    [("abort_request", "abort", "could not be aborted"), ("finish_thinking", "finish_thinking", "told to answer")],
)
def test_a_command_that_fails_ends_its_own_request_only(llm, monkeypatch, method, ask, words):
    asked, other = llm.submit_prompt([5, 6, 7], LONG), llm.submit_prompt([8, 9], LONG)
    next(asked)
    llm._thread.call(lambda engine: monkeypatch.setattr(engine, method, fail))
    getattr(asked, ask)()
    with pytest.raises(GenerationError, match=f"{words}: RuntimeError: no such luck"):
        asked.result()
    llm._thread.call(lambda _: monkeypatch.undo())
    assert len(other.result().outputs[0].token_ids) == 150
    assert_nothing_is_held(llm)


def test_a_request_that_cannot_be_queued_fails_alone(llm, monkeypatch):
    llm._thread.call(lambda engine: monkeypatch.setattr(engine, "_make_detokenizer", fail))
    with pytest.raises(GenerationError, match="could not be queued: RuntimeError: no such luck"):
        llm.submit_prompt([5, 6, 7], GREEDY).result()
    llm._thread.call(lambda _: monkeypatch.undo())
    assert len(llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids) == 10
    assert_nothing_is_held(llm)


def test_a_request_whose_tokens_the_library_panics_on_fails_alone(llm):
    hf = llm.tokenizer.hf
    usual, panics = hf.decoder, decoders.Sequence([decoders.Replace(Regex(r"[\s\S]+"), "t"), decoders.Strip("t", 1, 1)])
    other = llm.submit_prompt([8, 9], LONG.replace(detokenize=False))
    asked = llm.submit_prompt([5, 6, 7], LONG)
    next(asked)
    try:
        hf.decoder = panics
        with pytest.raises(GenerationError, match=r"cannot decode what the model wrote .PanicException"):
            asked.result()
        with pytest.raises(GenerationError, match="cannot decode"):  # its prompt
            llm.submit_prompt([5, 6, 7], GREEDY).result()
    finally:
        hf.decoder = usual
    assert len(other.result().outputs[0].token_ids) == 150
    assert len(llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids) == 10
    assert_nothing_is_held(llm)


def test_blocks_of_a_prompt_whose_request_ended_meanwhile_are_never_found_unwritten(llm, model, monkeypatch):
    """The prefix cache knows a prompt's blocks when their step is built; the request may end before it is submitted."""
    first, second = llm.tokenize("Once upon a time"), [11 + i % 90 for i in range(70)]
    engine = llm._thread.call(lambda engine: engine)
    hand_out = engine._hand_out
    streams = []

    def hand_out_and_end(result):
        hand_out(result)
        if streams and any(request.request_id == "second" for request in engine.scheduler.running):
            for name in ("first", "second"):
                engine.abort_request(name)

    llm._thread.call(lambda _: monkeypatch.setattr(engine, "_hand_out", hand_out_and_end))
    running = llm.submit_prompt(first, LONG, request_id="first")
    next(running)
    streams.append(llm.submit_prompt(second, GREEDY, request_id="second"))
    assert streams[0].result().outputs[0].finish_reason == "abort"
    running.result()
    llm._thread.call(lambda _: monkeypatch.undo())
    again = llm.generate([second], GREEDY)[0]
    assert again.outputs[0].token_ids == oracle_tokens(model, second, 10)
    assert_nothing_is_held(llm)


def test_an_id_names_one_request_under_way_and_is_free_again_behind_it(llm):
    first = llm.submit_prompt([5, 6], LONG, request_id="x")
    for _ in range(3):
        with pytest.raises(RequestError, match="request_id 'x' is that of a request under way"):
            llm.submit_prompt([8, 9], LONG, request_id="x")
    assert len(first.result().outputs[0].token_ids) == 150, "the other one is left alone"
    first = llm.submit_prompt([5, 6], LONG, request_id="x")
    first.abort()
    assert first.result().outputs[0].finish_reason == "abort"
    for odd in ([1], 5, b"x"):
        with pytest.raises(RequestError, match=r"^request_id must be a text, got "):
            llm.submit_prompt([8, 9], LONG, request_id=odd)
    again = llm.submit_prompt([8, 9], GREEDY, request_id="x")
    assert len(again.result().outputs[0].token_ids) == 10
    assert not llm._thread._under_way
    assert_nothing_is_held(llm)


def test_numpys_numbers_are_sampling_values_and_disturb_nobody(llm, model):
    other = llm.submit_prompt([5, 6], LONG)
    params = SamplingParams(seed=np.int64(3), top_k=np.uint8(5), temperature=np.float32(0.5), max_tokens=np.int32(4))
    mine = llm.submit_prompt([8, 9], params.replace(logit_bias={np.int64(5): np.float16(-2)}, ignore_eos=True))
    assert len(mine.result().outputs[0].token_ids) == 4
    assert other.result().outputs[0].token_ids == oracle_tokens(model, [5, 6], 150)
