"""How far a model reads: its rotary positions, its context, and what each kind of layer keeps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.memory.plan import check_length, layer_ranges
from engine.model_card.architecture import class_default
from engine.model_card.card import Fact
from engine.model_card.model_files import Found, ModelFiles, Words, as_mapping
from engine.models.model_config import context_length, text_config
from engine.models.rope import ALL, LENGTH_KEYS, rope_settings

if TYPE_CHECKING:
    from engine.runner.kv.kv_spec import ModelCaches

_SECTION = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
"""What a rope's own facts show; other parameters follow its type."""
_BASES = ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base")
_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rope_pct")
_STATED_AFTER_SCALING = ("yarn", "longrope", "su", "llama3")
"""Scalings whose original length, times the factor, is what the model was made for."""


@dataclass(frozen=True)
class _Rope:
    """Rotary positions of one type of layer ("": all), each value with where it stands."""

    theta: Found | None
    kind: Found | None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    partial: Found | None = None


def rope(files: ModelFiles) -> Iterator[Fact]:
    """The base, the scaling and the share of a head that turns, by type of layer where these differ."""
    found = read_ropes(files.words) or {"": _Rope(None, None)}
    for layers, one in found.items():
        name = f"{layers}: " if layers else ""
        if one.theta is not None:
            yield Fact(f"{name}base", _plain(one.theta.value), one.theta.source)
        elif (default := class_default(files, "rope_theta")) is not None:
            yield Fact(f"{name}base", default.value, default.source)
        kind = "none" if one.kind is None else str(one.kind.value)
        more = "".join(f", {key} {_shown(value)}" for key, value in one.parameters.items() if key not in _SECTION)
        if one.kind is not None:
            yield Fact(f"{name}scaling", kind + more, one.kind.source)
        if one.partial is not None:
            yield Fact(f"{name}partial rotary", _plain(one.partial.value), one.partial.source)
    yield from _understood(files)
    _note_contradictions(files, found)


def _understood(files: ModelFiles) -> Iterator[Fact]:
    """What the model's layers are made to do, in one line for each kind of them."""
    if files.config is None:
        return
    settings = rope_settings(text_config(files.config.hf_config))
    if len({one.describe() for one in settings.values()}) == 1:
        settings = {ALL: next(iter(settings.values()))}
    for layers, one in settings.items():
        name = "understood" if layers == ALL else f"{layers}: understood"
        yield Fact(name, one.describe(), "mlx-lm's rotary layers, made to do so where they would not")
    for note in files.config.notes:
        files.remark(note)


def read_ropes(words: Words) -> dict[str, _Rope]:
    """What the configuration says of rotary positions, in its own words and whichever spelling it has.

    Kept to this function: the one place to ask another reader of the same entries.
    """
    theta, partial = words.find(*_BASES), words.find(*_PARTIAL)
    entry = words.find("rope_parameters", "rope_scaling")
    settings = as_mapping(entry.value) if entry is not None else {}
    source = "" if entry is None else entry.source
    nested = {str(layers): one for layers, one in settings.items() if isinstance(one, Mapping)}
    if nested:
        return {layers: _of_parameters(one, f"{source}.{layers}", None, partial) for layers, one in nested.items()}
    found = {"": _of_parameters(settings, source, theta, partial)}
    if (local := words.find("rope_local_base_freq")) is not None:
        found = {"full_attention": found[""], "sliding_attention": _Rope(local, None)}
    return {layers: one for layers, one in found.items() if one.theta or one.kind or one.partial}


def _of_parameters(settings: Mapping[str, Any], source: str, theta: Found | None, partial: Found | None) -> _Rope:
    """One rope; what its own settings name comes before what stands beside them."""

    def own(*names: str) -> Found | None:
        return next(
            (Found(settings[name], f"{source}.{name}") for name in names if settings.get(name) is not None), None
        )

    return _Rope(
        own("rope_theta") or theta, own("rope_type", "type"), settings, own("partial_rotary_factor") or partial
    )


