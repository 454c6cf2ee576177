"""Steps over states that kernels move on in place: order by data, checkpoints, slots that move, what is said."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.params.sampling_params import SamplingParams
from engine.runner.decode_step import SlotRows
from engine.runner.kv.attention_calls import choose_kernels
from engine.runner.kv.attention_path import describe
from engine.runner.kv.input_batch import InputBatch
from engine.runner.kv.kv_spec import flatten, group_leaves, probe_caches
from engine.runner.kv.state_cache import KernelStateGroup
from engine.runner.kv.state_layers import StateLayers
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BareEngine, greedy
from tests.engine.parity.tiny_architectures import VOCAB, tiny_model
from tests.engine.runner.kernels.host_kernels import HostKernels
from tests.engine.runner.kernels.host_states import HostStateKernels
from tests.engine.runner.test_decode_step import VisibleKernels, run

BLOCK_SIZE = 8
HYBRIDS = ("qwen3_5", "qwen3_next", "mamba2", "lfm2", "nemotron_h", "falcon_h1", "jamba", "granitemoehybrid")


class VisibleStates:
    """Operations that read slots, and are easy to count in a graph; nothing is written."""

    def slots_problem(self, _shapes: Any) -> None:
        return None

    def delta_problem(self, _shape: Any) -> str:
        return "none here"

    ssm_problem = delta_problem

    def read_slots(self, states: mx.array, slots: mx.array, num_rows: int) -> mx.array:
        reads = slots[0, :num_rows].reshape(-1, *[1] * (states.ndim - 1))
        return mx.where(reads < 0, 0, mx.take(states, mx.maximum(slots[0, :num_rows], 0), axis=0))

    def write_slots(
        self, values: mx.array, states: mx.array, slots: mx.array, *, read: Any = None, after: Any = None
    ) -> mx.array:
        assert values.shape[1:] == states.shape[1:]
        order = [some.reshape(-1)[:1] * 0 for some in (read, after) if some is not None]
        return mx.arctan(mx.clip(values.reshape(-1)[:8] * 0 + slots.reshape(-1)[:8] + sum(order), -0.5, 0.5))


class VisibleHybrid(VisibleKernels):
    """With states."""

    states = VisibleStates()


def backend_of(name: str, kernels: Any, *, compiled: bool = False) -> PagedBackend:
    """A backend with kernels for all groups, its memory full of numbers."""
    model = tiny_model(name)
    tree = probe_caches(model)
    choice = choose_kernels(
        model, tree, group_leaves(flatten(tree)), kernels, block_size=BLOCK_SIZE, kv_cache_dtype="auto"
    )
    assert choice.serves_all, choice.reasons
    backend = PagedBackend(
        model, tree, BLOCK_SIZE, calls="rectangles", max_views=0, kernels=choice, compiled=compiled
    )  # fmt: skip
    for pool in backend.pools:
        pool.grow(40)
        arrays = getattr(pool, "arrays", None) or [pages.arrays for pages in pool.pages]  # type: ignore[attr-defined]
        for some in arrays:
            some[:] = [0.1 * mx.random.normal(one.shape, key=mx.random.key(3)).astype(one.dtype) for one in some]
            mx.eval(some)
    return backend


def scheduled(
    backend: PagedBackend, number: int, tokens: list[int], start: int, slots: tuple[int, int]
) -> ScheduledRequest:
    """A sequence's tokens from ``start`` on, its state read from one slot and written to the other."""
    request = Request(
        str(number), tokens[: max(start, 1)], SamplingParams(temperature=0), output_token_ids=tokens[max(start, 1) :]
    )  # fmt: skip
    blocks = list(range(4 * number, 4 * number + 4))
    tables = tuple(blocks if leaves[0].spec.paged else list(slots) for leaves in backend.groups)
    return ScheduledRequest(request, start, len(tokens) - start, tables, samples=True, pending=False)


