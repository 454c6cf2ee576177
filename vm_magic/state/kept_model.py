"""What it takes to load a model again as it was, with its port: so that a load that fails does not cost it."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import VMMagicError
from engine.models.local import OFFLINE_VARIABLES
from engine.params.engine_args import ENGINE_FLAGS, EngineArgs

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.openai.server import ServerHandle

_VARIABLES = (
    *(flag.env for flag in ENGINE_FLAGS if flag.env),
    *("VLLM_METAL_USE_PAGED_ATTENTION", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"),
    *OFFLINE_VARIABLES,
)
"""Variables that a load reads: pasted text may have set them for one model only."""


def load_variables() -> dict[str, str | None]:
    """The variables that a load reads, as they are now."""
    return {name: os.environ.get(name) for name in _VARIABLES}


@dataclass(frozen=True)
class KeptModel:
    """A loaded model as the user asked for it, and what became of it since; holds neither weights nor an engine.

    ``asked`` are the arguments of its load, ``options`` the flags that gave them under ``variables``; ``now`` are the
    arguments after memory was changed live. ``server`` is its port's handle.
    """

    asked: EngineArgs
    options: Mapping[str, Any]
    variables: Mapping[str, str | None]
    now: EngineArgs
    pasted_environment: dict[str, str]
    server: "ServerHandle | None"

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.asked.model

    @property
    def command(self) -> str:
        """The line that loads it."""
        return shlex.join(["load", self.name, *_words(self.options)])

    def resume(self, llm: "LLM") -> str:
        """Give ``llm``, just loaded with the same flags, the memory and the port of before; says what came of it."""
        try:
            if self.now != self.asked:
                now = self.now
                llm.replan(
                    fraction=now.gpu_memory_utilization, max_model_len=now.max_model_len, max_num_seqs=now.max_num_seqs
                )
            if self.server is None:
                return f"{self.name} was loaded again"
            llm.serve(**_same_port(self.server))
        except VMMagicError as error:  # such as a port that another program took meanwhile
            return f"{self.name} was loaded again, but not all is as it was: {error}"
        return f"{self.name} was loaded again, and its port {self.server.port} is open"


def add_to_message(error: BaseException, text: str) -> None:
    """Let the line that ``error`` shows end with ``text``; what is not an error of ours gets a note."""
    if not isinstance(error, VMMagicError) or not error.args:
        error.add_note(text)
        return
    message = str(error.args[0])
    error.args = (f"{message}{' ' if message.endswith('.') else '; '}{text}", *error.args[1:])


def _same_port(server: "ServerHandle") -> dict[str, Any]:
    """What opens the port of ``server`` again, for the same clients."""
    wanted = {name: value for name, value in server.wanted.items() if name != "port_is_default"}
    if server.api_key is not None:
        wanted.setdefault("api_key", [server.api_key])
    return {**wanted, "port": server.port}


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """``options`` as flags."""
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
            continue
        yield f"--{flag}"
        if isinstance(value, Mapping):
            yield json.dumps(value)
        elif isinstance(value, list | tuple):
            yield from map(str, value)
        else:
            yield str(value)
