"""What the port needs of an engine. :class:`engine.llm.LLM` fits; tests may bring their own."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints
from engine.runtime.stream import RequestStream
from engine.text.parse.scan.output_sink import ParsedDelta


class ServedParser(Protocol):
    """Splits one completion's text, fed as it comes."""

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text must show special tokens."""

    @property
    def finish_reason(self) -> str | None:
        """After :meth:`finish`: the one it was given, or ``tool_calls``."""

    def feed(self, text: str) -> ParsedDelta:
        """What ``text`` adds."""

    def finish(self, finish_reason: str | None = None) -> ParsedDelta:
        """What was held back, at the end."""


class ServedTokenizer(Protocol):
    """The tokenizer's part that the port uses."""

    @property
    def hf(self) -> tokenizers.Tokenizer:
        """The underlying ``tokenizers.Tokenizer``."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens."""

    def token_text(self, token_id: int) -> str:
        """One token's own text."""


class ServedArgs(Protocol):
    """The engine arguments that clients see."""

    @property
    def model(self) -> str:
        """The model as it was named when it was loaded."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that clients may use."""


class ServedPlan(Protocol):
    """The memory plan's part that clients see."""

    @property
    def max_model_len(self) -> int:
        """Context length in force, in tokens."""


class ServedSettings(Protocol):
    """Live sampling defaults."""

    def snapshot(self) -> Mapping[str, Any]:
        """What is set now."""


class ServedMetrics(Protocol):
    """The engine's metrics."""

    def render(self) -> bytes:
        """Prometheus text."""


class ServedEngine(Protocol):
    """The engine behind the port."""

    @property
    def args(self) -> ServedArgs:
        """What the user said."""

    @property
    def tokenizer(self) -> ServedTokenizer:
        """The model's tokenizer."""

    @property
    def plan(self) -> ServedPlan:
        """The memory plan in force."""

    @property
    def settings(self) -> ServedSettings:
        """Live sampling defaults."""

    @property
    def metrics(self) -> ServedMetrics:
        """Counters and histograms."""

    @property
    def tool_call_parser(self) -> str | None:
        """The parser of tool calls in force, or None: this model's calls cannot be read."""

    @property
    def closed(self) -> bool:
        """Whether the engine was closed or failed."""

    @property
    def created(self) -> float:
        """Unix time of loading."""

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        constraints: Constraints | None = None,
    ) -> RequestStream:
        """Queue a request. Raises RequestError if it can never be served."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a chat."""

    def output_parser(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        prompt: str = "",
        parallel_tool_calls: bool = True,
    ) -> ServedParser:
        """A parser for one completion that continues ``prompt``."""

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Sampling values, from what was given down to the defaults."""