def replies(backend: PagedBackend, lengths: list[int]) -> InputBatch:
    """A token of each of some sequences."""
    sequences = [list(range(5, 5 + length)) for length in lengths]
    return InputBatch.build(
        [scheduled(backend, i, tokens, len(tokens) - 1, (2 * i, 2 * i + i % 2)) for i, tokens in enumerate(sequences)]
    )


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_compiled_step_over_states_gives_what_the_same_step_gives_uncompiled(name: str) -> None:
    found = []
    for compiled in (False, True):
        backend = backend_of(name, VisibleHybrid(), compiled=compiled)
        assert backend._decode_step is not None
        found.append([np.array(run(backend, replies(backend, lengths))) for lengths in ([9, 17, 30], [10, 18, 31])])
        backend.close()
    for plain, compiled_logits in zip(*found, strict=True):
        np.testing.assert_allclose(compiled_logits, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "qwen3_5"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("wanted", [True, False])
def test_states_are_written_before_the_next_call_by_data_alone(
    name: str, tokens: int, tmp_path: Path, *, wanted: bool
) -> None:
    backend = backend_of(name, VisibleHybrid())
    launches = sum(
        len(leaf.states) if leaf.states else 1 for leaves in backend.groups for leaf in leaves
    )  # fmt: skip
    first = [scheduled(backend, 0, list(range(5, 25)), 20 - tokens, (0, 0))]
    run(backend, InputBatch.build(first), wanted=wanted)
    for last in (run(backend, replies(backend, [17])), *backend.barrier()):
        graph = tmp_path / "graph.dot"
        with graph.open("w") as file:
            mx.export_to_dot(file, last, *backend.barrier())
        assert graph.read_text().count("ArcTan") == 2 * launches
    backend.close()


def test_a_step_over_states_that_is_taken_back_leaves_no_trace() -> None:
    backend = backend_of("mamba2", VisibleHybrid())
    run(backend, replies(backend, [9]))
    backend.settle()
    before = backend.barrier()
    run(backend, replies(backend, [17]))
    assert backend.undo()
    assert backend.barrier() == before
    backend.close()


def test_nothing_holds_or_copies_states_while_a_step_is_built() -> None:
    backend = backend_of("qwen3_5", HostKernels())
    (group,) = (cache for cache in backend._group_caches if isinstance(cache, KernelStateGroup))
    arrays = [array for states in group.pool.arrays for array in states]
    run(backend, InputBatch.build([scheduled(backend, 0, list(range(5, 25)), 0, (3, 3))]))
    assert [id(array) for states in group.pool.arrays for array in states] == [id(array) for array in arrays]
    assert backend._before is not None
    assert backend._before[0] == [None, None]
    backend.close()


def logits_of(model: Any, tokens: list[int]) -> Any:
    return np.array(model(mx.array([tokens]), cache=make_prompt_cache(model))[0, -1])


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "mamba2", "lfm2"])
def test_a_checkpoint_stays_and_slots_may_move_between_steps(name: str) -> None:
    kernels = HostKernels()
    backend = backend_of(name, kernels)
    (state_group,) = (i for i, leaves in enumerate(backend.groups) if leaves[0].states)
    prompt = [int(token) for token in np.random.default_rng(3).integers(1, VOCAB, 21)]

    def logits(tokens: list[int], start: int, slots: tuple[int, int]) -> Any:
        return np.array(run(backend, InputBatch.build([scheduled(backend, 0, tokens, start, slots)])))[0]

    logits(prompt[:16], 0, (30, 30))
    first = logits(prompt, 16, (30, 7))
    pools: Any = backend.pools[state_group]
    kept = [[np.array(array[30]) for array in states] for states in pools.arrays]
    np.testing.assert_allclose(first, logits_of(backend.model, prompt), rtol=1e-3, atol=1e-4)
    limits = [4 if i == state_group else 40 for i in range(len(backend.groups))]
    backend.resize(limits, [{30: 2, 7: 0} if i == state_group else {} for i in range(len(backend.groups))])
    for states, same in zip(pools.arrays, kept, strict=True):
        for array, one in zip(states, same, strict=True):
            np.testing.assert_array_equal(np.array(array[2]), one)
    longer = [*prompt, 11]
    np.testing.assert_allclose(
        logits(longer, 21, (0, 0)), logits_of(backend.model, longer), rtol=1e-3, atol=1e-4
    )  # fmt: skip
    again = InputBatch.build([scheduled(backend, 0, prompt[:18], 16, (2, 9))])
    backend.make_room(again, [40] * len(backend.groups))
    found = np.array(run(backend, again))[0]
    np.testing.assert_allclose(found, logits_of(backend.model, prompt[:18]), rtol=1e-3, atol=1e-4)
    backend.close()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "mamba2", "lfm2"])
