"""Where ``LLM.map`` sends prompts in this process: templates, parsers and the engine's queue."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.batch.map import Answer, chat_messages, work_seconds
from engine.chat.parse_output import collect_reply
from engine.errors import RequestError
from engine.memory.plan import MemoryPlan
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.sampling_params import DEFAULT_MAX_TOKENS
from engine.params.structured_outputs import Constraints
from engine.runtime.stream import RequestStream
from engine.text.parse.output_parser import OutputParser


class Model(Protocol):
    """What of :class:`engine.llm.LLM` a map needs."""

    plan: MemoryPlan
    defaults: SamplingDefaults

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, chat_template_kwargs: Mapping[str, Any] | None
    ) -> str:
        """The prompt text of a chat."""

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def output_parser(self, *, prompt: str) -> OutputParser:
        """A parser for one completion."""

    def submit(self, prompt: str | Sequence[int], params: Any, *, constraints: Constraints | None) -> RequestStream:
        """Queue a request."""


@dataclass(frozen=True)
class LocalDoor:
    """Prompts as chats, or ``raw``, through ``model``. ``schema``: as :func:`schema_constraints` takes it."""

    model: Model
    raw: bool = False
    schema: Any = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.raw and self.chat_template_kwargs:
            raise RequestError("chat_template_kwargs: only for chats; leave out raw=True", param="raw")
        schema_constraints(self.schema)

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
        sampling = self._resolve(params)
        if self.raw:
            if sampling.max_tokens is None:
                sampling = sampling.replace(max_tokens=DEFAULT_MAX_TOKENS)
            return LocalJob(self.model.submit(prompt, sampling, constraints=schema_constraints(self.schema)), None)
        text = self.model.render_chat(
            chat_messages(prompt, params.get("system")), chat_template_kwargs=self.chat_template_kwargs
        )
        parser = self.model.output_parser(prompt=text)
        if parser.needs_special_tokens:
            sampling = sampling.replace(skip_special_tokens=False)
        token_ids = self.model.tokenize(text, add_special_tokens=False)
        stream = self.model.submit(token_ids, sampling, constraints=schema_constraints(self.schema))
        stream.parsing, stream.template_kwargs, stream.source = {"prompt": text}, self.chat_template_kwargs, "map"
        return LocalJob(stream, parser)

    def _resolve(self, params: Mapping[str, Any]) -> Any:
        sampling = {name: value for name, value in params.items() if name != "system"}
        return self.model.defaults.resolve({"n": 1, **sampling}, "map")


@dataclass(frozen=True)
class LocalJob:
    """A request in this process's engine, and the parser for its text (None: raw)."""

    stream: RequestStream
    parser: OutputParser | None

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self.stream.num_tokens

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """``callback()`` once the request is over."""
        self.stream.add_done_callback(callback)

    def abort(self) -> None:
        """End the request soon."""
        self.stream.abort()

    def answer(self) -> Answer:
        """What came so far; raises what ended the request, if something failed."""
        if self.stream.error is not None:
            raise self.stream.error
        output = self.stream.snapshot()
        completion = output.outputs[0]
        text, reasoning, finish_reason = completion.text, None, completion.finish_reason
        if self.parser is not None:
            reply = collect_reply(self.parser, [text], finish_reason)
            text, reasoning, finish_reason = reply.text, reply.reasoning, reply.finish_reason
        return Answer(
            text,
            reasoning,
            len(completion.token_ids),
            len(output.prompt_token_ids),
            output.num_cached_tokens,
            work_seconds(output.metrics),
            finish_reason,
        )


def schema_constraints(schema: Any) -> Constraints | None:
    """Constraints for ``schema``: a JSON schema, a pydantic model, True for any JSON object; None for none."""
    if schema is None:
        return None
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if schema is not True and not isinstance(schema, Mapping):
        raise RequestError(
            f"schema: give a JSON schema (a dict), a pydantic model or True, got {schema!r}", param="schema"
        )
    return Constraints.from_request(structured_outputs={"json_object": True} if schema is True else {"json": schema})
