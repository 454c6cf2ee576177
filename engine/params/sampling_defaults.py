"""Where a request's sampling values come from: one order, with the origin of each value kept.

request or magic flag > live settings (panel, ``set``) > preset > ``--override-generation-config`` >
what the model's authors recommend (``generation_config.json``) > vLLM's defaults.
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

MODEL_SOURCES: Mapping[str, str] = {
    "generation_config.json": "the model's `generation_config.json`",
    "general.sampling": "the GGUF file's `general.sampling`",
    "model card": "the model card",
}
"""Where a model's authors say what they recommend, and how that is written in a sentence."""
_DEFAULT_SOURCES = ("default", *MODEL_SOURCES, "--override-generation-config", "set")


def is_default_source(source: str | None) -> bool:
    """Whether a value with this origin came from the defaults, the live settings included, not from its request.

    None: no defaults were resolved, so the values are the request's own.
    """
    return source is not None and (source in _DEFAULT_SOURCES or source.startswith("preset "))


@dataclass(frozen=True)
class SamplingDefaults:
    """The layers below a request. ``generation_config`` and ``override`` are in Hugging Face's names.

    ``choice`` is what ``--generation-config`` says: ``auto``, ``vllm`` or a folder. ``source`` is where the values of
    ``auto`` are, one of :data:`MODEL_SOURCES`, and ``model_card`` whose card, if it is one.
    """

    generation_config: Mapping[str, Any]
    override: Mapping[str, Any]
    settings: Settings
    choice: str = "auto"
    source: str = "generation_config.json"
    model_card: str = ""

    def model_values(self) -> dict[str, Any]:
        """What the model's authors (or the override) recommend, in sampling names."""
        return _translate({**self.generation_config, **self.override})

    def check(self) -> None:
        """Raise ConfigError where the model recommends a value out of its range: each request would fail for it."""
        try:
            self.resolve({})
        except RequestError as error:
            fix = "--generation-config vllm does without its values, --override-generation-config gives others"
            raise ConfigError(f"{self._origin()}: {str(error).removesuffix('.')}; {fix}") from None

    def log_line(self) -> str | None:
        """vLLM's line that says the defaults were overridden, or None if they were not or were to be vLLM's."""
        values = self.model_values()
        if not values or self.choice == "vllm":
            return None
        return (
            f"Default vLLM sampling parameters have been overridden by {self._origin()}: "
            f"`{values}`. If this is not intended, please relaunch vLLM instance with `--generation-config vllm`."
        )

    def note(self) -> str | None:
        """The same in plain words, or None where nothing but vLLM's defaults holds."""
        own = {} if self.choice == "vllm" else _translate(self.generation_config)
        layers = ((own, self._origin()), (_translate(self.override), "--override-generation-config"))
        said = [(_listed(values), origin) for values, origin in layers if values]
        if not said:
            return None
        by_model = bool(own) and self.choice == "auto"
        text = "; ".join(f"{values} ({origin})" for values, origin in said)
        off = "; --generation-config vllm does without" if own else ""
        return f"Sampling{', as the model recommends' if by_model else ''}: {text}{off}"

    def _origin(self) -> str:
        """Where the model's values are, in words."""
        if self.choice != "auto":
            return self.choice
        return " of ".join(filter(None, [MODEL_SOURCES[self.source], self.model_card]))

    def resolve(self, given: Mapping[str, Any], source: str = "request") -> SamplingParams:
        """Merge ``given`` (a request's values; None means not given) over all defaults.

        ``source`` is what the origin of a given value is called; ``sources`` of the result has every value's.
        """
        for name in given:
            if name not in PARAMETERS:
                raise RequestError(f"Unknown sampling parameter {name!r}.", param=name)
        layers = (
            (self.source, _translate(self.generation_config)),
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


def _listed(values: Mapping[str, Any]) -> str:
    """``temperature 0.2, top_p 0.9``."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _translate(config: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in GENERATION_CONFIG_NAMES.items() if config.get(theirs) is not None}
