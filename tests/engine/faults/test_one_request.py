"""What breaks for one request breaks for it alone: numbers that are none, its text, its grammar, a library's panic."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from engine.errors import GenerationError
from engine.llm import LLM
from engine.params.structured_outputs import StructuredOutput
from engine.runtime.failures import NOT_FINITE
from engine.runtime.llm_engine import LLMEngine
from tests.engine.faults.points import PanicException
from tests.engine.faults.scenes import GREEDY, Outcome, assert_goes_on, outcome_of
from tests.engine.parity.oracle import assert_nothing_is_held
from tests.nightly import size

BAD_TOKEN = 4242
OTHERS = {"short": [20, 21, 22], "long": [11] * 20, "longer": [3] * 40}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "gemma3_text": {"num_hidden_layers": 2},
    "qwen3_5": {"num_hidden_layers": 4},
}
LONG = GREEDY.replace(max_tokens=12)


@pytest.fixture(scope="module", params=MODELS)
def llm(request: pytest.FixtureRequest, tiny_model_dir: Any) -> Iterator[LLM]:
    """A model that has no numbers for one token of its prompts (and draws all others)."""
    folder = tiny_model_dir(request.param, tie_word_embeddings=False, **MODELS[request.param])
    options = {"max_model_len": 256, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.5}
    with LLM(str(folder), **options) as llm:
        yield llm


def embeddings(engine: LLMEngine) -> Any:
    """The module that turns tokens into vectors."""
    named = engine.runner.backend.model.named_modules()
    return next(module for name, module in named if name.endswith("embed_tokens"))


def set_bad_row(llm: LLM, value: float) -> None:
    def change(engine: LLMEngine) -> None:
        weight = embeddings(engine).weight
        weight[BAD_TOKEN] = value
        mx.eval(weight)

    llm._thread.call(change)


def run(llm: LLM, prompts: dict[str, list[int]]) -> Outcome:
    return outcome_of({name: llm.submit_prompt(prompt, LONG) for name, prompt in prompts.items()})


@pytest.mark.parametrize(("value", "ahead"), [(float("nan"), False), (float("inf"), True)][: size(1, 2)])
def test_a_request_without_finite_logits_ends_alone_and_leaves_nothing_that_others_read(
    llm: LLM, value: float, *, ahead: bool
) -> None:
    llm._thread.call(lambda engine: setattr(engine, "_submit_first", ahead))
    set_bad_row(llm, 0.25)
    alone = {name: run(llm, {name: prompt}).tokens[name] for name, prompt in OTHERS.items()}
    was = run(llm, {"bad": [5] * 30 + [BAD_TOKEN] + [6] * 30})
    llm.reset_prefix_cache()
    for number in range(2):
        set_bad_row(llm, value)
        bad = [5 + number, BAD_TOKEN] if number else [5] * 30 + [BAD_TOKEN] + [6] * 30
        found = run(llm, {"bad": bad, **OTHERS})
        assert found.lines == {"bad": NOT_FINITE}
        assert found.tokens == alone
        more = {str(first): [first] * (2 + first % 5) for first in range(30, 42)}
        assert not run(llm, more).lines, "they were given its pages"
        assert_nothing_is_held(llm)
    set_bad_row(llm, 0.25)  # as where a value was lost on its way
    assert run(llm, {"bad": [5] * 30 + [BAD_TOKEN] + [6] * 30}) == was, "its pages were found again"


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Any) -> Iterator[tuple[LLM, str]]:
    folder: Path = tiny_model_dir("llama", **MODELS["llama"])
    with LLM(str(folder), max_model_len=256, gpu_memory_utilization=0.5) as llm:
        yield llm, str(folder)


KINDS = [
    RuntimeError("no such luck"),
    MemoryError(),
    PanicException("index out of bounds"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
]


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["next_text", "step"])
def test_a_text_that_cannot_be_read_ends_its_request_alone(
    plain: tuple[LLM, str], monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    from engine.text.tokens.detokenizer import Detokenizer

    llm, folder = plain
    wanted = run(llm, OTHERS)
    real = getattr(Detokenizer, where)
    broken: list[object] = []

    def fail(self: Detokenizer, *args: Any, **kwargs: Any) -> Any:
        if not broken and len(OTHERS["long"]) == len(self._prompt):
            broken.append(self)
        if self in broken:
            raise error
        return real(self, *args, **kwargs)

    made = Detokenizer.__init__

    def remember(self: Any, tokenizer: Any, prompt: Any, params: Any) -> None:
        made(self, tokenizer, prompt, params)
        self._prompt = prompt

    monkeypatch.setattr(Detokenizer, "__init__", remember)
    monkeypatch.setattr(Detokenizer, where, fail)
    found = run(llm, OTHERS)
    monkeypatch.undo()
    assert list(found.lines) == ["long"]
    assert type(error).__name__ in found.lines["long"] or "out of memory" in found.lines["long"]
    assert found.tokens == {name: tokens for name, tokens in wanted.tokens.items() if name != "long"}
    assert_goes_on(llm, folder)


def test_a_grammar_that_panics_ends_its_request_alone(plain: tuple[LLM, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.text.guide.completion_guide import CompletionGuide

    llm, folder = plain
    wanted = run(llm, OTHERS)

    def fail(*_: object) -> None:
        raise PanicException("no such state")

    monkeypatch.setattr(CompletionGuide, "advance", fail)
    streams = {name: llm.submit_prompt(prompt, LONG) for name, prompt in OTHERS.items()}
    streams["guided"] = llm.submit_prompt([5], LONG, structured_outputs=StructuredOutput(choice=["red wine", "blue"]))
    found = outcome_of(streams)
    monkeypatch.undo()
    assert found.tokens == wanted.tokens
    assert "PanicException: no such state; the engine goes on" in found.lines["guided"]
    assert_goes_on(llm, folder)


def test_commands_of_nobody_in_particular_never_end_the_engine(
    plain: tuple[LLM, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm, folder = plain

    def fail(*_: object) -> None:
        raise PanicException("odd")

    llm._thread.call(lambda engine: monkeypatch.setattr(engine, "follow", fail))
    llm._thread.call(lambda engine: monkeypatch.setattr(engine, "finish_all_thinking", fail))
    llm.settings.update(temperature=0.5)
    llm.finish_thinking()
    with pytest.raises(PanicException):
        llm._thread.call(fail)
    llm._thread.call(lambda _: monkeypatch.undo())
    llm.settings.reset()
    assert caplog.messages.count("a change between two steps failed: PanicException: odd") == 2
    assert_goes_on(llm, folder)


def test_a_tokenizer_that_cannot_encode_leaves_the_engine_as_it_was(
    plain: tuple[LLM, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, folder = plain
    for error in KINDS:

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(llm.tokenizer, "encode", fail)
        with pytest.raises(BaseException) as told:  # noqa: PT011
            llm.generate(["Hello"], GREEDY, use_tqdm=False)
        monkeypatch.undo()
        assert told.value is error or isinstance(told.value, GenerationError | ValueError)
        assert_goes_on(llm, folder)
