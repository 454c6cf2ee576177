"""What is examined beside the installation: a loaded model and its port, as :class:`engine.llm.LLM` has them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.openai.server import ServerHandle
    from engine.runner.kv.attention_path import AttentionPath

_WORD = re.compile(r"[\w.-]{1,40}")


@dataclass(frozen=True)
class Model:
    """A loaded model. ``kind`` is what of it may be told to anybody; counts are of completions."""

    name: str
    kind: str
    closed: bool
    planned: int
    plan_line: str
    attention_paths: "tuple[AttentionPath, ...]"
    server: "ServerHandle | None"
    num_running: int
    num_waiting: int

    @classmethod
    def of(cls, llm: "LLM") -> Self:
        """What is known of ``llm`` without a word to its engine's thread, which may be busy or stand still."""
        running, waiting = (
            int(llm.metrics.registry.get_sample_value(f"vllm:num_requests_{state}", _labels(llm)) or 0)
            for state in ("running", "waiting")
        )
        return cls(
            name=llm.args.names[0],
            kind=f"{llm.resolved.kind}, {_model_type(llm.resolved.path)}",
            closed=llm.closed,
            planned=llm.plan.usable,
            plan_line=llm.plan.log_line(),
            attention_paths=tuple(llm.attention_paths),
            server=llm.server,
            num_running=running,
            num_waiting=waiting,
        )

    def memory_in_use(self) -> int:
        """Bytes that MLX holds in this process."""
        from engine.runner.device.memory import active_memory

        return active_memory()


def _labels(llm: "LLM") -> dict[str, str]:
    return {"model_name": llm.args.names[0], "engine": "0"}


def _model_type(path: Path) -> str:
    """The model type that a folder's configuration names."""
    try:
        said = str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        said = ""
    return said if _WORD.fullmatch(said) else "of a type that is not told"
