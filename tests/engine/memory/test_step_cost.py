"""Memory that runs short under a running engine: smaller chunks, then waiting, then one request's error."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.errors import OutOfMemoryError
from engine.llm import LLM
from engine.memory.step_cost import AdmissionControl, StepCost
from engine.params.sampling_params import SamplingParams
from engine.runner.device.devices import Device
from engine.runner.device.memory import FreeMemory
from tests.engine.parity.oracle import assert_nothing_is_held, oracle_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [11 + i * 7 % 180 for i in range(400)]
PLENTY = 10**12


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def shared(model) -> Iterator[LLM]:
    with LLM(model, max_model_len=512, max_num_seqs=4, max_num_batched_tokens=256) as llm:
        yield llm


@pytest.fixture
def llm(shared) -> Iterator[LLM]:
    """An engine without cached prefixes; what a test changed is undone, and nothing may be held."""
    admission = shared._thread.call(lambda engine: engine.admission)
    before = admission.free, admission.step_cost, shared._thread.call(lambda engine: engine.patience)
    shared.reset_prefix_cache()
    yield shared
    admission.free, admission.step_cost, patience = before
    shared._thread.call(lambda engine: setattr(engine, "patience", patience))
    assert_nothing_is_held(shared)


def chunks_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the prompt chunks that the engine computes from now on."""
    chunks: list[int] = []

    def watch(engine) -> None:
        execute = engine.runner.execute

        def spy(step):
            chunks.extend(scheduled.num_tokens for scheduled in step.scheduled_requests if scheduled.num_tokens > 1)
            return execute(step)

        monkeypatch.setattr(engine.runner, "execute", spy)

    llm._thread.call(watch)
    return chunks


def test_a_chunk_is_halved_until_it_fits_beside_the_steps_other_chunks():
    left = 700_000
    admission = AdmissionControl(StepCost(base=1000.0, per_row=100.0, per_pair=1.0), 50, lambda: left)
    assert admission.affordable(2048, 0) == 512
    assert admission.affordable(512, 0) == 512
    assert admission.affordable(512, 0) == 64
    admission.begin()
    assert admission.affordable(2048, 4096) == 128  # a longer context leaves less room
    left = 3000
    admission.begin()
    assert admission.affordable(2048, 0) == 0
    assert admission.affordable(4, 0) == 4
    assert admission.shortage(2048, 0) == ("the next 16 tokens of this prompt need 3,656B of memory, 3,000B are free")


def test_a_model_that_allocates_stays_within_the_limit_with_smaller_chunks(llm, model, monkeypatch):
    import mlx.core as mx

    from engine.runner.warm_up import measure_step_cost

    class Spendthrift:
        def __init__(self, mlp):
            self.mlp = mlp

        def __call__(self, rows):
            wide = rows.sum(axis=-1, keepdims=True) * mx.ones((200_000,))  # 0.8 MB for each row
            return self.mlp(rows) + 0 * wide.max(axis=-1, keepdims=True)

    def spend(engine):
        layer = engine.runner.backend.model.model.layers[0]
        monkeypatch.setitem(layer, "mlp", Spendthrift(layer.mlp))
        engine.admission.step_cost = measure_step_cost(engine.runner.backend, engine.runner.vocab_size)
        engine.runner.recover()
        return engine.admission.step_cost.per_row

    assert llm._thread.call(spend) > 700_000
    chunks = chunks_of(llm, monkeypatch)
    limit = llm._thread.call(lambda _: mx.get_active_memory()) + 90_000_000  # 112 rows
    peaks = []
    for free in (lambda: PLENTY, lambda: limit - mx.get_active_memory()):
        llm._thread.call(lambda engine, free=free: setattr(engine.admission, "free", free))
        llm.reset_prefix_cache()
        llm._thread.call(lambda _: mx.reset_peak_memory())
        assert llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids == oracle_tokens(model, PROMPT, 8)
        peaks.append(llm._thread.call(lambda _: mx.get_peak_memory()))
    assert peaks[0] > limit >= peaks[1]
    assert chunks[:2] == [256, 144]
    assert max(chunks[2:]) <= 112
    assert sum(chunks[2:]) == len(PROMPT)
    llm._thread.call(lambda _: monkeypatch.undo())