def test_a_prompt_of_one_token_begins_a_state(name: str) -> None:
    engine = BareEngine(tiny_model(name), kernels=HostKernels())
    expected = [greedy(engine.backend.model, prompt, 5) for prompt in ([7], [9], [7, 9, 11])]
    requests = engine.generate([[7], [9], [7, 9, 11]], 5)
    assert [one.output_token_ids for one in requests] == expected
    engine.backend.close()


def test_gated_delta_nets_that_are_wrong_are_left_to_mlx_lms_code() -> None:
    class Wrong(HostStateKernels):
        def delta_scan(self, *given: Any) -> mx.array:
            return super().delta_scan(*given) * 1.1

    kernels = HostKernels()
    kernels.states = Wrong()
    engine = BareEngine(tiny_model("qwen3_5"), kernels=kernels)
    assert isinstance(engine.backend, PagedBackend)
    assert engine.backend.kernels is not None
    assert engine.backend.kernels.serves_all
    said = describe(engine.backend.attention_paths)
    assert "states moved on in place by kernels (2 layers state: gated delta nets by mlx-lm's operations, 21 " in said
    prompt = list(range(5, 40))
    expected = greedy(engine.backend.model, prompt, 5)
    assert engine.generate([prompt], 5)[0].output_token_ids == expected
    assert kernels.states.calls["write_slots"] > 0
    engine.backend.close()


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_slots_that_are_wrong_are_left_to_mlxs_operations(name: str) -> None:
    class Wrong(HostStateKernels):
        def write_slots(self, values: mx.array, *given: Any, **order: Any) -> mx.array:
            return super().write_slots(values * 1.1, *given, **order)

    kernels = HostKernels()
    kernels.states = Wrong()
    engine = BareEngine(tiny_model(name), kernels=kernels)
    assert isinstance(engine.backend, PagedBackend)
    assert [(path.kind, path.backend) for path in engine.backend.attention_paths] == [
        ("full", "paged"), ("state", "reference"),
    ]  # fmt: skip
    assert "another state was written" in describe(engine.backend.attention_paths)
    expected = greedy(engine.backend.model, [5, 6, 7, 8], 5)
    assert engine.generate([[5, 6, 7, 8]], 5)[0].output_token_ids == expected
    engine.backend.close()


def test_slots_are_sent_again_where_a_row_changed() -> None:
    backend, rows = backend_of("mamba2", VisibleHybrid()), SlotRows()
    batch = replies(backend, [9, 17])
    first = rows.update(batch.scheduled_requests, 0, 4)
    assert np.array(first)[:, :5].tolist() == [[0, 2, -1, -1, -1], [0, 3, -1, -1, -1]]
    assert rows.update(batch.scheduled_requests, 0, 4) is first
    batch.scheduled_requests[1].block_tables[0][:] = [3, 3]
    assert np.array(rows.update(batch.scheduled_requests, 0, 4))[:, 1].tolist() == [3, 3]
    backend.close()


def test_closing_leaves_gated_delta_nets_as_they_were() -> None:
    model = tiny_model("qwen3_5")
    kinds = [type(layer) for _, layer in model.named_modules()]
    backend = BareEngine(model, kernels=HostKernels()).backend
    assert isinstance(backend, PagedBackend)
    assert [type(layer) for _, layer in model.named_modules()] != kinds
    backend.close()
    assert [type(layer) for _, layer in model.named_modules()] == kinds


def test_a_layer_that_is_made_otherwise_is_left_to_mlx_lms_code() -> None:
    model = tiny_model("mamba2")
    for _, layer in model.named_modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (0.0, 10.0, 20.0)
    found = StateLayers(model, HostStateKernels())
    assert found.problem == "Mamba2Block by mlx-lm's operations, ValueError: too many values to unpack (expected 2)"
    found.remove()
