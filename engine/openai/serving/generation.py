"""What chat and plain completions share: prompts, parameters, running requests, their results."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TypeVar

from fastapi import Request

from engine.chat.reply import ReplyBuilder
from engine.chat.request import PreparedRequest, Truncation
from engine.errors import GenerationError, RequestError, UnknownModelError
from engine.openai.http.errors import RequestAbortedError
from engine.openai.http.lifetime import OpenRequest, OpenRequests
from engine.openai.http.options import ServerOptions
from engine.openai.http.request_id import HEADER, name_request, request_id
from engine.openai.http.sse import OPENAI_FORM, Events, EventStream, StreamForm
from engine.openai.schema.protocol import SAMPLING_FIELDS, GenerationFields, SamplingFields, StreamOptions
from engine.openai.serving.admission import Admission, Place
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.logprobs import CompletionTokens, PlacedToken, TokenNames
from engine.outputs import CompletionDelta
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream, news_of, take_all
from engine.text.parse.scan.output_sink import ParsedDelta
from engine.text.template.chat_template import RESERVED_VARIABLES
from engine.text.tokens.detokenizer import completion_stream

_GRAMMARS = 2
_SLICE = 16
"""Prompts of one request that are submitted in a row."""
_BIAS_LIMIT = 100.0
_SHORT = 8192
"""Characters of a request whose prompt is made at once: a millisecond's work."""
_PIECE = 64
"""Characters that any value among them counts for: many empty ones are work too."""
T = TypeVar("T")


@dataclass(frozen=True)
class Port:
    """What every route reaches: the engine, the options and the requests under way."""

    engine: ServedEngine
    options: ServerOptions
    open_requests: OpenRequests
    admission: Admission
    grammars: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_GRAMMARS))
    """Large ones take long to compile, and the threads that do it make prompts too."""

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModelError unless ``name`` is served (no name means the served one)."""
        if name and name not in self.engine.args.names:
            raise UnknownModelError(f"The model `{name}` does not exist.", param="model")

    def check_template(self, chat_template: str | None, chat_template_kwargs: dict[str, Any]) -> None:
        """Refuse a request's own template unless the user trusts them, and variables that are not free.

        One of the model's own templates may be named.
        """
        own = chat_template is None or chat_template in self.engine.preparer.template.named
        if (
            not own or chat_template_kwargs.get("chat_template") is not None
        ) and not self.options.trust_request_chat_template:
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


@dataclass(slots=True)
class News:
    """What came for one choice since it was last looked at: the delta, and what it was parsed to."""

    choice: "Choice"
    delta: CompletionDelta
    parsed: ParsedDelta

    def join(self, delta: CompletionDelta, parsed: ParsedDelta) -> None:
        """Add what came next."""
        self.delta = self.delta.joined(delta)
        for event in parsed.events:
            self.parsed.add(event)


@dataclass
class Choice:
    """One completion, read delta by delta."""

    index: int
    reply: ReplyBuilder

    def add(self, delta: CompletionDelta) -> ParsedDelta:
        """What ``delta`` adds, already added. Raises RequestAbortedError, or GenerationError if the engine failed."""
        if delta.finish_reason is not None:
            if delta.finish_reason == "abort":
                raise RequestAbortedError
            if delta.finish_reason == "error":
                raise GenerationError("The engine failed on this request.")
        return self.reply.add(delta)

    def cut(self) -> dict[str, str]:
        """``thinking_cut`` for the choice's JSON: why the engine ended its thought; empty if it did not."""
        return {"thinking_cut": self.reply.thinking_cut} if self.reply.thinking_cut else {}

    def message(self) -> dict[str, Any]:
        """The assistant's message in OpenAI's form, with the reasoning under both of its names."""
        content, calls = self.reply.content, self.reply.tool_calls
        message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        return message | named_reasoning(self.reply.reasoning) | ({"tool_calls": calls} if calls else {})


