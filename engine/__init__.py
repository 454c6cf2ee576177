"""A paged-attention engine on MLX that lives in the calling process. Imports no IPython.

>>> from engine import LLM, SamplingParams
>>> llm = LLM(model="smollm2", max_model_len=2048)
>>> llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2))[0].outputs[0].text
' Paris.'
>>> llm.close()

Importing this package is cheap: names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.chat.parse_output import parse_output
    from engine.checkup.doctor import doctor
    from engine.errors import (
        ConfigError,
        ContextLengthError,
        DeviceFailedError,
        EngineClosedError,
        GenerationError,
        GrammarError,
        MemoryInUseError,
        MemoryPlanError,
        ModelLoadError,
        ModelNotFoundError,
        OutOfMemoryError,
        OwnThreadError,
        RequestError,
        ServerError,
        UnknownModelError,
        UnknownResponseError,
        UnsupportedOptionError,
        VMMagicError,
    )
    from engine.llm import LLM
    from engine.memory.plan import MemoryPlan
    from engine.model_card.card import ModelCard
    from engine.model_card.inspection import inspect
    from engine.outputs import CompletionDelta, CompletionOutput, Reply, RequestOutput
    from engine.params.sampling_params import SamplingParams, StructuredOutputsParams
    from engine.planning import plan, plan_table

__all__ = [
    "LLM",
    "CompletionDelta",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "DeviceFailedError",
    "EngineClosedError",
    "GenerationError",
    "GrammarError",
    "MemoryInUseError",
    "MemoryPlan",
    "MemoryPlanError",
    "ModelCard",
    "ModelLoadError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "OwnThreadError",
    "Reply",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ServerError",
    "StructuredOutputsParams",
    "UnknownModelError",
    "UnknownResponseError",
    "UnsupportedOptionError",
    "VMMagicError",
    "doctor",
    "inspect",
    "parse_output",
    "plan",
    "plan_table",
]

_HOMES = {
    "engine.chat.parse_output": ("parse_output",),
    "engine.checkup.doctor": ("doctor",),
    "engine.llm": ("LLM",),
    "engine.memory.plan": ("MemoryPlan",),
    "engine.model_card.card": ("ModelCard",),
    "engine.model_card.inspection": ("inspect",),
    "engine.outputs": (
        "CompletionDelta",
        "CompletionOutput",
        "Reply",
        "RequestOutput",
    ),
    "engine.params.sampling_params": (
        "SamplingParams",
        "StructuredOutputsParams",
    ),
    "engine.planning": (
        "plan",
        "plan_table",
    ),
}
"""Where the names are; those of errors are all in :mod:`engine.errors`."""

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = next((module for module, names in _HOMES.items() if name in names), "engine.errors")
        return getattr(import_module(home), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
