"""``%vllm_metal set memory_fraction=… max_model_len=… max_num_seqs=…`` over the real engine."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from engine import LLM, SamplingParams
from engine.errors import ConfigError, EngineClosedError, MemoryInUseError, RequestError
from tests.vm_magic.helpers import Capture, line
from vm_magic.state.session import current_session


@pytest.fixture
def llm(engine_shell: Any, tiny_model_dir: Any, capsys: Capture) -> Iterator[LLM]:
    line(engine_shell, f"load {tiny_model_dir('llama')} --max-model-len 512 --max-num-seqs 4 --served-model-name t")
    llm = current_session().require()
    capsys.readouterr()
    yield llm
    line(engine_shell, "unload")


def test_memory_changes_live_and_every_view_follows(engine_shell: Any, llm: LLM, capsys: Capture) -> None:
    line(engine_shell, "serve --port 0")
    capsys.readouterr()
    running = llm.submit_prompt([5, 6, 7], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
    next(running)
    line(engine_shell, "set memory_fraction=0.5 max_model_len=256 max_num_seqs=2 temperature=0.3")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [llm.plan.log_line(), "temperature=0.3"]
    assert "fraction=0.50" in printed[0]
    assert (llm.plan.max_model_len, llm.plan.max_num_seqs) == (256, 2)
    assert llm.plan.log_line() in repr(line(engine_shell, "status"))
    assert "--max-model-len 256" in str(line(engine_shell, "export") or capsys.readouterr().out)
    server = current_session().server
    assert server is not None
    cards = httpx.get(f"{server.base_url}/models", headers={"Authorization": f"Bearer {server.api_key}"}).json()
    assert cards["data"][0]["max_model_len"] == 256
    assert len(running.result().outputs[0].token_ids) == 200


def test_all_of_it_or_nothing(engine_shell: Any, llm: LLM) -> None:
    before = llm.plan
    with pytest.raises(RequestError, match="top_p must be in"):
        line(engine_shell, "set memory_fraction=0.5 top_p=2")
    running = llm.submit_prompt(
        [5] * 300, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), request_id="long"
    )
    with pytest.raises(MemoryInUseError, match=r"must end first: long \("):
        line(engine_shell, "set max_model_len=256 temperature=0.3")
    with pytest.raises(ConfigError, match="context length"):
        line(engine_shell, "set max_model_len=1M temperature=0.3")
    assert llm.plan is before
    assert not llm.settings.snapshot()
    running.abort()


def test_without_a_model_there_is_no_memory_to_change(engine_shell: Any) -> None:
    with pytest.raises(EngineClosedError, match="no model is loaded"):
        line(engine_shell, "set max_num_seqs=2")
