"""■ before each call of a function of ours in a command, one after the other: no request or model is left over."""

import threading
from pathlib import Path
from typing import Any

import pytest

import vm_magic
from tests.engine.faults.calls import Interrupts
from tests.engine.faults.scenes import assert_goes_on, is_idle
from tests.nightly import size
from tests.vm_magic.helpers import line

pytestmark = [
    pytest.mark.nightly,
    # Python loses an interrupt that comes while it clears away a generator.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
COMMANDS = {
    "chat": ["chat --new -t 0 --max-tokens 60 Hi"],
    "complete": ["complete -t 0 --max-tokens 60 Hi"],
    "score": ["score Once upon a time"],
    "set": ["set memory_fraction=0.4 temperature=0.3", "set memory_fraction=0.5"],
    "port": ["serve --port 0", "stop"],
    "unload": ["unload"],
}


def load(shell: Any, model: Path) -> None:
    line(shell, f"load {model} --max-model-len 256 --gpu-memory-utilization 0.5 --served-model-name tiny")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_leaves_nothing_that_runs_unseen(
    engine_shell: Any, tiny_model_dir: Any, name: str
) -> None:
    model: Path = tiny_model_dir("llama", num_hidden_layers=2)
    load(engine_shell, model)
    interrupts = Interrupts()

    def run() -> None:
        for command in COMMANDS[name]:
            line(engine_shell, command)

    total = interrupts.count(run)
    for number in range(0, total, size(max(1, total // 4), 1)):
        load(engine_shell, model)
        interrupts.interrupt(run, number)
        load(engine_shell, model)
        llm: Any = vm_magic.current()
        assert is_idle(llm), f"a request goes on: {interrupts.at}"
        assert_goes_on(llm, str(model))
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("vm-engine") == 1, interrupts.at
        assert names.count("openai-port") == (llm.server is not None), interrupts.at
