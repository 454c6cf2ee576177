"""The step over pages that kernels read: order by data, padding, block tables. The kernels here are stand-ins."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.params.sampling_params import SamplingParams
from engine.runner.decode_step import BlockTables, padded_rows, padded_width
from engine.runner.kernels import paged_attention
from engine.runner.kv.attention_calls import choose_kernels
from engine.runner.kv.input_batch import InputBatch
from engine.runner.kv.kernel_cache import KernelLayerCache
from engine.runner.kv.kv_spec import flatten, group_leaves, probe_caches
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.tiny_architectures import tiny_model
from tests.engine.runner.kernels.host_kernels import memory

BLOCK_SIZE = 8
FULLY_SERVED = ("llama", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gemma3n", "gpt_oss", "qwen3_moe")


class VisibleKernels:
    """Operations that read pages, tables and positions, and are easy to count in a graph; nothing is written."""

    def attention_problem(self, **_layer: Any) -> str | None:
        return None

    def paged_attention(
        self, queries: mx.array, _keys: mx.array, new_values: mx.array, key_pages: mx.array, _pages: mx.array,
        block_tables: mx.array, positions: mx.array, *, block_size: int, **_how: Any,
    ) -> mx.array:  # fmt: skip
        first = mx.take(key_pages[0, 0, :, 0], block_tables[:, 0] * block_size)[:, None, None, None]
        seen = mx.arctan(mx.clip(mx.repeat(new_values, queries.shape[1] // new_values.shape[1], axis=1), -0.5, 0.5))
        return (seen + first + positions[: queries.shape[0], None, None, None]).astype(queries.dtype)

    def collect(
        self, new_keys: mx.array, new_values: mx.array, *_pages: mx.array, length: int, **_how: Any
    ) -> tuple[mx.array, mx.array]:
        wide = [(0, 0), (0, 0), (length - new_keys.shape[2], 0), (0, 0)]
        return mx.arctan(mx.clip(mx.pad(new_keys, wide), -0.5, 0.5)), mx.pad(new_values, wide)


def backend_of(name: str, *, compiled: bool, kernels: Any = None) -> PagedBackend:
    """A backend with kernels for all groups, its pages full of numbers."""
    model = tiny_model(name)
    tree = probe_caches(model)
    groups = group_leaves(flatten(tree))
    choice = choose_kernels(
        model, tree, groups, kernels or VisibleKernels(), block_size=BLOCK_SIZE, kv_cache_dtype="auto"
    )
    assert choice.serves_all, choice.reasons
    backend = PagedBackend(
        model, tree, BLOCK_SIZE, calls="rectangles", max_views=0, kernels=choice, compiled=compiled
    )  # fmt: skip
    for pool in backend.pools:
        pool.grow(40)
        for pages in pool.pages:
            pages.arrays[0] = mx.random.normal(pages.arrays[0].shape, key=mx.random.key(3)).astype(
                pages.arrays[0].dtype
            )
    return backend


def decodes(backend: PagedBackend, lengths: list[int], *, tokens: int = 1) -> InputBatch:
    """A batch of sequences of ``lengths`` tokens, the last ``tokens`` of which are computed."""
    scheduled = []
    for number, length in enumerate(lengths):
        known = list(range(5, 5 + length))
        request = Request(str(number), known[:-1], SamplingParams(temperature=0), output_token_ids=known[-1:])
        blocks = list(range(4 * number + 1, 4 * number + 5))
        tables = tuple([blocks] * len(backend.groups))
        scheduled.append(ScheduledRequest(request, length - tokens, tokens, tables, samples=True, pending=False))
    return InputBatch.build(scheduled)


def run(backend: PagedBackend, batch: InputBatch, *, wanted: bool = True) -> mx.array:
    rows = [np.array([one.num_tokens - 1][: int(wanted)], dtype=np.int32) for one in batch.scheduled_requests]
    return backend.forward(batch, mx.array(batch.token_ids), rows)


@pytest.mark.parametrize("name", FULLY_SERVED)
def test_a_compiled_step_gives_what_the_same_step_gives_uncompiled(name: str) -> None:
    found = []
    for compiled in (False, True):
        backend = backend_of(name, compiled=compiled)
        one, two = (np.array(run(backend, decodes(backend, [9, 17, 30]))) for _ in range(2))
        three = np.array(run(backend, decodes(backend, [10, 18, 31])))
        np.testing.assert_array_equal(one, two)
        assert not np.array_equal(one, three)
        found.append((one, three))
        backend.close()
    for plain, compiled_logits in zip(*found, strict=True):
        np.testing.assert_allclose(compiled_logits, plain, rtol=1e-4, atol=1e-4)


def test_rows_that_pad_a_step_change_nothing() -> None:
    backend = backend_of("llama", compiled=True)
    together = np.array(run(backend, decodes(backend, [9, 17, 30])))
    batch = decodes(backend, [9, 17, 30])
    for row in range(3):
        alone = np.array(run(backend, batch.part([row])))
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_call_comes_after_the_one_before_it_by_data_alone(tmp_path: Path, tokens: int, *, wanted: bool) -> None:
    """All token ids come from the host, so nothing but the order that the backend makes joins the two calls."""
    backend = backend_of("llama", compiled=False)
    layers = len(backend.model.layers)
    run(backend, decodes(backend, [20], tokens=tokens), wanted=wanted)
    second = run(backend, decodes(backend, [17]))
    graph = tmp_path / "graph.dot"
    with graph.open("w") as file:
        mx.export_to_dot(file, second)
    assert graph.read_text().count("ArcTan") == 2 * layers
    assert "Depends" not in graph.read_text()
    (newest,) = backend.barrier()
    with graph.open("w") as file:
        mx.export_to_dot(file, newest)
    assert graph.read_text().count("ArcTan") == 2 * layers


def test_a_step_that_is_taken_back_leaves_no_trace() -> None:
    backend = backend_of("llama", compiled=False)
    first = np.array(run(backend, decodes(backend, [9])))
    backend.settle()
    (before,) = backend.barrier()
    run(backend, decodes(backend, [17]))
    assert backend.undo()
    assert backend.barrier() == [before]
    np.testing.assert_array_equal(np.array(run(backend, decodes(backend, [9]))), first)


def test_logits_come_in_the_order_of_the_schedule_whatever_the_calls() -> None:
    backend = backend_of("llama", compiled=False)
    single, chunk = decodes(backend, [9, 17]), decodes(backend, [9, 17, 30], tokens=6)
    mixed = InputBatch.build([chunk.scheduled_requests[2], *single.scheduled_requests])
    logits = np.array(run(backend, mixed))
    apart = [np.array(run(backend, mixed.part([i])))[0] for i in range(3)]
    np.testing.assert_allclose(logits, np.stack(apart), rtol=1e-5, atol=1e-5)


def test_block_tables_are_written_again_where_a_row_changed() -> None:
    batch = decodes(backend_of("llama", compiled=False), [9, 17])
    tables = BlockTables(4, 8)
    first = tables.update(batch.scheduled_requests, 0)
    assert tables.update(batch.scheduled_requests, 0) is first
    batch.scheduled_requests[1].block_tables[0].append(39)
    grown = np.array(tables.update(batch.scheduled_requests, 0))
    assert grown[1, :5].tolist() == [5, 6, 7, 8, 39]
    other = batch.part([1])
    assert np.array(tables.update(other.scheduled_requests, 0))[0, :5].tolist() == [5, 6, 7, 8, 39]


def test_a_preempted_request_brings_its_new_blocks() -> None:
    batch = decodes(backend_of("llama", compiled=False), [9])
    tables = BlockTables(1, 8)
    tables.update(batch.scheduled_requests, 0)
    scheduled = batch.scheduled_requests[0]
    scheduled.block_tables[0][:] = [30, 2, 3, 4]  # as long as before, and with the same last block
    scheduled.request.metrics.num_preemptions += 1
    assert np.array(tables.update(batch.scheduled_requests, 0))[0, :4].tolist() == [30, 2, 3, 4]


def test_steps_come_in_few_shapes() -> None:
    assert [padded_rows(rows) for rows in (1, 3, 8, 9, 33, 96, 97, 256, 257)] == [1, 4, 8, 12, 40, 96, 128, 256, 320]
    assert len({padded_rows(rows) for rows in range(1, 257)}) <= 18
    assert [padded_width(blocks) for blocks in (1, 32, 33, 600, 8192)] == [32, 32, 64, 1024, 8192]


def test_kernels_are_never_given_a_table_of_few_numbers() -> None:
    """Metal takes another text for those, which no check has seen."""
    seen: list[int] = []

    class Watching(VisibleKernels):
        def paged_attention(self, *arrays: mx.array, **how: Any) -> mx.array:
            seen.append(arrays[5].size)
            return super().paged_attention(*arrays, **how)

    backend = backend_of("llama", compiled=False, kernels=Watching())
    backend._decode_step = None  # as where kernels serve some groups only
    run(backend, decodes(backend, [9]))
    assert min(seen) >= 8


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layers_launches_are_given_its_own_counters_of_arrivals(
    monkeypatch: pytest.MonkeyPatch, *, compiled: bool
) -> None:
    """Two layers' launches need not follow each other. A compiled step is given the array itself."""
    monkeypatch.setattr(paged_attention, "joins_in_launch", lambda: True)
    given: list[int] = []

    class Watching(VisibleKernels):
        def paged_attention(self, *arrays: mx.array, arrivals: mx.array | None = None, **how: Any) -> mx.array:
            assert arrivals is not None
            given.append(id(arrivals))
            return super().paged_attention(*arrays, **how) + arrivals[0].astype(arrays[0].dtype)

    backend = backend_of("llama", compiled=compiled, kernels=Watching())
    logits = np.array(run(backend, decodes(backend, [9, 17])))
    assert len(set(given)) == len(given) == len(backend.model.layers)
    np.testing.assert_array_equal(np.array(run(backend, decodes(backend, [9, 17]))), logits)
    layer = backend._caches[0]
    assert isinstance(layer, KernelLayerCache)
    assert layer._arrivals is not None
    memory(layer._arrivals[None])[0] = 5  # as a launch writes in place
    assert not np.array_equal(np.array(run(backend, decodes(backend, [9, 17]))), logits)