@dataclass
class Job:
    """The engine's requests behind one HTTP request: one per prompt, ``n`` choices each."""

    id: str
    model: str
    prompts: Sequence[PreparedRequest]
    streams: Sequence[RequestStream]
    names: TokenNames
    decode: Callable[[Sequence[int]], str]
    """Tokens to text, special ones included."""
    keeps_reasoning: bool = True
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.num_per_prompt = self.params.n
        """Choices per prompt."""
        each = [prompt for prompt in self.prompts for _ in range(self.num_per_prompt)]
        self.choices = [
            Choice(index, ReplyBuilder(prompt.new_parser(), keeps_reasoning=self.keeps_reasoning))
            for index, prompt in enumerate(each)
        ]
        self._tokens: dict[int, CompletionTokens] = {}
        self.failure: BaseException | None = None
        """What failed, to be raised by the next :meth:`take`."""

    @property
    def params(self) -> SamplingParams:
        """The sampling values that apply."""
        return self.streams[0].params

    def prompt_of(self, choice: Choice) -> PreparedRequest:
        """The prompt that ``choice`` continues."""
        return self.prompts[choice.index // self.num_per_prompt]

    def stream_of(self, choice: Choice) -> RequestStream:
        """The engine's request that ``choice`` belongs to."""
        return self.streams[choice.index // self.num_per_prompt]

    def place(self, choice: Choice, token_ids: Sequence[int], *, last: bool, text_offset: int = 0) -> list[PlacedToken]:
        """The next tokens at their places in the text of ``choice``, which begins at ``text_offset``."""
        tokens = self._tokens.get(choice.index)
        if tokens is None:
            stream = completion_stream(self.names.tokenizer, self.prompt_of(choice).token_ids, self.params)
            tokens = self._tokens[choice.index] = CompletionTokens(self.names, stream, text_offset)
        return tokens.place(token_ids, last=last)

    def take(self) -> Sequence[News] | None:
        """What came since the last call, already added to its choices, in one entry for each choice; None at the end.

        Tokens with logprobs have an entry each. Raises what failed, once what came before it was taken.
        """
        if self.failure is not None:
            raise self.failure
        taken = take_all(self.streams)
        if taken is None:
            return None
        arrived, self.failure = taken
        found = self._read_all(arrived) if arrived else ()
        if self.failure is not None and not found:
            raise self.failure
        return found

    @property
    def ending(self) -> bool:
        """Whether nothing more comes than what :meth:`take` gives now."""
        if self.failure is None:
            for stream in self.streams:
                if not stream.finished:
                    return False
        return True

    async def news(self) -> AsyncIterator[Sequence[News]]:
        """The same as it comes."""
        while True:
            waiter = news_of(self.streams)
            some = self.take()
            if some is None:
                return
            if some:
                yield some
            else:
                await waiter

    async def finish(self) -> None:
        """Wait for the end, reading what comes where it is noticed: a task's turn would cost more than a token does."""
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def read() -> None:
            if end.done():
                return
            try:
                while some := self.take():
                    pass
                if some is None:
                    end.set_result(None)
            except Exception as error:  # noqa: BLE001 - whoever waits raises it
                end.set_exception(error)

        self.listen(read)
        read()
        try:
            await end
        finally:
            self.listen(None)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call ``listener`` in this event loop whenever there is news, from now on; None: nobody."""
        for stream in self.streams:
            stream.listen(listener)

    def _read_all(self, arrived: Sequence[tuple[int, CompletionDelta]]) -> Sequence[News]:
        found: dict[int, News] = {}
        apart = self.params.logprobs is not None
        for number, (position, delta) in enumerate(arrived):
            try:
                news = self._read(position, delta)
            except (RequestAbortedError, GenerationError) as error:
                self.failure = error
                continue
            if len(arrived) == 1:  # as where the client keeps up
                return (news,)
            known = found.setdefault(number if apart else news.choice.index, news)
            if known is not news:
                known.join(news.delta, news.parsed)
        return list(found.values())

    def _read(self, position: int, delta: CompletionDelta) -> News:
        choice = self.choices[position * self.num_per_prompt + delta.index]
        return News(choice, delta, choice.add(delta))

    def release(self) -> None:
        """Let go of what ran, once nobody asks for it any more."""
        self.prompts, self.streams, self.choices = (), (), []
        self._tokens.clear()

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_generated = sum(len(choice.reply.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt + num_generated,
            "completion_tokens": num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(max(0, s.num_cached_tokens) for s in self.streams)},
        }

    def chat_usage(self) -> dict[str, Any]:
        """:meth:`usage` in the chat API's form."""
        num_reasoning = sum(choice.reply.num_reasoning_tokens for choice in self.choices)
        return self.usage() | {"completion_tokens_details": {"reasoning_tokens": num_reasoning}}


def named_reasoning(text: str) -> dict[str, str]:
    """A thought as ``reasoning`` (vLLM's name) and ``reasoning_content`` (its old one, which others kept)."""
    return {"reasoning": text, "reasoning_content": text} if text else {}


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


async def make_prompts(make: Callable[[], T], given: object) -> T:
    """What ``make`` gives for the JSON ``given`` that prompts are made of: here where it is short, else in a thread.

    Long ones would hold up the other clients' streams. Short ones would wait for a thread: Python hands over only every
    few milliseconds while there is work.
    """
    return make() if _is_short(given) else await asyncio.to_thread(make)


def _is_short(given: object) -> bool:
    """Whether all texts in ``given``, however deep, come to no more than :data:`_SHORT`."""
    left, pieces = _SHORT, [given]
    while pieces:
        piece = pieces.pop()
        inner: Sequence[object] = ()
        if isinstance(piece, Mapping):
            inner = (*piece.keys(), *piece.values())
        elif isinstance(piece, list | tuple):
            inner = piece
        numbers = sum(isinstance(one, int) for one in inner)  # tokens of a prompt, made already
        left -= len(piece) if isinstance(piece, str) else _PIECE * (len(inner) - numbers) + numbers
        if left < 0:
            return False
        pieces += [one for one in inner if not isinstance(one, int)]
    return True


def truncation(request: SamplingFields) -> Truncation | None:
    """How the prompt may be cut."""
    if request.truncate_prompt_tokens is None:
        return None
    return Truncation(request.truncate_prompt_tokens, request.truncation_side)


async def start_job(
    port: Port,
    prefix: str,
    http: Request,
    request: GenerationFields,
    prompts: Sequence[PreparedRequest],
    place: Place,
    *,
    keeps_reasoning: bool = True,
) -> Job:
    """Submit ``prompts``, for which ``place`` was kept. If one is refused, none runs."""
    engine = port.engine
    asked = http.headers.get(HEADER) or request.request_id
    name_request(asked)
    job_id = f"{prefix}-{request_id()}"
    # Two clients may choose the same id; the engine's must be unique.
    unique = f"{job_id}-{secrets.token_hex(4)}" if asked else job_id

    def submit(position: int, prompt: PreparedRequest) -> RequestStream:
        return engine.submit(
            prompt,
            request_id=f"{unique}-{position}" if len(prompts) > 1 else unique,
            priority=request.priority,
            cache_salt=request.cache_salt,
            served=True,
        )

    streams = await _submit_all(port, prompts, place, submit)
    names = TokenNames(engine.tokenizer, request.return_tokens_as_token_ids)
    return Job(
        id=job_id,
        model=engine.args.names[0],
        prompts=prompts,
        streams=streams,
        names=names,
        decode=lambda token_ids: engine.tokenizer.decode(token_ids, skip_special_tokens=False),
        keeps_reasoning=keeps_reasoning,
    )


async def _submit_all(
    port: Port,
    prompts: Sequence[PreparedRequest],
    place: Place,
    submit: Callable[[int, PreparedRequest], RequestStream],
) -> list[RequestStream]:
    """The streams of ``prompts``; none runs if one is refused. The other clients' streams go on meanwhile."""
    streams: list[RequestStream] = []
    port.admission.check_tokens([len(prompt.token_ids) for prompt in prompts])
    try:
        for position, prompt in enumerate(prompts):
            if position % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
            if prompt.constraints is not None and prompt.constraints.structured is not None:
                async with port.grammars:  # compiling one takes a while
                    streams.append(await asyncio.to_thread(submit, position, prompt))
            else:
                streams.append(submit(position, prompt))
            place.take(streams[-1])
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    return streams


async def finish_job(port: Port, http: Request, job: Job) -> None:
    """Run ``job`` to its end, or until the client leaves or the port closes."""
    async with open_request(port, http, job):
        await job.finish()


class EventWriter(Protocol):
    """An API's events of a job, in order."""

    def begin(self) -> Events:
        """Before anything came."""

    def of(self, news: News) -> Events:
        """Of what came for a choice."""

    def end(self) -> Events:
        """When nothing more comes."""


class JobEvents:
    """The events of ``job``, for :class:`EventStream` or ``async for``."""

    def __init__(self, job: Job, writer: EventWriter) -> None:
        self._job, self._writer = job, writer
        self._begun = self._over = False

    def listen(self, listener: Callable[[], None] | None) -> None:
        """See :class:`EventSource`."""
        self._job.listen(listener)

    def take(self) -> Events | None:
        """See :class:`EventSource`."""
        if not self._begun:
            self._begun = True
            if events := self._writer.begin():
                return events
        if self._over:
            return None
        while news := self._job.take():
            # What shows nothing must not look like a wait for more: it may be the last that a listener is called for.
            if events := self._written(news):
                return events
        if news is None:
            self._over = True
            return self._writer.end() or None
        return ()

    @property
    def ending(self) -> bool:
        """See :class:`EventSource`."""
        return self._job.ending

    async def __aiter__(self) -> AsyncGenerator[Events, None]:
        yield self._writer.begin()
        async for some in self._job.news():
            yield self._written(some)
        yield self._writer.end()

    def _written(self, some: Sequence[News]) -> Events:
        return self._writer.of(some[0]) if len(some) == 1 else [one for news in some for one in self._writer.of(news)]


def stream_job(port: Port, http: Request, job: Job, writer: EventWriter, form: StreamForm = OPENAI_FORM) -> EventStream:
    """The response that runs ``job`` and sends its events, until it ends, the client leaves or the port closes."""
    work = open_request(port, http, job)
    return EventStream(JobEvents(job, writer), work, keep_alive_seconds=port.options.keep_alive_seconds, form=form)


def open_request(port: Port, http: Request, job: Job) -> OpenRequest:
    """``job`` as a request under way."""
    return OpenRequest(port.open_requests, http.receive, job.streams)


def stream_options(port: Port, request: GenerationFields) -> StreamOptions:
    """The options that apply; without any, usage is sent only where the port always sends it."""
    options = request.stream_options or StreamOptions(include_usage=False)
    forced = options.include_usage or port.options.enable_force_include_usage
    return options.model_copy(update={"include_usage": forced})


@cache
def package_version() -> str:
    """The version of the installed distribution, ``unknown`` from a bare source tree."""
    try:
        return version("vm-magic")
    except PackageNotFoundError:
        return "unknown"


def system_fingerprint() -> str:
    """What made a reply: the same text for all replies of one version."""
    return f"vm-magic-{package_version()}"
