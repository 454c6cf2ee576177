"""Named sampling sets, as model makers recommend them: ``%vllm_metal set preset=qwen-thinking``."""

from collections.abc import Mapping
from types import MappingProxyType

from engine.errors import ConfigError

MODEL_PRESET = "model"
"""The name that stands for the model's own ``generation_config.json``."""


def _preset(temperature: float, top_p: float, presence_penalty: float) -> Mapping[str, float]:
    return MappingProxyType(
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 20,
            "min_p": 0.0,
            "presence_penalty": presence_penalty,
            "repetition_penalty": 1.0,
        }
    )


PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "qwen-thinking": _preset(1.0, 0.95, 1.5),
        "qwen-coding": _preset(0.6, 0.95, 0.0),
        "qwen-instruct": _preset(0.7, 0.80, 1.5),
    }
)
"""Qwen's sets for thinking in general, thinking for precise code, and replies without thinking."""

PRESET_FIELDS = frozenset(name for values in PRESETS.values() for name in values)
"""Sampling names that a preset decides."""


def preset_values(name: str) -> Mapping[str, float]:
    """The sampling values of preset ``name``; none for ``model``. Raises ConfigError naming those there are."""
    if name == MODEL_PRESET:
        return {}
    if name not in PRESETS:
        known = ", ".join([*PRESETS, MODEL_PRESET])
        raise ConfigError(f"preset {name!r} is unknown; there are: {known}", flag="preset", value=name, allowed=known)
    return PRESETS[name]