def test_a_prompt_waits_for_memory_while_others_run_and_then_has_the_right_tokens(llm, model):
    running = llm.submit_prompt([5, 6], GREEDY.replace(max_tokens=60))
    next(running)
    llm._thread.call(lambda engine: setattr(engine.admission, "free", lambda: 0))
    waiting = llm.submit_prompt(PROMPT, GREEDY)
    assert len(running.result().outputs[0].token_ids) == 60
    assert llm.stats().num_waiting == 1
    assert not waiting.drain(timeout=0.1)
    llm._thread.call(lambda engine: setattr(engine.admission, "free", lambda: PLENTY))
    assert waiting.result().outputs[0].token_ids == oracle_tokens(model, PROMPT, 8)


def test_a_prompt_that_nothing_helps_ends_with_an_error_of_its_own(llm, model):
    admission = llm._thread.call(lambda engine: setattr(engine, "patience", 0.3) or engine.admission)
    llm._thread.call(lambda _: setattr(admission, "free", lambda: 0))
    too_large, small = llm.submit_prompt(PROMPT, GREEDY), llm.submit_prompt([5], GREEDY)
    began = time.monotonic()
    with pytest.raises(OutOfMemoryError, match=r"next 16 tokens of this prompt need .*B are free; free memory"):
        too_large.result()
    assert time.monotonic() - began >= 0.25
    assert small.result().outputs[0].token_ids == oracle_tokens(model, [5], 8)  # one token needs no chunk


def test_a_running_prompt_gives_its_blocks_back_when_memory_runs_out_half_way(llm, model, monkeypatch):
    left = [PLENTY]
    llm._thread.call(lambda engine: setattr(engine, "patience", 0.2))
    llm._thread.call(lambda engine: setattr(engine.admission, "free", lambda: left.pop() if left else 0))
    chunks = chunks_of(llm, monkeypatch)
    with pytest.raises(OutOfMemoryError):
        llm.generate([PROMPT], GREEDY)
    assert chunks == [256]
    llm._thread.call(lambda _: monkeypatch.undo())


def test_an_allocation_that_fails_ends_the_requests_of_its_step_and_no_others(llm, model, monkeypatch):
    """On a GPU it really fails. MLX 0.32.4 on CPUs dies of it, so there its allocator's words are said in its place."""
    import mlx.core as mx

    from engine.runner.model_runner import InFlightStep

    submit, on_cpu = InFlightStep.submit, mx.default_device().type == mx.DeviceType.cpu

    def submit_too_much(step):
        if any(scheduled.request.prompt_token_ids[0] == 7 for scheduled in step.scheduled_requests):
            if on_cpu:
                raise RuntimeError("[malloc_or_wait] Unable to allocate 4503599627370496 bytes.")
            mx.eval(mx.zeros((2**30, 2**20)))
        submit(step)

    monkeypatch.setattr(InFlightStep, "submit", submit_too_much)
    llm._thread.call(lambda engine: monkeypatch.setattr(engine.scheduler, "max_num_seqs", 1))
    fails, waits = llm.submit_prompt([7, 8, 9], GREEDY), llm.submit_prompt([5, 6], GREEDY)
    with pytest.raises(OutOfMemoryError, match="out of memory in this step"):
        fails.result()
    assert waits.result().outputs[0].token_ids == oracle_tokens(model, [5, 6], 8)
    llm._thread.call(lambda _: monkeypatch.undo())


