"""Whether a model's rotary layers turn by the angles that its configuration tells; what they do not, they are made to.

mlx-lm's models read their own choice of entries, and its yarn rounds where a configuration may say not to. What comes
out is compared with what was told, whatever the model file.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, SuScaledRoPE, YarnRoPE
from numpy.typing import NDArray

from engine.errors import ModelLoadError
from engine.models.model_config import ModelConfig, text_config
from engine.models.rope import Rope, rope_settings
from engine.runner.device.host import floats

_TOLERANCE = 1e-4
"""Relative: float32 powers differ between libraries by 1e-6, a rounding of yarn's bounds by 1e-2 and more."""
_FAST, _SLOW = 32.0, 1.0
"""Turns over the original length between which yarn stretches in part, where a configuration gives none."""
_FACTORS = ("mscale", "_scale")
"""Attributes of mlx-lm's layers that queries and keys are multiplied with."""
_HEAD_DIMS = ("head_dim", "global_head_dim", "swa_head_dim")

Angles = tuple[NDArray[np.float64], float]
"""Radians per position of each pair of a head's elements, and what queries and keys are multiplied with."""


def readable_config(config: Mapping[str, Any], arguments: type) -> dict[str, Any]:
    """``config`` as ``arguments`` (mlx-lm's ``ModelArgs`` of its type) take it.

    Without the scaling where they refuse to read it: :func:`honour_rope` puts it in afterwards.
    """
    read = dict(config)
    try:
        arguments.from_dict(read)  # type: ignore[attr-defined]
    except ValueError as error:
        if "rope_scaling" not in str(error):
            raise
        read["rope_scaling"] = None
    return read


def honour_rope(model: nn.Module, config: ModelConfig) -> None:
    """Make the rotary layers of ``model`` turn as ``config`` tells. Raises ModelLoadError where they cannot.

    Where all layers have the same settings and none follows them, all are made to. Where kinds of layers have their
    own, each is made to turn as its kind should, which ``layer_types`` tell; without these it must turn as some kind.
    """
    try:
        _honour(model, config, text_config(config.hf_config))
    except _SettingsError as error:
        raise ModelLoadError(f"{config.name}: {error}") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{config.name}: config.json has a RoPE that cannot be computed ({type(error).__name__}: {error})"
        ) from error


class _SettingsError(ValueError):
    """Settings that no layer can follow."""


def _honour(model: nn.Module, config: ModelConfig, text: Mapping[str, Any]) -> None:
    settings = rope_settings(text)
    layers = list(rotary_layers(model))
    if not layers and any(rope.type not in ("default", "dynamic") for rope in settings.values()):
        raise _refusal(config, settings)
    different: list[Rope] = []
    for rope in settings.values():
        if rope not in different:
            different.append(rope)
    if len(different) == 1 and any(_turns(place.layer, different[0], text) for place in layers):
        return  # a model file that follows the settings in some layers has a way of its own for the others
    for place in layers if settings else ():
        own = different[0] if len(different) == 1 else _settings_of(place, settings, text)
        if any(_turns(place.layer, rope, text) for rope in ([own] if own else different)):
            continue
        if own is None:
            raise _refusal(config, settings)
        _mend(place, own, text)


@dataclass(frozen=True, slots=True)
class _Place:
    """A rotary layer, the module that holds it, its name there, and the number of the decoder's layer."""

    parent: nn.Module
    name: str
    layer: Any
    number: int | None


def _turns(layer: Any, rope: Rope, text: Mapping[str, Any]) -> bool:
    """Whether ``layer`` does what ``rope`` tells."""
    dims = _dims(layer)
    if dims not in _dims_told(rope, text, dims):
        return False
    found, wanted = angles_of(layer), angles_told(rope, dims, getattr(layer, "base", None))
    if wanted is None or found is None:  # the model's own base, or a layer that keeps no angles
        return wanted is None
    return _same(found, wanted)


def _settings_of(place: _Place, settings: Mapping[str, Rope], text: Mapping[str, Any]) -> Rope | None:
    """The settings of a layer's kind; None where it cannot be told."""
    kinds = text.get("layer_types")
    if place.number is None or not isinstance(kinds, list) or place.number >= len(kinds):
        return None
    return settings.get(kinds[place.number])


def angles_of(layer: Any) -> Angles | None:
    """What a rotary layer does; None for one of a class of its own that does not keep its angles."""
    if hasattr(layer, "_freqs"):
        factor = next((float(getattr(layer, name)) for name in _FACTORS if hasattr(layer, name)), 1.0)
        return 1.0 / floats(layer._freqs).astype(np.float64), factor
    if isinstance(layer, nn.RoPE | DynamicNTKScalingRoPE):
        return _plain(float(layer.base), layer.dims) * float(getattr(layer, "scale", 1.0)), 1.0
    return None


def angles_told(rope: Rope, dims: int, base: float | None = None) -> Angles | None:
    """What a layer of ``dims`` elements should do, by transformers' arithmetic; ``base`` where the settings have none.

    None without any base. ``dynamic`` is what it is up to the stated length.
    """
    base = base if rope.base is None else rope.base
    if base is None:
        return None
    if rope.by_alpha:
        base *= float(rope.parameters["alpha"]) ** (dims / (dims - 2))
    scaled = _SCALED.get(rope.type)
    return scaled(replace(rope, base=base), _plain(base, dims)) if scaled else (_plain(base, dims), 1.0)


def _plain(base: float, dims: int) -> NDArray[np.float64]:
    return float(base) ** -(np.arange(0, dims, 2) / dims)


