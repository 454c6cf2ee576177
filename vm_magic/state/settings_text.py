"""Reads ``temperature=0.2 stop=["a b"]``: the words after ``%vllm_metal set``."""

import ast
import json
import re
from typing import Any

from engine.errors import ConfigError, RequestError
from engine.format.names import did_you_mean
from engine.params.sampling_params import PARAMETERS, names_of
from engine.params.settings import MODEL_PRESET, THINKING_NAMES, preset_values

_KEY = re.compile(r"\s*([A-Za-z_][\w-]*)\s*=(?:\s+(?=\S)(?![A-Za-z_][\w-]*\s*=))?")
MEMORY_NAMES = ("memory_fraction", "max_model_len", "max_num_seqs")
"""Names that ``set`` takes for a loaded model's memory plan."""
SETTABLE = ("preset", *names_of(lambda known: known.settable), *THINKING_NAMES)
"""Names that ``set`` takes: a preset's, those of sampling values, and two about thinking."""


def read_settings(text: str) -> dict[str, Any]:
    """``KEY=VALUE …`` as typed values; an empty value or ``none`` removes a setting.

    Values are JSON, Python literals or plain words. Raises ConfigError or RequestError naming the key.
    """
    values: dict[str, Any] = {}
    position = 0
    while text[position:].strip():
        found = _KEY.match(text, position)
        if not found:
            raise ConfigError(
                f"set {text[position:].strip()!r}: expected KEY=VALUE, such as temperature=0.2", flag="set"
            )
        name = found[1].replace("-", "_")
        name = "memory_fraction" if name == "gpu_memory_utilization" else name
        value, position = _read_value(text, found.end())
        values[name] = check_setting(name, value)
    return values


def _read_value(text: str, start: int) -> tuple[Any, int]:
    rest = text[start:]
    if not rest or rest[0].isspace():
        return None, start
    for read in (_json_value, _quoted_value):
        found = read(rest)
        if found is not None and (found[1] == len(rest) or rest[found[1]].isspace()):
            return found[0], start + found[1]
    word = rest.split()[0]
    if word.lower() in ("none", "null", "default"):
        return None, start + len(word)
    if word.lower() in ("true", "false"):
        return word.lower() == "true", start + len(word)
    return word, start + len(word)


def _json_value(text: str) -> tuple[Any, int] | None:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    return value, end


def _quoted_value(text: str) -> tuple[Any, int] | None:
    found = re.match(r"'(?:\\.|[^'\\])*'|\[[^\]]*\]", text)
    if not found:
        return None
    try:
        return ast.literal_eval(found[0]), found.end()
    except (ValueError, SyntaxError):
        return None


def check_setting(name: str, value: Any) -> Any:
    """``value`` if setting ``name`` can have it (None removes it). Raises ConfigError or RequestError."""
    if name in MEMORY_NAMES:
        return _memory_value(name, value)
    if name not in SETTABLE:
        known = (*SETTABLE, *MEMORY_NAMES)
        hint = did_you_mean(name, known, f"there are: {', '.join(known)}")
        raise ConfigError(f"{name} is not a setting; {hint}", flag=name)
    if name == "preset":
        preset_values(str(value or MODEL_PRESET))
        return str(value or MODEL_PRESET)
    if value is None or name in THINKING_NAMES:
        return value  # Settings checks the latter
    kind = PARAMETERS[name].kind
    if not kind.takes_setting(value):
        raise RequestError(f"{name} must be {kind.setting}, got {value!r}.", param=name)
    return value


def _memory_value(name: str, value: Any) -> Any:
    """The value of an engine flag, read and checked as ``load`` would."""
    if value is None:
        raise ConfigError(f"{name} needs a value, such as {name}=auto", flag=name)
    from engine.params.engine_args import EngineArgs

    args = EngineArgs.from_options("set", {name: str(value)}, env={})
    return args.gpu_memory_utilization if name == "memory_fraction" else getattr(args, name)