@pytest.mark.parametrize("submit_first", [False, True])
def test_a_step_that_fails_leaves_those_that_were_not_in_it_running(llm, model, monkeypatch, submit_first):
    """A request whose first chunk is in the next step only, when the step before it fails to be read."""
    engine = llm._thread.call(lambda engine: engine)
    hand_out, failed = engine._hand_out, []

    def fail_once(result):
        if not failed and len(engine.scheduler.running) == 2:
            failed.append(True)
            raise RuntimeError("no such luck")
        hand_out(result)

    llm._thread.call(lambda _: monkeypatch.setattr(engine, "_hand_out", fail_once))
    llm._thread.call(lambda _: monkeypatch.setattr(engine, "_submit_first", submit_first))  # True: as on a GPU
    first = llm.submit_prompt([5, 6], GREEDY.replace(max_tokens=400))
    next(first)
    second = llm.submit_prompt(PROMPT[:40], GREEDY)
    with pytest.raises(Exception, match="no such luck"):
        first.result()
    assert second.result().outputs[0].token_ids == oracle_tokens(model, PROMPT[:40], 8)
    assert second.metrics.num_preemptions == 1
    llm._thread.call(lambda _: monkeypatch.undo())


def test_decodes_do_not_ask_how_much_memory_is_free(llm):
    asked = []
    llm._thread.call(lambda engine: setattr(engine.admission, "free", lambda: asked.append(1) or PLENTY))
    llm.generate([[5, 6, 7]], GREEDY.replace(max_tokens=30))
    assert len(asked) == 1


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_free_memory_is_the_least_of_device_machine_and_control_groups(tmp_path):
    proc = write(tmp_path / "proc", meminfo="MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable: 500 kB\n")
    write(proc / "self", cgroup="0::/box/inner\n")
    root = write(tmp_path / "cgroup", memory__max="max", memory__current="7", memory__stat="inactive_file 0\n")
    device = Device("cpu", "test", 10**15)
    assert FreeMemory(device, proc, root)() == 500 * 1024
    stat = "anon 5\ninactive_file 1000\nactive_file 3\n"
    write(root / "box", memory__max="300000", memory__current="200000", memory__stat=stat)
    free = FreeMemory(device, proc, root)
    assert free() == 101_000
    (root / "box" / "memory.current").write_text("400000")
    assert free() == 0
    assert FreeMemory(Device("metal", "test", 10**15), proc, root)() > 10**14  # there MLX's own count decides


def test_free_memory_reads_the_older_control_groups(tmp_path):
    proc = write(tmp_path / "proc")
    write(proc / "self", cgroup="4:memory:/a\n3:cpu:/a\n")
    old = tmp_path / "cgroup" / "memory"
    write(old, memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="1", memory__stat="")
    write(
        old / "a",
        memory__limit_in_bytes="5000",
        memory__usage_in_bytes="4000",
        memory__stat="total_inactive_file 500\n",
    )
    assert FreeMemory(Device("cpu", "test", 10**15), proc, tmp_path / "cgroup")() == 1500


def test_pages_behind_a_window_count_as_well(tiny_model_dir):
    with LLM(str(tiny_model_dir("gemma3_text")), max_model_len=512, gpu_memory_utilization=0.05) as llm:
        groups = llm.plan.groups
        assert {group.kind for group in groups} == {"full", "sliding"}
        found = llm._thread.call(lambda engine: engine.admission.bytes_per_token)
        assert found == sum(group.bytes_per_token for group in groups) > llm.plan.per_block_bytes // llm.plan.block_size


@pytest.mark.parametrize("device", ["cpu", "metal", "cuda"])
@pytest.mark.parametrize("context_length", [None, 1, 40, 1024, 131072])
def test_measured_steps_stay_within_the_models_context_and_tell_rows_from_context(device, context_length):
    from engine.runner.warm_up import _samples

    samples = _samples(device, context_length)
    assert all(1 <= rows <= context <= max(3, context_length or 4096) for rows, context in samples)
    terms = [[1, rows, rows * context, context] for rows, context in samples]
    assert np.linalg.matrix_rank(np.array(terms)) == 4