def _linear(rope: Rope, plain: NDArray[np.float64]) -> Angles:
    return plain / rope.factor, 1.0


def _llama3(rope: Rope, plain: NDArray[np.float64]) -> Angles:
    """Long waves are stretched, short ones kept, those between in part."""
    low, high = (float(rope.parameters.get(f"{name}_freq_factor", least)) for name, least in (("low", 1), ("high", 4)))
    kept = np.clip((rope.original_length * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return plain * kept + plain / rope.factor * (1 - kept), 1.0


def _yarn(rope: Rope, plain: NDArray[np.float64]) -> Angles:
    """Dimensions that turn often are kept, slow ones stretched, those between in part."""
    told, dims, base = rope.parameters, 2 * len(plain), rope.base or 0.0

    def dimension(turns: float) -> float:
        return dims * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(told.get("beta_fast") or _FAST), dimension(told.get("beta_slow") or _SLOW)
    if told.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    stretched = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0, 1)
    return plain * (1 - stretched) + plain / rope.factor * stretched, _yarn_factor(rope)


def _yarn_factor(rope: Rope) -> float:
    told = rope.parameters
    if told.get("attention_factor") is not None:
        return float(told["attention_factor"])

    def over(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    return over(float(told.get("mscale", 1))) / over(float(told.get("mscale_all_dim", 0)))


def _longrope(rope: Rope, plain: NDArray[np.float64]) -> Angles:
    """Every dimension by a factor of its own: those for long sequences."""
    told, original = rope.parameters, rope.original_length
    stretched = np.array(told.get("long_factor", ()), np.float64)
    if stretched.shape not in (plain.shape, ()):
        raise _SettingsError(f"RoPE long_factor in config.json has {stretched.size} entries for {len(plain)} angles")
    factor = told.get("long_mscale") or told.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 else 1.0
    return plain / stretched, float(factor)


def _proportional(rope: Rope, plain: NDArray[np.float64]) -> Angles:
    """The first part of a head turns as it would in the whole, the rest does not."""
    turning = int((1.0 if rope.part is None else rope.part) * 2 * len(plain)) // 2
    return np.where(np.arange(len(plain)) < turning, plain / rope.factor, 0.0), 1.0


_SCALED = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def rotary_layers(model: nn.Module) -> Iterator[_Place]:
    """Modules that turn queries and keys."""
    for path, parent in model.named_modules():
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", f"{path}.")
        for name, child in parent.children().items():
            if isinstance(child, nn.Module) and not child.children() and _dims(child):
                yield _Place(parent, name, child, int(number[1]) if number else None)


def _dims(layer: Any) -> int:
    """Elements of a head that a rotary layer turns; 0 for any other layer."""
    if not isinstance(layer, nn.RoPE) and "rope" not in type(layer).__name__.lower() and not hasattr(layer, "_freqs"):
        return 0
    return int(getattr(layer, "dims", 0) or getattr(layer, "dim", 0) or 2 * getattr(layer, "_freqs", mx.zeros(0)).size)


def _dims_told(rope: Rope, text: Mapping[str, Any], dims: int) -> Sequence[int]:
    """How many elements of a head may turn, where it has ``dims`` that do."""
    heads = [text[name] for name in _HEAD_DIMS if isinstance(text.get(name), int)]
    if not heads and text.get("hidden_size") and text.get("num_attention_heads"):
        heads = [text["hidden_size"] // text["num_attention_heads"]]
    if rope.part is None or text.get("qk_rope_head_dim") or not heads:
        return [dims]
    return [head if rope.type == "proportional" else int(head * rope.part) for head in heads]


def _same(one: Angles, other: Angles) -> bool:
    return (
        one[0].shape == other[0].shape
        and bool(np.allclose(one[0], other[0], rtol=_TOLERANCE, atol=1e-12))
        and math.isclose(one[1], other[1], rel_tol=_TOLERANCE)
    )


def _mend(place: _Place, rope: Rope, text: Mapping[str, Any]) -> None:
    """Put what is told in place of what a layer does: exact angles, in mlx-lm's own layer for given ones."""
    layer, dims = place.layer, _dims(place.layer)
    allowed = _dims_told(rope, text, dims)
    dims = dims if dims in allowed else allowed[0]
    angles = angles_told(rope, dims, getattr(layer, "base", None))
    assert angles is not None, "a layer without told angles is not mended"
    attribute = next((name for name in _FACTORS if hasattr(layer, name)), None)
    if not hasattr(layer, "_freqs") or dims != _dims(layer) or (attribute is None and angles[1] != 1.0):
        traditional = getattr(
            layer, "traditional", not isinstance(layer, SuScaledRoPE)
        )  # DeepSeek's own class turns so
        layer, attribute = YarnRoPE(dims, traditional=bool(traditional)), "mscale"
        setattr(place.parent, place.name, layer)
    with np.errstate(divide="ignore"):  # what does not turn has an endless wave
        layer._freqs = mx.array((1.0 / angles[0]).astype(np.float32))
    if attribute is not None:
        setattr(layer, attribute, angles[1])


def _refusal(config: ModelConfig, settings: Mapping[str, Rope]) -> ModelLoadError:
    ropes = "; ".join(dict.fromkeys(rope.describe() for rope in settings.values()))
    return ModelLoadError(
        f"{config.name}: its configuration asks for RoPE {ropes}, which mlx-lm's {config.model_type} does not do; "
        "a newer mlx-lm may"
    )
