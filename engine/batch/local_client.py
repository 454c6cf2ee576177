"""Where ``LLM.map`` sends prompts in this process: the engine's queue."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.batch.map import Answer, chat_messages, work_seconds
from engine.chat.reply import read_whole
from engine.chat.request import ChatRequest, PreparedRequest, PromptRequest, TemplateOptions
from engine.errors import RequestError
from engine.memory.plan import MemoryPlan
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import StructuredOutput
from engine.runtime.stream import RequestStream
from engine.text.parse.output_parser import OutputParser

SOURCE = "map"
"""What ``explain`` calls the origin of the values."""


class Model(Protocol):
    """What of :class:`engine.llm.LLM` a map needs."""

    plan: MemoryPlan
    defaults: SamplingDefaults

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        """Prompt, parser and constraints of a request."""

    def submit(self, request: PreparedRequest) -> RequestStream:
        """Queue a request."""


@dataclass(frozen=True)
class LocalClient:
    """Prompts as chats, or ``raw``, through ``model``. ``schema``: as :meth:`StructuredOutput.from_schema` takes it."""

    model: Model
    raw: bool = False
    schema: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.raw and self.chat_template_kwargs:
            raise RequestError("chat_template_kwargs: only for chats; leave out raw=True", param="raw")
        StructuredOutput.from_schema(self.schema)

    @property
    def look_ahead(self) -> int:
        """Enough for a full batch and for what fills its gaps."""
        return 2 * self.model.plan.max_num_seqs

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise RequestError for values out of range and unknown names."""
        if self.raw and "system" in params:
            raise RequestError("system: only for chats; leave out raw=True", param="system")
        self._resolve(params)

    def submit(self, prompt: str, params: Mapping[str, Any]) -> "LocalJob":
        """Queue one prompt. Raises RequestError (too long, empty …)."""
        prepared = self.model.prepare(self.request(prompt, params))
        parser = prepared.new_parser()  # before there is a request, which an interrupt here would leave to nobody
        return LocalJob(self.model.submit(prepared), parser)

    def request(self, prompt: str, params: Mapping[str, Any]) -> ChatRequest | PromptRequest:
        """What one row asks for."""
        sampling = self._resolve(params)
        structured = StructuredOutput.from_schema(self.schema)
        if self.raw:
            sampling = sampling.with_default_max_tokens()
            return PromptRequest(prompt=prompt, sampling=sampling, structured_outputs=structured, source=SOURCE)
        return ChatRequest(
            messages=chat_messages(prompt, params.get("system")),
            sampling=sampling,
            structured_outputs=structured,
            template=TemplateOptions(kwargs=self.chat_template_kwargs),
            source=SOURCE,
        )

    def _resolve(self, params: Mapping[str, Any]) -> SamplingParams:
        sampling = {name: value for name, value in params.items() if name != "system"}
        return self.model.defaults.resolve({"n": 1, **sampling}, SOURCE)


@dataclass(frozen=True)
class LocalJob:
    """A request in this process's engine, and the parser for its text (None: raw)."""

    stream: RequestStream
    parser: OutputParser | None

    def answer(self) -> Answer:
        """What came so far; raises what ended the request, if something failed."""
        if self.stream.error is not None:
            raise self.stream.error
        output = self.stream.snapshot()
        completion = output.outputs[0]
        reply = read_whole(self.parser, completion.text, completion.finish_reason)
        return Answer(
            reply.text,
            reply.reasoning,
            len(completion.token_ids),
            len(output.prompt_token_ids),
            output.num_cached_tokens,
            work_seconds(output.metrics),
            reply.finish_reason,
        )
