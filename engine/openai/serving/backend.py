"""What the port needs of an engine. :class:`engine.llm.LLM` fits, which lies above the port."""

from typing import Any, Protocol, Unpack

from engine.chat.request import ChatPreparer, ChatRequest, PreparedRequest, PromptRequest
from engine.core.request import Standing
from engine.memory.plan import MemoryPlan
from engine.params.engine_args import EngineArgs
from engine.params.sampling_params import SamplingParams
from engine.runtime.metrics import EngineMetrics
from engine.runtime.stream import RequestStream
from engine.text.tokens.tokenizer import Tokenizer


class ServedEngine(Protocol):
    """The engine behind the port."""

    args: EngineArgs
    plan: MemoryPlan
    tokenizer: Tokenizer
    metrics: EngineMetrics
    created: float

    @property
    def preparer(self) -> ChatPreparer:
        """Templates and parsers of the model."""

    @property
    def closed(self) -> bool:
        """Whether the engine was closed or failed."""

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Sampling values, from what was given down to the defaults."""

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        """Prompt, parser and constraints of a request. Raises RequestError."""

    def submit(
        self, request: PreparedRequest, *, request_id: str | None = None, **standing: Unpack[Standing]
    ) -> RequestStream:
        """Queue a request. Raises RequestError if it can never be served."""
