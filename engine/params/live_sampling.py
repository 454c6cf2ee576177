"""Live settings in requests that already run: they replace whatever the request did not set itself."""

from dataclasses import dataclass, replace

from engine.errors import RequestError
from engine.params.sampling_defaults import is_default_source
from engine.params.sampling_params import SamplingParams, names_of

LIVE_NAMES = names_of(lambda known: known.live)
"""Sampling values that reach running requests from their next token on; the others apply to new requests."""


@dataclass(frozen=True)
class LiveSampling:
    """Live sampling overrides: the defaults as they are now. ``base`` is what a request that says nothing gets.

    ``thinking_token_budget`` None: no budget for requests that did not ask for one.
    """

    base: SamplingParams
    thinking_token_budget: int | None
    max_model_len: int

    def params_for(self, params: SamplingParams) -> SamplingParams:
        """``params`` with the live value of every name that the request did not set itself.

        Values that contradict what it did set (``max_tokens`` below its own ``min_tokens``) leave it as it is.
        """
        follows = [name for name in LIVE_NAMES if is_default_source(params.sources.get(name))]
        changed = {name: getattr(self.base, name) for name in follows}
        if all(getattr(params, name) == value for name, value in changed.items()):
            return params
        sources = {**params.sources, **{name: self.base.sources[name] for name in follows}}
        try:
            return replace(params, **changed, sources=sources)
        except RequestError:
            return params

    def max_tokens_for(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        """How many tokens a request with ``params`` may generate."""
        room = max(1, self.max_model_len - num_prompt_tokens)
        return room if params.max_tokens is None else min(params.max_tokens, room)
