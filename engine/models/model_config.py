"""What a model's own files say, as :class:`ModelConfig`: no MLX, no weights read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelLoadError
from engine.models.local import ResolvedModel
from engine.models.pypi import PACKAGE_MODELS
from engine.models.resolve import resolve
from engine.models.rope import LENGTH_KEYS, main_rope, rope_note, rope_settings
from engine.models.spelling import with_every_spelling
from engine.models.weight_format import end_token_ids, read_json
from engine.params.engine_args import EngineArgs

_DEFAULT_CONTEXT_LENGTH = 2048
"""vLLM's, where a model's files give none."""
_LONGEST = (1 << 31) - 1
_USUAL_LENGTHS = {"gemma3": 131072}
"""By model type, where published files omit the length."""


@dataclass(frozen=True)
class ModelConfig:
    """What a model's own files say, in the engine's words. Built by the loader."""

    name: str
    path: Path
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    model_type: str
    sampling_source: str = "generation_config.json"
    """Where the sampling values of ``generation_config`` are: see :class:`SamplingDefaults`."""
    model_card: str = ""
    """Whose model card it is, where that is the source."""
    notes: tuple[str, ...] = ()
    """Lines for the user on how the files were read."""


def read_model_config(resolved: ResolvedModel, args: EngineArgs) -> ModelConfig:
    """Configuration, sampling defaults, end tokens and context length of a model.

    ``--hf-config-path`` replaces its ``config.json``, ``--generation-config`` its sampling defaults.
    """
    told = _hf_config(resolved, args)
    config = _spelled(told, resolved, args)
    own = resolved.format.generation_config(resolved.path)
    packaged = PACKAGE_MODELS.get(resolved.name)
    recommended = packaged.recommended if packaged is not None else {}
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelLoadError(f"{resolved.name}: config.json names no model_type; is this a language model?")
    text = text_config(config)
    vocab_size = int(text.get("vocab_size") or 0)
    length = _length(config, resolved, args)
    return ModelConfig(
        name=resolved.name,
        path=resolved.path,
        hf_config=config,
        generation_config=_generation_config(args.generation_config, {**own, **recommended}),
        context_length=length,
        vocab_size=vocab_size,
        eos_token_ids=_named_end_tokens(args, vocab_size) or end_token_ids(config, own),
        model_type=model_type,
        sampling_source="model card" if packaged else resolved.format.sampling_source,
        model_card=packaged.model_card if packaged else "",
        notes=tuple(filter(None, [rope_note(text_config(told), length)])),
    )


def _spelled(config: dict[str, Any], resolved: ResolvedModel, args: EngineArgs) -> dict[str, Any]:
    try:
        return with_every_spelling(config, _asked_length(args))
    except ModelLoadError as error:
        raise ModelLoadError(f"{resolved.name}: {error}") from None


def _asked_length(args: EngineArgs) -> int | None:
    return args.max_model_len if isinstance(args.max_model_len, int) else None


def _length(config: Mapping[str, Any], resolved: ResolvedModel, args: EngineArgs) -> int:
    """The context length; of a RoPE in its form for short sequences no more than those."""
    length = context_length(config, resolved.format.tokenizer_limit(resolved.path))
    if not 1 <= length <= _LONGEST:
        keys = ", ".join(key for key in LENGTH_KEYS if key in text_config(config))
        raise ModelLoadError(
            f"{resolved.name}: a context of {length:.6g} tokens is not one from 1 to {_LONGEST} ({keys or 'RoPE'}); "
            "fetch config.json again"
        )
    rope, asked = main_rope(rope_settings(text_config(config))), _asked_length(args)
    if rope is not None and rope.type == "longrope" and asked and asked <= rope.original_length:
        return min(length, rope.original_length)
    return length


def _named_end_tokens(args: EngineArgs, vocab_size: int) -> frozenset[int]:
    """Those of ``--override-generation-config``, which take the place of the model's. Raises ConfigError."""
    named = end_token_ids(args.override_generation_config)
    if vocab_size > 0 and max(named, default=0) >= vocab_size:
        raise ConfigError(
            f"--override-generation-config: eos_token_id {max(named)} is out of vocabulary ({vocab_size})",
            flag="override_generation_config",
            value=dict(args.override_generation_config),
        )
    return named


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``config.json`` for the language model: of models that also see or hear, its own come first."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, Mapping) else {})}


def context_length(config: Mapping[str, Any], limit: float = math.inf) -> int:
    """Most tokens of a sequence, as vLLM derives it: the least length named, times the RoPE scaling."""
    text = text_config(config)
    named = [text[key] for key in LENGTH_KEYS if isinstance(text.get(key), int | float)]
    usual = _USUAL_LENGTHS.get(str(config.get("model_type")), _DEFAULT_CONTEXT_LENGTH)
    length = float(min(named, default=usual))
    rope = main_rope(rope_settings(text))
    if rope is not None and "gemma3" not in str(config.get("model_type")):  # its length is after scaling
        if rope.type == "yarn":
            length = (rope.original_length or length) * rope.factor
        elif rope.type == "linear":
            length *= rope.factor
    return int(min(length, limit))


def _hf_config(resolved: ResolvedModel, args: EngineArgs) -> dict[str, Any]:
    if args.hf_config_path is not None:
        given = Path(args.hf_config_path).expanduser()
        file = given if given.is_file() else resolve(args.hf_config_path, part="config").path / "config.json"
        return read_json(file)
    return resolved.format.config(resolved.path)


def _generation_config(choice: str, own: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults: the model's (``auto``), none (``vllm``), or those of a folder."""
    if choice == "auto":
        return own
    if choice == "vllm":
        return {}
    file = Path(choice).expanduser() / "generation_config.json"
    if not file.is_file():
        raise ConfigError(
            f"--generation-config {choice}: no generation_config.json there; use auto, vllm or a folder that has one",
            flag="generation_config",
            value=choice,
            allowed="auto, vllm or a folder",
        )
    return read_json(file)
