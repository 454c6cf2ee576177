"""Rotary embeddings as ``config.json`` tells them: every spelling is read, and every one that mlx-lm reads is written.

transformers 5 keeps the base and the scaling in ``rope_parameters``, for all layers or by kind of layer; before it
they were ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor`` and names of single models. Each of mlx-lm's
models reads one of these, and takes its own default where it finds nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from engine.errors import ModelLoadError

ALL, FULL, SLIDING = "", "full_attention", "sliding_attention"
"""Kinds of layers; ``ALL`` where settings hold for every one."""
TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
"""Types of scaling, in transformers' words."""
_OLDER_TYPES = {
    "su": "longrope",
    "deepseek_yarn": "yarn",
    "telechat3-yarn": "yarn",
    "mrope": "default",  # its sections tell places in pictures apart: a text's are the same in all three
}
ORIGINAL_LENGTH_KEY = "original_max_position_embeddings"
_WITH_ORIGINAL = ("yarn", "longrope", "llama3")
"""Types that follow from the length before scaling."""
LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Names of the most tokens of a sequence, by model."""
_MAIN_BASES = ("rope_theta", "rotary_emb_base")
_SLIDING_BASES = ("rope_local_base_freq", "swa_rope_theta", "rope_local_theta", "local_rope_theta")
"""Older names of the base of layers with a window, each of single models."""
BASE_KEYS = (*_MAIN_BASES, *_SLIDING_BASES)
PART_KEYS = ("partial_rotary_factor", "rotary_pct")
TYPE_KEYS = ("rope_type", "type")
_OWN_WORDS = (*TYPE_KEYS, "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary embedding of layers of one kind.

    ``base`` None: the model's own default. ``parameters`` are those of the ``type`` (``factor`` …). ``part`` is how
    much of a head turns, None where other entries of the configuration tell it.
    """

    base: float | None
    type: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    part: float | None = None

    @property
    def factor(self) -> float:
        """By how much lengths are stretched."""
        return float(self.parameters.get("factor") or 1.0)

    @property
    def original_length(self) -> int:
        """Tokens of a sequence before stretching, 0 where the type does not depend on it."""
        return int(self.parameters.get(ORIGINAL_LENGTH_KEY) or 0)

    def describe(self) -> str:
        """``yarn by 4 over 32768 tokens, base 1000000, 0.5 of each head``."""
        words = [self.type]
        if "factor" in self.parameters:
            words.append(f"by {self.factor:g}")
        if self.original_length:
            words.append(f"over {self.original_length} tokens")
        more = [] if self.base is None else [f"base {self.base:.12g}"]
        if self.part not in (None, 1.0):
            more.append(f"{self.part:g} of each head")
        return ", ".join([" ".join(words), *more])

    @property
    def by_alpha(self) -> bool:
        """Whether it is Hunyuan's ``dynamic``: a base raised once and for all."""
        return self.type == "dynamic" and bool(self.parameters.get("alpha"))


def rope_settings(config: Mapping[str, Any]) -> dict[str, Rope]:
    """By kind of layer, as ``config`` (of the language model alone) tells in any spelling; {} where it tells nothing.

    Raises :class:`ModelLoadError` for a type that is not known.
    """
    flat, nested = _stated(config)
    base = _number(config, _MAIN_BASES)
    part = _number(config, PART_KEYS)
    if nested:
        if part is None and any("partial_rotary_factor" in own for own in nested.values()):
            part = 1.0  # of the kinds that tell none
        return {kind: _rope({"rope_theta": base, **own}, config, part) for kind, own in nested.items()}
    sliding = _number(config, _SLIDING_BASES)
    if not flat and base is None and part is None and sliding is None:
        return {}
    whole = _rope({"rope_theta": base, **flat}, config, part, over=config.get(ORIGINAL_LENGTH_KEY))
    if sliding is None:
        return {ALL: whole}
    return {FULL: whole, SLIDING: Rope(sliding, part=whole.part)}


def main_rope(settings: Mapping[str, Rope]) -> Rope | None:
    """That of the layers which see the whole sequence."""
    return settings.get(ALL) or settings.get(FULL) or next(iter(settings.values()), None)


def with_rope(config: Mapping[str, Any], max_model_len: int | None = None) -> dict[str, Any]:
    """``config`` (of the language model alone) with its RoPE in all spellings that mlx-lm's models read.

    ``max_model_len``: the longest sequence that will be asked for, where the user named one.
    """
    settings = rope_settings(config)
    main = main_rope(settings)
    if main is None:
        return dict(config)
    settings = {kind: _for_length(rope, config, max_model_len) for kind, rope in settings.items()}
    main = main_rope(settings) or main
    written = {**config, "rope_scaling": _scaling(main, config), "rope_parameters": _parameters(settings, main, config)}
    if main.type == "longrope":
        written[ORIGINAL_LENGTH_KEY] = main.original_length
    if main.base is not None:
        written |= {"rope_theta": main.base, "rotary_emb_base": main.base}
        if isinstance(config.get("attn_config"), Mapping):  # DBRX
            written["attn_config"] = {**config["attn_config"], "rope_theta": main.base}
    if main.part is not None and all(rope.part == main.part for rope in settings.values()):
        written |= dict.fromkeys(PART_KEYS, main.part)
        if isinstance(config.get("head_dim"), int):
            written.setdefault("rotary_dim", int(config["head_dim"] * main.part))
    sliding = settings.get(SLIDING)
    if sliding is not None and sliding.base is not None:
        written |= dict.fromkeys(_SLIDING_BASES, sliding.base)
    return written


