"""What runs in the kernel under load: cells of a user, and looks at what is held. Printed lines are its answers."""

import ctypes
import gc
import itertools
import json
import sys
import threading
import tracemalloc
from collections import Counter
from typing import Any

import mlx.core as mx

from engine import LLM, MemoryInUseError, SamplingParams
from engine.runtime.llm_engine import LLMEngine

OURS = ("engine", "vm_magic")
_turn = itertools.count()


def check_chat(llm: LLM, messages: list[dict[str, Any]], num_tokens: int, wanted: str) -> None:
    """A chat in the process says what it says alone, twice at once."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    for output in llm.chat([messages, messages], params, use_tqdm=False):
        assert output.outputs[0].text == wanted, (output.outputs[0].text, wanted)


def leave_stream(llm: LLM, messages: list[dict[str, Any]]) -> None:
    """A loop over deltas that is left early."""
    for count, _ in enumerate(llm.stream(messages, SamplingParams(max_tokens=60))):
        if count == 2:
            break


def change_plan(llm: LLM, num_blocks: int, num_seqs: int) -> None:
    """Another plan while requests run; one that they do not leave room for is refused, and changes nothing."""
    turn = next(_turn) % 4
    blocks = num_blocks * (1, 2, 1, 1)[turn]
    plan = llm.plan
    fraction = (plan.model_memory + plan.overhead + blocks * plan.per_block_bytes) / plan.device_limit
    seqs, length = num_seqs * (1, 2, 1, 1)[turn], (2048, 2304, 2048, 2048)[turn]
    try:
        llm.replan(fraction=fraction, max_num_seqs=seqs, max_model_len=length)
    except MemoryInUseError:
        assert llm.plan == plan


def check_blocks(llm: LLM) -> None:
    """While requests run, each block is free, cached or held."""
    stats = llm.stats()
    assert stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks == stats.num_blocks, stats


def probe(llm: LLM) -> None:
    """Print what is held, with nothing under way: blocks, objects of ours by class, Python's memory blocks."""
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0), stats
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks, stats
    llm._thread.call(_check_pools)
    llm._thread.call(lambda _: mx.clear_cache())
    gc.collect()
    kinds = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    ours = {name: count for name, count in kinds.items() if name.partition(".")[0] in OURS}
    found = {
        "objects": ours, "python_blocks": sys.getallocatedblocks(), "num_blocks": stats.num_blocks,
        "traced": _traced(), "preemptions": stats.num_preemptions, "in_use": _in_use(),
    }  # fmt: skip
    print(json.dumps(found))


def under_way(llm: LLM) -> None:
    """Print what is under way, and how many threads the event loops' pools have: those are made one by one and stay."""
    stats = llm.stats()
    pooled = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
    print(json.dumps([stats.num_running + stats.num_waiting + stats.num_used_blocks, pooled]))


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def trim() -> None:
    """Have glibc's arenas give free pages back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _in_use() -> int | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _Mallinfo
    told = libc.mallinfo2()
    return int(told.uordblks + told.hblkhd)


def _check_pools(engine: LLMEngine) -> None:
    for group in engine.scheduler.kv.groups:
        group.pool.check()


def _traced() -> int | None:
    """Bytes that lines of ours hold, where tracemalloc was started."""
    if not tracemalloc.is_tracing():
        return None
    paths = [tracemalloc.Filter(True, f"*/{name}/*") for name in OURS]
    return sum(stat.size for stat in tracemalloc.take_snapshot().filter_traces(paths).statistics("filename"))
