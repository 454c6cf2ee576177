"""A paged-attention engine on MLX that lives in the calling process. Imports no IPython.

>>> from engine import LLM, SamplingParams
>>> llm = LLM(model="smollm2", max_model_len=2048)
>>> llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))

Importing this package is cheap: names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.chat.parse_output import parse_output
    from engine.llm import LLM
    from engine.memory.plan import MemoryPlan
    from engine.outputs import CompletionDelta, CompletionOutput, Reply, RequestOutput
    from engine.params.sampling_params import SamplingParams, StructuredOutputsParams
    from engine.planning import plan, plan_table

_HOMES = {
    "LLM": "engine.llm",
    "MemoryPlan": "engine.memory.planner",
    "parse_output": "engine.chat.parse_output",
    "plan": "engine.planning",
    "plan_table": "engine.planning",
    "SamplingParams": "engine.params.sampling_params",
    "StructuredOutputsParams": "engine.params.sampling_params",
    "CompletionDelta": "engine.outputs",
    "CompletionOutput": "engine.outputs",
    "Reply": "engine.outputs",
    "RequestOutput": "engine.outputs",
}

__all__ = [
    "LLM",
    "CompletionDelta",
    "CompletionOutput",
    "MemoryPlan",
    "Reply",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "parse_output",
    "plan",
    "plan_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