def _note_contradictions(files: ModelFiles, ropes: Mapping[str, _Rope]) -> None:
    words = files.words
    outer = words.find(*_BASES)
    for one in ropes.values():
        inner = one.theta
        if len(ropes) == 1 and outer is not None and inner is not None and inner.value != outer.value:
            files.problem(
                f"{inner.source} is {inner.value}, and {outer.source} is {outer.value}: two bases of one rope"
            )
    old, new = words.find("rope_scaling"), words.find("rope_parameters")
    if old is None or new is None or not isinstance(old.value, Mapping) or not isinstance(new.value, Mapping):
        return
    for key in sorted(old.value.keys() & new.value.keys()):
        if old.value[key] != new.value[key]:
            files.problem(
                f"{old.source}.{key} is {_shown(old.value[key])}, and {new.source}.{key} is {_shown(new.value[key])}"
            )


def context(files: ModelFiles) -> Iterator[Fact]:
    """The most tokens of a sequence, and how that number comes about."""
    if files.config is None:
        return
    words, hf_config = files.words, files.config.hf_config
    stated = _stated_length(words)
    scaled = context_length(hf_config)
    source = "no file names a length: vLLM's usual one" if stated is None else stated.source
    if stated is not None and scaled != stated.value:
        yield Fact("stated length", _plain(stated.value), stated.source)
        source = f"{stated.source}, and the rope's scaling"
    if files.config.context_length < scaled:
        source = f"tokenizer_config.json: model_max_length (the model's own {scaled} is longer)"
        files.remark(f"tokenizer_config.json: model_max_length limits the context to {files.config.context_length}")
    yield Fact("context", files.config.context_length, source)
    length = files.config.context_length
    files.attempt("--max-model-len", lambda: check_length(files.args.max_model_len, length))
    _note_scaled_length(files, scaled)


def _stated_length(words: Words) -> Found | None:
    """The least length that is named, which counts."""
    found = [one for key in LENGTH_KEYS if (one := words.find(key)) and isinstance(one.value, int | float)]
    return min(found, key=lambda one: float(one.value), default=None)


def _note_scaled_length(files: ModelFiles, length: int) -> None:
    """A context longer than the scaling reaches is text that the model was never made for."""
    for layers, one in read_ropes(files.words).items():
        original, factor = (one.parameters.get(key) for key in ("original_max_position_embeddings", "factor"))
        if one.kind is None or one.kind.value not in _STATED_AFTER_SCALING:
            continue
        if isinstance(original, int) and isinstance(factor, int | float) and original * factor < length:
            where = f" of {layers}" if layers else ""
            files.remark(
                f"the context is {length}, and the rope's scaling{where} reaches {int(original * factor)} "
                f"({original} × {_shown(factor)}; {one.kind.source.rpartition('.')[0]})"
            )


def caches(files: ModelFiles, found: "ModelCaches", chunk: int) -> Iterator[Fact]:
    """What each kind of layer keeps of a sequence, as the memory plan bills it."""
    source = "mlx-lm's class, asked for its caches"
    for group in found.groups(files.args.block_size, chunk, paged=files.args.use_paged_attention):
        window = f", window {group.reach}" if group.part == "windows" else ""
        per_token = f", {group.bytes_per_token} bytes a token" if group.bytes_per_token else ""
        state = "" if group.bytes_per_token else f", {group.bytes_per_block} bytes a sequence"
        text = f"{_layers(group.layers)}{window}{per_token}{state}"
        yield Fact(group.kind, text, source)
    if found.shared_layers:
        yield Fact("shared", f"{_layers(found.shared_layers)}, which read those before them", source)
    stated = files.words.find("sliding_window", "attention_chunk_size")
    if stated is not None and isinstance(stated.value, int):
        yield Fact("stated window", stated.value, stated.source)
        used = files.words.find("use_sliding_window")
        windowed = used is None or bool(used.value)
        if windowed and not any(group.part == "windows" for group in found.groups(16, chunk, paged=True)):
            files.remark(f"{stated.source} is {stated.value}, and no layer of mlx-lm's class has a window")


def _layers(layers: Sequence[int]) -> str:
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'} ({layer_ranges(layers)})"


def _plain(value: Any) -> str | int | float:
    return value if isinstance(value, int | float | str) else _shown(value)


def _shown(value: Any) -> str:
    """A value in a line: long lists by their ends."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{value[0]}, {value[1]}, … {len(value)} numbers … {value[-1]}]"
    return str(value)
