"""What chat and plain completions share: prompts, parameters, running requests, their results."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from engine.errors import GenerationError, RequestError, UnknownModelError
from engine.openai.http.lifetime import OpenRequest, OpenRequests, merge
from engine.openai.http.options import ServerOptions
from engine.openai.schema.backend import ServedEngine
from engine.openai.schema.protocol import SAMPLING_FIELDS, GenerationFields, SamplingFields, StreamOptions
from engine.openai.serving.logprobs import TokenNames
from engine.outputs import CompletionDelta, LogprobsAtPosition
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints
from engine.runtime.stream import RequestStream
from engine.text.template.chat_template import RESERVED_VARIABLES

_MAX_ID_LENGTH = 128
_BIAS_LIMIT = 100.0


@dataclass(frozen=True)
class Port:
    """What every route reaches: the engine, the options and the requests under way."""

    engine: ServedEngine
    options: ServerOptions
    open_requests: OpenRequests

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModelError unless ``name`` is served (no name means the served one)."""
        if name and name not in self.engine.args.names:
            raise UnknownModelError(f"The model `{name}` does not exist.", param="model")

    def check_template(self, chat_template: str | None, chat_template_kwargs: dict[str, Any]) -> None:
        """Refuse a request's own template unless the user trusts them, and variables that are not free."""
        given = chat_template is not None or chat_template_kwargs.get("chat_template") is not None
        if given and not self.options.trust_request_chat_template:
            raise RequestError(
                "Chat template is passed with request, but --trust-request-chat-template is not set. "
                "Refused request with untrusted chat template.",
                param="chat_template",
            )
        for name in RESERVED_VARIABLES.intersection(chat_template_kwargs):
            raise RequestError(f"chat_template_kwargs cannot set {name!r}.", param="chat_template_kwargs")


def port_of(request: Request) -> Port:
    """The port that serves ``request``."""
    port = request.app.state.port
    assert isinstance(port, Port)
    return port


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, and as text where it came as text."""

    token_ids: list[int]
    text: str | None = None


@dataclass
class Choice:
    """One completion, filled delta by delta."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobsAtPosition] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    thinking_cut: str | None = None
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self.parts)

    def add(self, delta: CompletionDelta) -> None:
        """Append ``delta``. Raises GenerationError if the engine ended the request."""
        if delta.finish_reason in ("abort", "error"):
            raise GenerationError(
                "The request was aborted by the engine."
                if delta.finish_reason == "abort"
                else "The engine failed on this request."
            )
        self.parts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.thinking_cut = delta.thinking_cut or self.thinking_cut

    def cut(self) -> dict[str, str]:
        """``thinking_cut`` for the choice's JSON: why its thought was ended for the model; nothing if it was not."""
        return {"thinking_cut": self.thinking_cut} if self.thinking_cut else {}


@dataclass
class Job:
    """The engine's requests behind one HTTP request: one per prompt, ``n`` choices each."""

    id: str
    model: str
    prompts: Sequence[Prompt]
    streams: Sequence[RequestStream]
    names: TokenNames
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.choices = [Choice(index) for index in range(len(self.streams) * self.num_per_prompt)]

    @property
    def params(self) -> SamplingParams:
        """The sampling values in force."""
        return self.streams[0].params

    @property
    def num_per_prompt(self) -> int:
        """Choices per prompt."""
        return self.params.n

    def prompt_of(self, choice: Choice) -> Prompt:
        """The prompt that ``choice`` continues."""
        return self.prompts[choice.index // self.num_per_prompt]

    def stream_of(self, choice: Choice) -> RequestStream:
        """The engine's request that ``choice`` belongs to."""
        return self.streams[choice.index // self.num_per_prompt]

    async def deltas(self) -> AsyncIterator[tuple[Choice, CompletionDelta]]:
        """Deltas as they come, already added to their choice."""
        async for position, delta in merge(self.streams):
            choice = self.choices[position * self.num_per_prompt + delta.index]
            choice.add(delta)
            yield choice, delta

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_generated = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt + num_generated,
            "completion_tokens": num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(max(0, s.num_cached_tokens) for s in self.streams)},
        }


def sampling_params(engine: ServedEngine, request: GenerationFields, **own: Any) -> SamplingParams:
    """Resolve the request's sampling fields; ``own`` are those that only one API has."""
    given = {name: getattr(request, name) for name in SAMPLING_FIELDS if name in request.model_fields_set}
    if request.logit_bias is not None:
        given["logit_bias"] = _logit_bias(request.logit_bias)
    return engine.sampling_params(**given, **own)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): min(_BIAS_LIMIT, max(-_BIAS_LIMIT, value)) for token, value in bias.items()}
    except ValueError:
        raise RequestError(f"logit_bias must map token ids to numbers, got {bias}.", param="logit_bias") from None


def truncate(token_ids: list[int], request: SamplingFields, max_tokens: int | None, max_model_len: int) -> list[int]:
    """Apply ``truncate_prompt_tokens`` (-1: what fits beside the output)."""
    limit = request.truncate_prompt_tokens
    if limit is None:
        return token_ids
    if limit == -1:
        limit = max(1, max_model_len - (max_tokens or 1))
    if limit > max_model_len:
        raise RequestError(
            f"truncate_prompt_tokens value ({limit}) is greater than max_model_len ({max_model_len}). "
            "Please request a smaller truncation size.",
            param="truncate_prompt_tokens",
        )
    if request.truncation_side == "right":
        return token_ids[:limit]
    return token_ids[max(0, len(token_ids) - limit) :]


async def start_job(
    port: Port,
    prefix: str,
    http: Request,
    request: GenerationFields,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    constraints: Constraints | None,
) -> Job:
    """Submit ``prompts``. If one is refused, none runs."""
    engine = port.engine
    asked = http.headers.get("x-request-id") or request.request_id
    job_id = f"{prefix}-{asked[:_MAX_ID_LENGTH] if asked else uuid.uuid4().hex}"
    # Two clients may choose the same id; the engine's must be unique.
    unique = f"{job_id}-{secrets.token_hex(4)}" if asked else job_id

    def submit(position: int, prompt: Prompt) -> RequestStream:
        return engine.submit(
            prompt.token_ids,
            params,
            request_id=f"{unique}-{position}" if len(prompts) > 1 else unique,
            priority=request.priority,
            cache_salt=request.cache_salt,
            constraints=constraints,
        )

    streams: list[RequestStream] = []
    try:
        for position, prompt in enumerate(prompts):
            # Compiling a grammar takes a while, in which the other clients' streams must go on.
            grammar = constraints is not None and constraints.structured is not None
            streams.append(await asyncio.to_thread(submit, position, prompt) if grammar else submit(position, prompt))
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    names = TokenNames(engine.tokenizer.token_text, request.return_tokens_as_token_ids)
    return Job(id=job_id, model=engine.args.names[0], prompts=prompts, streams=streams, names=names)


async def finish_job(port: Port, http: Request, job: Job) -> None:
    """Run ``job`` to its end, or until the client leaves or the port closes."""
    async with open_request(port, http, job):
        async for _ in job.deltas():
            pass


def open_request(port: Port, http: Request, job: Job) -> OpenRequest:
    """``job`` as a request under way."""
    return OpenRequest(port.open_requests, http.receive, job.streams)


def stream_options(port: Port, request: GenerationFields) -> StreamOptions:
    """The options in force; without any, usage is told only where the port always tells it."""
    options = request.stream_options or StreamOptions(include_usage=False)
    forced = options.include_usage or port.options.enable_force_include_usage
    return options.model_copy(update={"include_usage": forced})