def _stated(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """What holds for all layers, and what by kind of layer. ``rope_scaling``, the older word, wins over the newer."""
    newer, older = (_mapping(config.get(name)) for name in ("rope_parameters", "rope_scaling"))
    nested = {kind: own for kind, own in {**newer, **older}.items() if isinstance(own, Mapping)}
    flat = {name: value for name, value in newer.items() if not isinstance(value, Mapping) and value is not None}
    scaling = {name: value for name, value in older.items() if not isinstance(value, Mapping) and value is not None}
    if scaling:
        flat = {name: value for name, value in flat.items() if name not in TYPE_KEYS} | scaling
        if FULL in nested and not newer.keys() & set(TYPE_KEYS):
            nested[FULL] = {**nested[FULL], **scaling}
    return flat, nested


def _rope(words: Mapping[str, Any], config: Mapping[str, Any], part: float | None, over: Any = None) -> Rope:
    """Settings from the words of one dictionary. ``over``: the length before scaling, where it stands beside them."""
    named = words.get("rope_type") or words.get("type") or "default"
    kind = _OLDER_TYPES.get(str(named), str(named))
    if kind not in TYPES:
        raise ModelLoadError(f"RoPE type {named!r} in config.json is not known ({', '.join(TYPES)} are)")
    parameters = {name: value for name, value in words.items() if name not in _OWN_WORDS and value is not None}
    longest = _number(config, LENGTH_KEYS)
    if kind in _WITH_ORIGINAL:
        parameters[ORIGINAL_LENGTH_KEY] = over or parameters.get(ORIGINAL_LENGTH_KEY) or longest
        if kind != "llama3" and "factor" not in parameters and longest and parameters[ORIGINAL_LENGTH_KEY]:
            parameters["factor"] = longest / parameters[ORIGINAL_LENGTH_KEY]
    base, own_part = _number(words, ("rope_theta",)), _number(words, ("partial_rotary_factor",))
    return Rope(base, kind, MappingProxyType(parameters), part if own_part is None else own_part)


def _for_length(rope: Rope, config: Mapping[str, Any], max_model_len: int | None) -> Rope:
    """``longrope`` turns short sequences by other factors; mlx-lm has one set, so the longest sequence decides."""
    longest = max_model_len or _number(config, LENGTH_KEYS) or 0
    if rope.type != "longrope" or longest > rope.original_length or "short_factor" not in rope.parameters:
        return rope
    told = rope.parameters
    short = {f"long_{name}": told[f"short_{name}"] for name in ("factor", "mscale") if f"short_{name}" in told}
    return replace(rope, parameters={**told, **short})


def _scaling(rope: Rope, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_scaling`` as mlx-lm's models read it; None without any.

    So ``dynamic`` is, too: up to the stated length it leaves everything alone, and longer contexts are not offered,
    since it would turn by other angles what is cached already.
    """
    if rope.type == "default" or (rope.type == "dynamic" and not rope.by_alpha):
        return _NEUTRAL.get(str(config.get("model_type")))
    words = dict(rope.parameters)
    if "factor" in words:
        words["factor"] = float(words["factor"])
    return {**words, "type": rope.type, "rope_type": rope.type}


_NO_SCALING = {"type": "default", "rope_type": "default", "factor": 1.0}
_NEUTRAL = {"deepseek_v2": _NO_SCALING, "minicpm3": _NO_SCALING}
"""Of model files that fail without any scaling: one that changes nothing."""


def _parameters(settings: Mapping[str, Rope], main: Rope, config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters``: the main ones, and beside them those of each kind of layer, for readers of either form."""
    kinds = _kinds(config) if settings.keys() == {ALL} else settings.keys()
    flat = {
        name: value for name, value in _mapping(config.get("rope_parameters")).items() if not isinstance(value, Mapping)
    }
    nested = {kind: _words(settings.get(kind, main)) for kind in kinds}
    return {**flat, **_words(main), **nested}


def _words(rope: Rope) -> dict[str, Any]:
    kind = "default" if rope.type == "dynamic" and not rope.by_alpha else rope.type
    own = {"rope_theta": rope.base, "partial_rotary_factor": rope.part, "rope_type": kind, "type": kind}
    return {name: value for name, value in {**rope.parameters, **own}.items() if value is not None}


def _kinds(config: Mapping[str, Any]) -> Iterable[str]:
    listed = config.get("layer_types")
    return dict.fromkeys(kind for kind in listed if isinstance(kind, str)) if isinstance(listed, list) else ()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(words: Mapping[str, Any], names: Iterable[str]) -> float | None:
    """The first of ``names`` that is a number in ``words``."""
    values = (words.get(name) for name in names)
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def rope_note(config: Mapping[str, Any], context_length: int) -> str | None:
    """A line for the user where what is run is not what every length would be run with."""
    main = main_rope(rope_settings(config))
    if main is not None and main.type == "dynamic" and not main.by_alpha:
        return f"RoPE dynamic: contexts end at {context_length} tokens, from where it would turn cached keys anew"
    if main is None or main.type != "longrope" or context_length <= main.original_length:
        return None
    return (
        f"RoPE longrope: turned as for sequences over {main.original_length} tokens, shorter ones too; "
        f"with --max-model-len {main.original_length} or less as for short ones"
    )
