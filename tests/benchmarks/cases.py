"""What ``make bench`` measures: our engine and mlx-lm on the same weights, element type and BLAS, in turn."""

import itertools
import time
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import batch_generate
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from engine.llm import LLM
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.params.sampling_params import SamplingParams
from engine.runner.load.loader import load_model
from tests.benchmarks.harness import Case, Measure
from tests.benchmarks.host_cases import host_cases
from tests.benchmarks.hybrid_cases import hybrid_cases
from tests.benchmarks.kv_dtype_cases import kv_dtype_cases
from tests.benchmarks.notebook_cases import notebook_cases
from tests.benchmarks.port_speed import port_cases

MODEL = "smollm2"
NUM_TOKENS = 32
MIXED_LENGTHS = (32, 64, 96, 160, 224, 320, 416, 512)
HISTORY = 1000
_SALTS = itertools.count()


class _Setup:
    """Both engines with their own copy of the weights, loaded when first used."""

    def __init__(self) -> None:
        loaded = load_model(resolve(MODEL), EngineArgs(model=MODEL))
        self.model, self.notes = loaded.model, loaded.notes
        self.llm = LLM(MODEL)
        self.tokenizer = _their_tokenizer(self.llm)

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        """``length`` random tokens."""
        rng = np.random.default_rng(seed)
        return rng.integers(100, 40000, length).tolist()


def _their_tokenizer(llm: LLM) -> TokenizerWrapper:
    """mlx-lm's wrapper around the same tokenizer, with its quick detokenizer and no end token."""
    inner = PreTrainedTokenizerFast(tokenizer_object=llm.tokenizer.hf)
    wrapper = TokenizerWrapper(inner, BPEStreamingDetokenizer, eos_token_ids=[])
    wrapper.eos_token_ids = set()
    return wrapper


def all_cases() -> Iterator[Case]:
    """The cases; weights are loaded when the first that needs them is asked for."""
    yield from host_cases()
    yield from port_cases()
    setup = _Setup()
    common = {"model": MODEL, "choice": setup.notes, "num_tokens": NUM_TOKENS}
    for context in (64, 1024):
        yield Case(
            f"decode, one stream, context {context}",
            "tokens/s",
            "higher",
            {"vm-magic": _our_decode(setup, context), "mlx-lm stream_generate": _their_decode(setup, context)},
            common | {"context": context},
            target=1.0,
        )
    yield Case(
        "first token, prompt of 512 tokens, cold",
        "s",
        "lower",
        {"vm-magic": _our_first_token(setup, 512), "mlx-lm stream_generate": _their_first_token(setup, 512)},
        common,
    )
    yield Case(
        "eight requests of 32 to 512 tokens, end to end",
        "s",
        "lower",
        {"vm-magic": _our_batch(setup), "mlx-lm batch_generate": _their_batch(setup)},
        common | {"lengths": MIXED_LENGTHS},
        target=1.0,
    )
    yield Case(
        f"first token of a second turn, history of {HISTORY} tokens",
        "s",
        "lower",
        {"second turn": _turn(setup, second=True), "first turn": _turn(setup, second=False)},
        common | {"history": HISTORY},
        target=5.0,
    )
    setup.llm.close()
    yield from hybrid_cases()
    yield from kv_dtype_cases(MODEL)
    yield from notebook_cases(MODEL)


def _params(num_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def _between(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def _our_decode(setup: _Setup, context: int) -> Measure:
    """Cold each time, as theirs: a prompt that was asked before begins in its old pages and ends in others, a copy."""
    prompt = setup.prompt(context)

    def measure() -> float:
        stream = setup.llm.submit_prompt(prompt, _params(), cache_salt=f"cold {next(_SALTS)}")
        return _between([time.perf_counter() for _ in stream])

    return measure


def _their_decode(setup: _Setup, context: int) -> Measure:
    prompt = setup.prompt(context)
    return lambda: _between([time.perf_counter() for _ in _stream_generate(setup, prompt, NUM_TOKENS)])


def _our_first_token(setup: _Setup, length: int) -> Measure:
    prompt = setup.prompt(length)

    def measure() -> float:
        return _submit_and_wait(setup.llm, prompt, f"cold {next(_SALTS)}")

    return measure


def _submit_and_wait(llm: LLM, prompt: list[int], salt: str) -> float:
    begin = time.perf_counter()
    stream = llm.submit_prompt(prompt, _params(2), cache_salt=salt)
    next(stream)
    seconds = time.perf_counter() - begin
    stream.result()
    return seconds


def _their_first_token(setup: _Setup, length: int) -> Measure:
    prompt = setup.prompt(length)

    def measure() -> float:
        begin = time.perf_counter()
        stream = _stream_generate(setup, prompt, 2)
        next(stream)
        seconds = time.perf_counter() - begin
        for _ in stream:
            pass
        return seconds

    return measure


def _stream_generate(setup: _Setup, prompt: list[int], num_tokens: int) -> Iterator[object]:
    return mlx_lm.stream_generate(setup.model, setup.tokenizer, mx.array(prompt), max_tokens=num_tokens)


def _our_batch(setup: _Setup) -> Measure:
    prompts = [setup.prompt(length, length) for length in MIXED_LENGTHS]
    return _seconds(
        lambda: (setup.llm.reset_prefix_cache(), setup.llm.generate(prompts, _params(), use_tqdm=False))  # type: ignore[func-returns-value]
    )


def _their_batch(setup: _Setup) -> Measure:
    prompts = [setup.prompt(length, length) for length in MIXED_LENGTHS]
    return _seconds(lambda: batch_generate(setup.model, setup.tokenizer, prompts, max_tokens=NUM_TOKENS))


def _seconds(action: Callable[[], object]) -> Measure:
    def measure() -> float:
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin

    return measure


def _turn(setup: _Setup, *, second: bool) -> Measure:
    """Time to the first token of a prompt whose history the engine has just computed, or has not."""

    def measure() -> float:
        salt = f"turn {next(_SALTS)}"
        history, question = setup.prompt(HISTORY, 5), setup.prompt(20, 6)
        first = _submit_and_wait(setup.llm, history, salt)
        return _submit_and_wait(setup.llm, [*history, *question], salt) if second else first

    return measure
