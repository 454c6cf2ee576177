"""Where a request's sampling values come from: one order, with the origin of each value kept.

request or magic flag > live settings (panel, ``set``) > preset > ``--override-generation-config`` >
the model's ``generation_config.json`` > vLLM's defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError, RequestError
from engine.params.sampling_params import PARAMETERS, SamplingParams, names_of
from engine.params.settings import Settings

_LOG_ORDER = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""What vLLM's log line names first."""
GENERATION_CONFIG_NAMES = {
    PARAMETERS[name].generation_config: name
    for name in sorted(
        names_of(lambda known: bool(known.generation_config)),
        key=lambda name: _LOG_ORDER.index(name) if name in _LOG_ORDER else len(_LOG_ORDER),
    )
}
"""Names in a generation config, and those that they have here; in the order of vLLM's log line."""

_DEFAULT_SOURCES = ("default", "generation_config.json", "--override-generation-config", "set")


def is_default_source(source: str | None) -> bool:
    """Whether a value with this origin came from the defaults, the live settings included, not from its request.

    None: no defaults were resolved, so the values are the request's own.
    """
    return source is not None and (source in _DEFAULT_SOURCES or source.startswith("preset "))


@dataclass(frozen=True)
class SamplingDefaults:
    """The layers below a request. ``generation_config`` and ``override`` are in Hugging Face's names.

    ``choice`` is what ``--generation-config`` says: ``auto``, ``vllm`` or a folder.
    """

    generation_config: Mapping[str, Any]
    override: Mapping[str, Any]
    settings: Settings
    choice: str = "auto"

    def model_values(self) -> dict[str, Any]:
        """What the model's authors (or the override) recommend, in sampling names."""
        return _translate({**self.generation_config, **self.override})

    def log_line(self) -> str | None:
        """vLLM's line that says the defaults were overridden, or None if they were not or were to be vLLM's."""
        values = self.model_values()
        if not values or self.choice == "vllm":
            return None
        origin = "the model's `generation_config.json`" if self.choice == "auto" else self.choice
        return (
            f"Default vLLM sampling parameters have been overridden by {origin}: "
            f"`{values}`. If this is not intended, please relaunch vLLM instance with `--generation-config vllm`."
        )

    def resolve(self, given: Mapping[str, Any], source: str = "request") -> SamplingParams:
        """Merge ``given`` (a request's values; None means not given) over all defaults.

        ``source`` is what the origin of a given value is called; ``sources`` of the result has every value's.
        """
        for name in given:
            if name not in PARAMETERS:
                raise RequestError(f"Unknown sampling parameter {name!r}.", param=name)
        layers = (
            ("generation_config.json", _translate(self.generation_config)),
            ("--override-generation-config", _translate(self.override)),
            *self.settings.layers(),
            (source, {name: value for name, value in given.items() if value is not None}),
        )
        values: dict[str, Any] = {"max_tokens": None}
        sources = dict.fromkeys(PARAMETERS, "default")
        for origin, layer in layers:
            values.update(layer)
            sources.update(dict.fromkeys(layer, origin))
        return SamplingParams(**values, sources=sources)


def check_override(values: Mapping[str, Any]) -> None:
    """Raise ConfigError where ``--override-generation-config`` gives a value out of its range."""
    end = values.get("eos_token_id")
    ids = end if isinstance(end, list) else [end]
    try:
        if end is not None and not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
            raise RequestError(f"eos_token_id must be a token id or a list of them, got {end!r}.")
        SamplingParams(**_translate(values))
    except RequestError as error:
        flag = "override_generation_config"
        raise ConfigError(f"--override-generation-config: {error}", flag=flag, value=dict(values)) from None


def _translate(config: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in GENERATION_CONFIG_NAMES.items() if config.get(theirs) is not None}
