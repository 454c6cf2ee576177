"""Engine options: vLLM's flags with their types, environment variables and checks.

:class:`EngineArgs` is what a user may say; it is frozen and validated once. What is measured or
derived (the memory plan, the element type chosen for a device) never lands in it.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from engine.errors import ConfigError
from engine.format.text import shortened
from engine.params.attention_backend import ATTENTION_BACKENDS, attention_backend
from engine.params.device import device_name
from engine.params.flag_values import (
    Auto,
    fraction_or_auto,
    human_int,
    int_or_auto,
    json_object,
    modality_limits,
    reasoning_config,
)
from engine.params.kv_dtype import KV_CACHE_DTYPES, kv_cache_dtype
from engine.params.sampling_defaults import check_override
from engine.params.vllm_flags import check_vllm_flag, refuse_flag

DEFAULT_MEMORY_FRACTION = 0.90
DEFAULT_BLOCK_SIZE = 16
MAX_NUM_SEQS_LIMIT = 256
DTYPES = ("auto", "float32", "float16", "bfloat16")
CONTENT_FORMATS = ("auto", "string", "openai")


@dataclass(frozen=True)
class Flag:
    """One engine option as a flag: ``--name``; ``parse`` turns its text into the field's value."""

    field: str
    parse: Callable[[str], Any]
    help: str
    metavar: str = ""
    env: str = ""
    kind: Literal["value", "switch", "list"] = "value"
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The flag as typed, without dashes: ``max-model-len``."""
        return self.field.replace("_", "-")


ENGINE_FLAGS: tuple[Flag, ...] = (
    Flag("max_model_len", int_or_auto, "context length in tokens: 32768, 32K = 32768, or auto", "N"),
    Flag(
        "gpu_memory_utilization",
        fraction_or_auto,
        "share of the device's memory that the engine may use: auto (0.90) or (0, 1]",
        "F",
        env="VLLM_METAL_MEMORY_FRACTION",
        aliases=("memory-fraction",),
    ),
    Flag("max_num_seqs", int_or_auto, "most requests running at once, or auto", "N"),
    Flag("max_num_batched_tokens", human_int, "most tokens computed in one step", "N"),
    Flag("block_size", int, "tokens per KV block", "N"),
    Flag("enable_prefix_caching", bool, "reuse the KV blocks of equal prompt beginnings", kind="switch"),
    Flag(
        "kv_cache_dtype",
        kv_cache_dtype,
        "how KV pages are kept: auto (the model's own element type), float32, float16, bfloat16, or quantized to int8 "
        "or int4 (a quarter to a seventh of float32's memory, a half to a quarter of bfloat16's; int4 changes replies)",
        choices=KV_CACHE_DTYPES,
    ),
    Flag(
        "attention_backend",
        attention_backend,
        "how attention reads KV pages: by GPU kernels, in place (paged); gathered, by MLX's own attention, without "
        "kernels of this project (reference); or by kernels wherever they cover the model and are right here (auto)",
        env="VLLM_METAL_ATTENTION_BACKEND",
        choices=ATTENTION_BACKENDS,
    ),
    Flag(
        "device", device_name, "where it computes: auto, cpu, gpu, metal, cuda, or one GPU of several, cuda:1", "NAME"
    ),
    Flag("dtype", str, "element type of weights and activations", choices=DTYPES),
    Flag("seed", int, "seed of requests without one of their own", "N"),
    Flag("revision", str, "branch, tag or commit of a hub model", "REV"),
    Flag("tokenizer", str, "tokenizer folder or hub id, if not the model's own", "PATH"),
    Flag("hf_config_path", str, "folder or hub id of config.json, if not the model's own", "PATH"),
    Flag("served_model_name", str, "name that clients use; may be repeated", "NAME", kind="list"),
    Flag("trust_remote_code", bool, "run Python files that come with the model (off by default)", kind="switch"),
    Flag("generation_config", str, "sampling defaults: auto (the model's), vllm (none) or a folder", "auto|vllm|DIR"),
    Flag("override_generation_config", json_object, "sampling defaults and end tokens set over the model's", "JSON"),
    Flag(
        "chat_template",
        str,
        "chat template: a file, the Jinja text itself, or the name of one of the model's",
        "FILE|TEXT|NAME",
    ),
    Flag(
        "chat_template_content_format",
        str,
        "whether the template gets content as a string or as OpenAI's parts: auto reads it from the template",
        choices=CONTENT_FORMATS,
    ),
    Flag("default_chat_template_kwargs", json_object, "variables that every chat template gets", "JSON"),
    Flag(
        "reasoning_parser", str, "how thoughts are marked: qwen3, gemma4 … or none (default: from the template)", "NAME"
    ),
    Flag("tool_call_parser", str, "how tool calls are written: hermes … or none (default: from the template)", "NAME"),
    Flag(
        "enable_auto_tool_choice",
        bool,
        "let the model decide to call tools (on if there is a parser for them)",
        kind="switch",
    ),
    Flag(
        "reasoning_config", reasoning_config, "reasoning_start_str and reasoning_end_str for thinking budgets", "JSON"
    ),
    Flag("limit_mm_per_prompt", modality_limits, "image=0,audio=0 (this engine serves text)", "LIMITS"),
)


@dataclass(frozen=True)
class EngineArgs:
    """Everything a user may say about a model and its engine. Names are vLLM's."""

    model: str
    max_model_len: int | Auto | None = None
    gpu_memory_utilization: float | Auto = "auto"
    max_num_seqs: int | Auto = "auto"
    max_num_batched_tokens: int | None = None
    """None: 2048 on GPUs, 512 on CPUs, where a longer chunk would only delay other requests."""
    block_size: int = DEFAULT_BLOCK_SIZE
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"
    attention_backend: str = "auto"
    """``paged`` insists on kernels: a load where no layer can take them is refused."""
    device: str = "auto"
    """A process computes on one GPU: the first load or plan that names one decides."""
    dtype: str = "auto"
    seed: int | None = None
    revision: str | None = None
    tokenizer: str | None = None
    hf_config_path: str | None = None
    served_model_name: tuple[str, ...] = ()
    trust_remote_code: bool = False
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    chat_template_content_format: str = "auto"
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_parser: str | None = None
    """None: chosen from the chat template; "none": no parser. ``tool_call_parser`` likewise."""
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool | None = None
    """None: on where a tool parser was given or found."""
    reasoning_config: Mapping[str, Any] = field(default_factory=dict)
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    use_paged_attention: bool = True
    memory_flag: str = "gpu_memory_utilization"
    """The name under which the user set the fraction, for error messages."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("no model given: name one, for example smollm2", flag="model")
        names: str | Sequence[str] | None = self.served_model_name
        object.__setattr__(self, "served_model_name", (names,) if isinstance(names, str) else tuple(names or ()))
        self._check_range("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, low_open=True)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            self._check_range(name, getattr(self, name), 1, None)
        for name in _MOST:
            _check_size(name, getattr(self, name))
        if self.block_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            raise self._outside("block_size", self.block_size, "a power of two from 1 to 256")
        if self.dtype not in DTYPES:
            raise self._outside("dtype", self.dtype, "one of " + ", ".join(DTYPES))
        if self.chat_template_content_format not in CONTENT_FORMATS:
            given, allowed = self.chat_template_content_format, "one of " + ", ".join(CONTENT_FORMATS)
            raise self._outside("chat_template_content_format", given, allowed)
        object.__setattr__(self, "device", device_name(self.device))
        object.__setattr__(self, "kv_cache_dtype", kv_cache_dtype(self.kv_cache_dtype))
        object.__setattr__(self, "attention_backend", attention_backend(self.attention_backend))
        self._check_pages("kv_cache_dtype", self.kv_cache_dtype, needs_pages=self.kv_cache_dtype != "auto")
        self._check_pages("attention_backend", self.attention_backend, needs_pages=self.attention_backend == "paged")
        check_batch(self.max_num_seqs, self.max_num_batched_tokens)
        check_override(self.override_generation_config)
        if any(count > 0 for count in self.limit_mm_per_prompt.values()):
            raise ConfigError(
                f"--limit-mm-per-prompt {dict(self.limit_mm_per_prompt)}: this engine serves text only; "
                "use image=0,audio=0 or leave the flag out",
                flag="limit_mm_per_prompt",
                value=dict(self.limit_mm_per_prompt),
                allowed="0",
            )

    def _check_pages(self, name: str, value: str, *, needs_pages: bool) -> None:
        if needs_pages and not self.use_paged_attention:
            by_variable = " (or VLLM_METAL_ATTENTION_BACKEND)" if name == "attention_backend" else ""
            raise ConfigError(
                f"--{name.replace('_', '-')} {value}{by_variable} needs pages, and VLLM_METAL_USE_PAGED_ATTENTION=0 "
                "turns them off: leave one of the two out",
                flag=name,
                value=value,
                allowed="auto",
            )

    def _check_range(self, name: str, value: object, low: float, high: float | None, *, low_open: bool = False) -> None:
        if value is None or value == "auto":
            return
        allowed = f"{'(' if low_open else '['}{low}, {high}]" if high is not None else f"at least {low}, or auto"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._outside(name, value, allowed)
        inside = low < value or (value == low and not low_open)  # NaN is nowhere
        if not inside or (high is not None and value > high):
            raise self._outside(name, value, allowed)

    def _outside(self, name: str, value: object, allowed: str) -> ConfigError:
        said = f"--{name.replace('_', '-')} {value}"
        if name == "gpu_memory_utilization":  # said as the user said it: another flag, or a variable
            name = self.memory_flag
            no_flag = name.isupper() or name == "fraction"
            said = f"{name}={value}" if no_flag else f"--{name.replace('_', '-')} {value}"
        return ConfigError(f"{said}: must be {allowed}", flag=name, value=value, allowed=allowed)

    @property
    def memory_fraction(self) -> float:
        """The fraction, :data:`DEFAULT_MEMORY_FRACTION` for ``auto``."""
        value = self.gpu_memory_utilization
        return DEFAULT_MEMORY_FRACTION if value == "auto" else float(value)

    def with_memory(
        self,
        fraction: float | Auto | None,
        max_model_len: int | Auto | None = None,
        max_num_seqs: int | Auto | None = None,
        flag: str = "memory_fraction",
    ) -> Self:
        """The arguments after a change of memory; None leaves a value. ``flag``: the fraction's name."""
        given = {"gpu_memory_utilization": fraction, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        changed = {name: option_value(name, value) for name, value in given.items() if value is not None}
        if fraction is not None:
            changed["memory_flag"] = flag
        return replace(self, **changed)

    def batched_tokens(self, chunk_size: int) -> int:
        """Most tokens in one step, where a device prefers ``chunk_size``: one at least for each sequence."""
        fewest = 1 if self.max_num_seqs == "auto" else self.max_num_seqs
        return self.max_num_batched_tokens or max(chunk_size, fewest)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that clients may use, the first of which replies carry."""
        return self.served_model_name or (self.model,)

    @classmethod
    def from_options(
        cls, model: str | os.PathLike[str], options: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> Self:
        """Build from keywords (flag names, dashes or underscores) over ``VLLM_METAL_*`` variables.

        Text values are parsed as the flag's text. Unknown keywords raise
        :class:`UnsupportedOptionError`, bad values :class:`ConfigError`.
        """
        env = os.environ if env is None else env
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = _from_environment(env)
        for name, value in options.items():
            key = name.replace("-", "_")
            if key == "memory_fraction":
                key, values["memory_flag"] = "gpu_memory_utilization", "memory_fraction"
            elif key == "gpu_memory_utilization":
                values["memory_flag"] = key
            if key in ("model", "memory_flag"):
                raise refuse_flag(name)
            if key not in known:
                check_vllm_flag(name, value)
                continue
            values[key] = option_value(key, value)
        return cls(model=model_name(model), **values)


def model_name(model: object) -> str:
    """``model``, a text or a path, as a text. Raises ConfigError for anything else."""
    name: object = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if isinstance(name, str):
        return name
    said = f"a model is a name or a path, not of type {type(model).__name__}"
    raise ConfigError(said, flag="model", value=model, allowed="a name")


_MOST = {"max_model_len": 1 << 40, "max_num_seqs": 1 << 20, "max_num_batched_tokens": 1 << 40, "seed": (1 << 63) - 1}
"""More than can be meant, by option."""


def _check_size(name: str, value: object) -> None:
    most = _MOST.get(name)
    if most is not None and isinstance(value, int) and abs(value) > most:
        said = f"--{name.replace('_', '-')} of {value.bit_length()} bits: must be at most {most}"
        raise ConfigError(said, flag=name, value=value, allowed=f"at most {most}")


def check_batch(max_num_seqs: int | Auto, max_num_batched_tokens: int | None) -> None:
    """Raise ConfigError, in vLLM's words, for more sequences than a step has tokens: some of them would never run."""
    if max_num_batched_tokens is None or max_num_seqs == "auto" or max_num_batched_tokens >= max_num_seqs:
        return
    raise ConfigError(
        f"max_num_batched_tokens ({max_num_batched_tokens}) must be greater than or equal to max_num_seqs "
        f"({max_num_seqs}): raise the first or lower the second",
        flag="max_num_batched_tokens",
        value=max_num_batched_tokens,
        allowed=f"at least {max_num_seqs}",
    )


def option_value(name: str, value: Any) -> Any:
    """The value of an :class:`EngineArgs` field, from its flag's text or as it is. Raises ConfigError."""
    flag = next((flag for flag in ENGINE_FLAGS if flag.field == name), None)
    if value is None:
        return value
    if name == "use_paged_attention" or (flag is not None and flag.kind == "switch"):
        return _switch(name, value)
    if flag is None or flag.kind != "value":
        return _names(name, value) if flag is not None else value
    _check_size(name, value)
    if isinstance(value, bool) or (flag.parse is int and value != _whole(value)):
        allowed = "a whole number" if flag.parse is int else "a value, not true or false"
        raise ConfigError(f"--{flag.name} {value}: must be {allowed}", flag=name, value=value, allowed=allowed)
    try:
        return flag.parse(value)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--{flag.name}: {error}", flag=flag.field, value=value) from None


_SWITCHES = {**dict.fromkeys(("1", "true", "yes", "on"), True), **dict.fromkeys(("0", "false", "no", "off"), False)}


def _switch(name: str, value: object) -> bool:
    """``value`` as a switch; as a text it is no more true than its words are."""
    found = _SWITCHES.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        said = f"--{name.replace('_', '-')} {shortened(str(value), 60)}: must be true or false"
        raise ConfigError(said, flag=name, value=value, allowed="true or false")
    return found


def _whole(value: Any) -> Any:
    """What ``int`` makes of a number; other values are left to who parses them."""
    return int(value) if isinstance(value, float) and math.isfinite(value) else value


def _names(name: str, value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        said = f"--{name.replace('_', '-')} {shortened(str(value), 60)}: must be a text or a list of texts"
        raise ConfigError(said, flag=name, value=value, allowed="texts")
    return value


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """What ``VLLM_METAL_*`` and ``VLLM_*`` variables set, as :class:`EngineArgs` fields."""
    values: dict[str, Any] = {}
    for flag in ENGINE_FLAGS:
        if flag.env and env.get(flag.env):
            values[flag.field] = _from_variable(flag, env[flag.env])
            if flag.field == "gpu_memory_utilization":
                values["memory_flag"] = flag.env
    paged = env.get("VLLM_METAL_USE_PAGED_ATTENTION", "1").strip().lower()
    if paged not in ("0", "1", "true", "false", ""):
        raise ConfigError(
            f"VLLM_METAL_USE_PAGED_ATTENTION={paged}: must be 0 or 1",
            flag="VLLM_METAL_USE_PAGED_ATTENTION",
            value=paged,
            allowed="0 or 1",
        )
    values["use_paged_attention"] = paged not in ("0", "false")
    return values


def _from_variable(flag: Flag, text: str) -> Any:
    """The value of ``flag`` from its variable. Raises ConfigError under the variable's name."""
    try:
        return flag.parse(text)
    except ValueError as error:
        why = str(error).removeprefix(f"--{flag.name} {text}: ")
        kind, allowed = (type(error), error.allowed) if isinstance(error, ConfigError) else (ConfigError, "")
        raise kind(f"{flag.env}={text}: {why}", flag=flag.env, value=text, allowed=allowed) from None
