"""The speed of a loaded model: measured in bounded time, and nothing of it left behind."""

import json
import time
from collections.abc import Iterator

import pytest

from engine import LLM
from engine.batch.bench import Bench, processor
from engine.errors import ConfigError
from tests.conftest import TinyModelDir


@pytest.fixture(scope="module")
def llm(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512, gpu_memory_utilization=0.2, max_num_seqs=4) as loaded:
        yield loaded


def test_prompts_and_batches_are_measured_and_nothing_stays(llm: LLM) -> None:
    llm.generate(["one two three four five six seven eight nine ten " * 4], use_tqdm=False)
    before, asked, explained = llm.stats(), len(llm.request_log), llm.explain().request_id
    bench = llm.bench(seconds=120, batch_sizes=(1, 4, 64))  # all is done long before
    rows = list(bench.run())
    assert rows == bench.result.rows
    assert bench.result.complete
    assert bench.result.notes[0] == "batches above max_num_seqs (4) are left out"
    assert {(row.case, row.prompt_tokens) for row in rows if row.case == "prefill"} == {("prefill", 128)}
    assert [row.batch for row in rows if row.case == "decode"] == [1, 4]
    for row in rows:
        assert row.tokens_per_second > 0
        assert row.seconds_to_first_token > 0
        assert row.per_request == row.tokens_per_second / row.batch
    after = llm.stats()
    assert after.num_cached_blocks == before.num_cached_blocks, "the prefix cache is as it was"
    assert after.num_used_blocks == 0
    assert (len(llm.request_log), llm.explain().request_id) == (asked, explained)
    facts = json.loads(json.dumps(bench.result.to_dict()))["facts"]
    assert processor() in facts["machine"]
    assert "mlx " in facts["versions"]
    assert "max_num_seqs=4" in facts["settings"]


def test_its_time_is_bounded_on_a_slow_model(scripted_llm: object) -> None:
    llm: LLM = scripted_llm("Hi.", step_seconds=0.05, max_num_seqs=8)  # type: ignore[operator]
    bench = llm.bench(seconds=2, batch_sizes=(1, 8))
    rows = list(bench.run())
    decodes = [row for row in rows if row.case == "decode"]
    assert [row.batch for row in decodes] == [1, 8]
    assert all(0 < row.tokens < 256 * row.batch for row in decodes), "which would take 26 s"


def test_stopping_ends_its_requests(llm: LLM) -> None:
    bench = llm.bench(seconds=60, batch_sizes=(2,))
    rows = bench.run()
    next(rows)
    rows.close()
    assert not bench.result.complete
    assert len(bench.result.rows) == 1
    deadline = time.monotonic() + 60
    while llm.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.stats().num_running == 0


def test_values_out_of_range_are_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="--seconds 0: must be from 1 to 3600"):
        llm.bench(seconds=0)
    for sizes in ((), (0,), (99,)):
        with pytest.raises(ConfigError, match=r"--batch: sizes must be from 1 to max_num_seqs \(4\)"):
            Bench(llm, "cpu", 100, batch_sizes=sizes)
