"""``%vllm_metal plan``: lists of values, sizes, and questions about the loaded model's plan."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError, UnsupportedOptionError
from engine.memory.cache_spec import FullAttentionSpec, KVVectors
from engine.memory.plan import MemoryPlan
from engine.memory.plan_table import PlanTable
from tests.memory_plans import make_plan
from tests.tiny_models import tiny_config
from tests.vm_magic import fakes
from tests.vm_magic.helpers import line

PLAN = make_plan(
    groups=[FullAttentionSpec((0, 1), 4096, vectors=(KVVectors(4, 256, 2),) * 2)],
    device_limit=10**9,
    fraction=0.5,
    model_memory=10**8,
    overhead=10**7,
    block_size=16,
    context_length=65_536,
)


@pytest.fixture
def in_force(loaded: fakes.FakeLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loaded, "plan", PLAN)
    return


def test_values_with_commas_ask_for_a_table_and_others_stay_as_they_are(shell: Any) -> None:
    asked = line(
        shell,
        "plan org/m --gpu-memory-utilization 0.6,0.9 --max-num-seqs auto --max-model-len 32K,64K,auto "
        "--device-memory 16GB,48GiB --model-memory 5GB --kv-cache-dtype auto,float16 --served-model-name a,b",
    )
    assert asked.options == {
        "gpu_memory_utilization": ["0.6", "0.9"],
        "max_num_seqs": "auto",
        "max_model_len": ["32K", "64K", "auto"],
        "device_memory": ["16GB", "48GiB"],
        "model_memory": "5GB",
        "kv_cache_dtype": ["auto", "float16"],
        "served_model_name": ["a,b"],
    }
    assert list(asked.options) == [
        "max_num_seqs", "model_memory", "served_model_name",
        "gpu_memory_utilization", "max_model_len", "device_memory", "kv_cache_dtype",
    ]  # fmt: skip


def test_a_choice_in_a_list_is_checked_like_one_alone(shell: Any) -> None:
    with pytest.raises(UsageError, match="float7"):
        line(shell, "plan org/m --kv-cache-dtype auto,float7")
    with pytest.raises(UsageError, match="kv-cache-dtype"):
        line(shell, "load org/m --kv-cache-dtype auto,float16")


def test_the_real_planner_answers_a_list_with_rows(
    engine_shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    table = line(
        engine_shell, f"plan {tmp_path} --device-memory 10MB,1GB --max-model-len 1K,4096 --memory-fraction 0.75"
    )
    assert isinstance(table, PlanTable)
    assert table.header[:2] == ("device_memory", "max_model_len")
    assert [row.fits for row in table.rows] == [False, False, True, True]
    assert {row.figures.fraction for row in table.rows} == {0.75}
    with pytest.raises(ConfigError, match="device-memory"):
        line(engine_shell, f"plan {tmp_path} --device-memory 1GB,many")


@pytest.mark.usefixtures("in_force")
def test_without_a_model_flags_ask_what_the_plan_in_force_would_be(shell: Any) -> None:
    assert line(shell, "plan") is PLAN
    longer = line(shell, "plan --max-model-len 1K --gpu-memory-utilization 0.75")
    assert isinstance(longer, MemoryPlan)
    assert (longer.max_model_len, longer.fraction) == (1024, 0.75)
    table = line(shell, "plan --max-num-seqs 1,2,auto --max-model-len 1K --kv-cache-dtype float32")
    assert [row.settings for row in table.rows] == [{"max_num_seqs": n} for n in ("1", "2", "auto")]
    assert [row.plan.max_num_seqs for row in table.rows] == [1, 2, 46]
    assert {row.plan.per_block_bytes for row in table.rows} == {2 * PLAN.per_block_bytes}


@pytest.mark.usefixtures("in_force")
def test_what_the_plan_in_force_cannot_say_asks_for_a_model(shell: Any) -> None:
    for flag in ("block-size 8", "device-memory 5GB", "max-num-batched-tokens 5"):
        with pytest.raises(UnsupportedOptionError, match=f"--{flag.split()[0]}.*plan MODEL"):
            line(shell, f"plan --{flag}")
    with pytest.raises(ConfigError, match="gpu-memory-utilization"):
        line(shell, "plan --gpu-memory-utilization 7")


def test_the_help_says_that_values_may_be_listed(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line(shell, "plan --help")
    assert "--max-model-len 32K,64K" in capsys.readouterr().out
