"""What runs while something fails, and what must hold afterwards, whatever failed and whenever."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.errors import VMMagicError
from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from tests.engine.faults.points import out_of_memory, python_out_of_memory
from tests.engine.parity.oracle import assert_nothing_is_held, oracle_tokens
from tests.engine.runtime.test_replan import fraction_for

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROBE = [11, 12, 13, 14, 15]
OUT_OF_MEMORY = (out_of_memory, python_out_of_memory)
LIMIT = 60.0
"""Seconds in which anything here is over; only a hang takes as long."""

Tokens = dict[str, list[list[int]]]
Start = Callable[[LLM], dict[str, RequestStream]]


@dataclass
class Outcome:
    """What a scenario came to: tokens of the requests that ended well, the lines of the others."""

    tokens: Tokens = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)


def mixed(llm: LLM) -> dict[str, RequestStream]:
    """One request of each kind that takes a way of its own through the engine."""
    drawn = GREEDY.replace(temperature=1.0, seed=7, top_p=0.9, top_k=40, min_p=0.01)
    penalized = GREEDY.replace(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2)
    biased = GREEDY.replace(logit_bias={5: 3.0}, bad_words=["the"], allowed_token_ids=list(range(3, 300)))
    prompts = {
        "plain": ([5, 6, 7], GREEDY),
        "long": ([8, 9, 10] * 30, GREEDY.replace(max_tokens=3)),
        "drawn": ([20, 21], drawn.replace(n=2)),
        "penalized": ([30, 31, 30, 31], penalized),
        "logprobs": ([40, 41, 42, 43], GREEDY.replace(logprobs=2, prompt_logprobs=1)),
        "biased": ([50, 51], biased),
    }
    return {name: llm.submit_prompt(prompt, params) for name, (prompt, params) in prompts.items()}


def guided(llm: LLM) -> dict[str, RequestStream]:
    """Two requests with grammars beside one without."""
    from engine.params.structured_outputs import StructuredOutput

    text = {"plain": None, "choice": {"choice": ["red wine", "blue sky"]}, "json": {"json": {"type": "boolean"}}}
    streams = {}
    for name, wanted in text.items():
        made = None if wanted is None else StructuredOutput(**wanted)
        streams[name] = llm.submit_prompt("Say it", GREEDY, structured_outputs=made)
    return streams


def replanned(llm: LLM) -> dict[str, RequestStream]:
    """Requests under way while memory shrinks, so that their pages move, and grows again."""
    first = llm.submit_prompt([9] * 100, GREEDY.replace(max_tokens=100))  # has the first blocks
    streams = {name: llm.submit_prompt([5 + n] * (20 * n + 3), GREEDY) for n, name in enumerate(("one", "two"))}
    first.abort()
    llm.replan(fraction=fraction_for(llm, 20, max_num_seqs=4), max_num_seqs=4)
    llm.replan(fraction=0.5, max_num_seqs=6)
    return streams


def scored(llm: LLM) -> dict[str, RequestStream]:
    """What ``llm.score`` asks for, in several chunks."""
    params = GREEDY.replace(max_tokens=1, prompt_logprobs=5)
    return {name: llm.submit_prompt(list(range(3, length)), params) for name, length in (("short", 20), ("long", 90))}


def outcome_of(streams: dict[str, RequestStream]) -> Outcome:
    """Wait for all; errors are those for users, in one line."""
    outcome = Outcome()
    for name, stream in streams.items():
        try:
            outcome.tokens[name] = [list(one.token_ids) for one in result_of(stream).outputs]
        except VMMagicError as error:
            outcome.lines[name] = str(error)
    assert not any("\n" in line for line in outcome.lines.values()), outcome.lines
    return outcome


def result_of(stream: RequestStream) -> Any:
    """``stream.result()``, unless nobody ever ends it."""
    over = threading.Event()
    stream.add_done_callback(over.set)
    assert over.wait(LIMIT), f"request {stream.request_id} waits for ever"
    return stream.result()


def assert_goes_on(llm: LLM, model: str) -> None:
    """Nothing is held, and the next request gives the oracle's tokens."""
    assert_nothing_is_held(llm)
    found = result_of(llm.submit_prompt(PROBE, GREEDY)).outputs[0].token_ids
    assert list(found) == oracle_tokens(model, PROBE, 6)
    assert_nothing_is_held(llm)


def open_files() -> dict[str, str]:
    """This process's file descriptors, and what they are; none where the system does not say."""
    folder, found = "/proc/self/fd", {}
    for number in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):  # the listing's own
            found[number] = os.readlink(f"{folder}/{number}")
    return found


@contextmanager
def nothing_leaks(*, bytes_more: int = 0) -> Iterator[None]:
    """No thread, file or MLX memory more than before."""
    from engine.llm import memory_in_use

    gc.collect()
    threads, files, memory = set(threading.enumerate()), open_files(), memory_in_use()
    yield
    gc.collect()
    more = [one.name for one in threading.enumerate() if one not in threads and one.name != "vm-callbacks"]
    assert not more, more
    left = {number: path for number, path in open_files().items() if number not in files}
    assert len(open_files()) <= len(files), left
    assert memory_in_use() <= memory + bytes_more


def is_idle(llm: LLM) -> bool:
    """Whether no request runs or waits."""
    stats = llm.stats()
    return not (stats.num_running or stats.num_waiting)
