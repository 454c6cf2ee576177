"""``RemoteLLM``: what ``vm_magic.current()`` is while connected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.batch.map import Answer, MapRequest, chat_messages, map_prompts, work_seconds
from engine.chat.reply import ReplyBuilder
from engine.errors import ConfigError, RequestError
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.sampling_params import SamplingParams
from engine.params.settings import THINKING_SWITCHES, Settings
from engine.params.structured_outputs import plain_schema
from vm_magic.remote.address import Address, RemoteConnectionError
from vm_magic.remote.metrics import ServerState
from vm_magic.remote.stream import RemoteStream
from vm_magic.remote.wire import request_body, response_format, sent_message

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx
    import pandas

Message = Mapping[str, Any]
MAP_CONCURRENCY = 64
"""Prompts of a map that are under way at a time; the server's own queue takes what it cannot run yet."""


@dataclass(frozen=True)
class RemoteModel:
    """A model as the server lists it. ``parent`` is the base model of an adapter."""

    name: str
    max_model_len: int | None = None
    parent: str | None = None


class RemoteLLM:
    """A model behind an OpenAI-compatible server, for chat, completions and maps.

    ``url`` is http or https (``/v1`` is added where there is no path). ``api_key`` None takes ``VLLM_API_KEY``
    or ``OPENAI_API_KEY``; ``key_source`` is what messages call its origin. ``model`` None takes the only model
    that is served. Raises ConfigError and RemoteConnectionError. Templates, tokens and
    memory are the server's.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, model: str | None = None, key_source: str = "--api-key"
    ) -> None:
        from vm_magic.remote.client import RemoteClient

        self.address = Address.of(url, api_key, key_source=key_source)
        self.settings = Settings()
        self.last_map: pandas.DataFrame | None = None
        self._streams: dict[str, RemoteStream] = {}
        self._client = RemoteClient(self.address)
        try:
            self.served = self._choose(model)
        except BaseException:
            self._client.close()
            raise

    @property
    def base_url(self) -> str:
        """Where the API is; ends in ``/v1`` unless another path was given."""
        return self.address.base_url

    @property
    def model(self) -> str:
        """The model's name on the server."""
        return self.served.name

    @property
    def defaults(self) -> SamplingDefaults:
        """Where sampling values come from on this side; below them are the server's own defaults."""
        return SamplingDefaults({}, {}, self.settings)

    @property
    def closed(self) -> bool:
        """Whether the connection was given up."""
        return self._client.closed

    def __repr__(self) -> str:
        return f"<RemoteLLM {self.model} at {self.base_url}{', closed' if self.closed else ''}>"

    def models(self) -> list[RemoteModel]:
        """What the server serves."""
        try:
            found = self._client.get("/models").json()["data"]
            return [RemoteModel(one["id"], one.get("max_model_len"), one.get("parent")) for one in found]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RemoteConnectionError(
                f"{self.base_url}/models is not a list of models; is the address that of an OpenAI server's API?"
            ) from None

    def metrics_text(self) -> str:
        """The server's Prometheus metrics. Raises RequestError where it shows none."""
        return self._client.get("/metrics", root=True).text

    def ask_metrics(self, timeout: float) -> "Future[httpx.Response]":
        """:meth:`metrics_text` without waiting: the future of the response, or of its error."""
        return self._client.ask("/metrics", root=True, timeout=timeout)

    def state(self) -> ServerState:
        """Requests and KV cache on the server, as far as it reports them."""
        from vm_magic.remote.metrics import read_state

        try:
            return read_state(self.metrics_text(), self.model)
        except RequestError:
            return ServerState()

    def version(self) -> str | None:
        """What the server calls its version; None where it does not say."""
        try:
            found = self._client.get("/version", root=True).json()
        except (RequestError, ValueError):
            return None
        version = found.get("version") if isinstance(found, Mapping) else None
        return None if version in (None, "unknown") else str(version)

    def submit_chat(
        self,
        messages: Sequence[Message],
        sampling: Mapping[str, Any],
        *,
        think: bool | None = None,
        thinking_token_budget: int | None = None,
        schema: Mapping[str, Any] | bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        model: str | None = None,
    ) -> RemoteStream:
        """Ask for the reply to a conversation; returns at once. Its deltas are parsed by the server.

        ``sampling`` lies over the live settings; what neither says is the server's default. ``model`` is another one
        that the server serves.
        """
        values, params = self._sampling(sampling)
        body = request_body(model or self.model, values, chat=True)
        body["messages"] = [sent_message(message) for message in messages]
        thinking = self.settings.thinking()
        switch = think if think is not None else thinking.get("enable_thinking")
        kwargs = {**({} if switch is None else dict.fromkeys(THINKING_SWITCHES, switch)), **(template_kwargs or {})}
        budget = thinking_token_budget if thinking_token_budget is not None else thinking.get("thinking_token_budget")
        optional: dict[str, Any] = {
            "chat_template_kwargs": kwargs or None,
            "thinking_token_budget": budget,
            "response_format": None if schema is None else response_format(schema),
            "tools": list(tools) if tools else None,
            "tool_choice": tool_choice if tools else None,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        return self._send(RemoteStream(None, params), "/chat/completions", body)

    def submit_completion(
        self, prompt: str, sampling: Mapping[str, Any], *, schema: Mapping[str, Any] | bool | None = None
    ) -> RemoteStream:
        """Continue a raw prompt; returns at once."""
        values, params = self._sampling(sampling)
        body = request_body(self.model, values, chat=False) | {"prompt": prompt}
        if schema is not None:
            body["response_format"] = response_format(schema)
        return self._send(RemoteStream(prompt, params), "/completions", body)

    def requests(self) -> list[RemoteStream]:
        """This notebook's requests that are under way at the server, the oldest first."""
        return list(self._streams.values())

    def abort(self, request_id: str) -> None:
        """Close the stream of one of :meth:`requests`, upon which the server ends it; others are left alone."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.abort()

    def map(
        self,
        rows: Any,
        template: str | Sequence[str],
        *,
        raw: bool = False,
        schema: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        resume: "pandas.DataFrame | None" = None,
        choices: Sequence[Any] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        replicas: Any = None,
        **params: Any,
    ) -> "pandas.DataFrame":
        """:meth:`engine.llm.LLM.map`, with up to :data:`MAP_CONCURRENCY` prompts at the server at a time.

        ``choices`` are refused: a server tells neither the tokens of a prompt nor which ones end an answer.
        ``replicas`` are refused too: how many there are is the server's own.
        """
        if replicas is not None:
            raise RequestError(
                f"replicas: the model is at {self.base_url}, which has as many as it was started with; leave them out",
                param="replicas",
            )
        if choices is not None:
            raise RequestError(
                f"choices: their probabilities need the model in this kernel, not at {self.base_url}; leave them out, "
                "or load a model and go back to it with %vllm_metal connect --close",
                param="choices",
            )
        client = RemoteMapClient(self, raw, plain_schema(schema), chat_template_kwargs or {})
        request = MapRequest.of(template, params, variables=variables, resume=resume)
        return map_prompts(client, rows, request, keep=self._keep_map, use_tqdm=use_tqdm)

    def close(self) -> None:
        """End our requests and close the connections; the server goes on. Safe to repeat."""
        self._client.close()

    def check(self, sampling: Mapping[str, Any]) -> None:
        """Raise RequestError for sampling values out of range and unknown names."""
        self._sampling(sampling)

    def _send(self, stream: RemoteStream, path: str, body: dict[str, Any]) -> RemoteStream:
        stream.start(self._client, path, body)
        self._streams[stream.request_id] = stream
        stream.when_over(lambda: self._forget(stream.request_id))
        return stream

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def _sampling(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], SamplingParams]:
        """Values to send, and the same for us, ``max_tokens`` None where the server decides."""
        values = {**self.settings.snapshot(), **{name: value for name, value in given.items() if value is not None}}
        return values, SamplingParams().replace(**{"max_tokens": None, **values})

    def _keep_map(self, frame: "pandas.DataFrame") -> None:
        self.last_map = frame

    def _choose(self, wanted: str | None) -> RemoteModel:
        models = self.models()
        names = ", ".join(model.name for model in models)
        if wanted is not None:
            chosen = next((model for model in models if model.name == wanted), None)
            if chosen is None:
                raise ConfigError(f"-m {wanted}: {self.base_url} serves {names or 'no model'}", flag="model")
            return chosen
        base = [model for model in models if model.parent is None] or models
        if len(base) != 1:
            some = f"serves several models; choose with -m NAME: {names}" if base else "serves no model"
            raise ConfigError(f"{self.base_url} {some}", flag="model")
        return base[0]


@dataclass(frozen=True)
class RemoteMapClient:
    """Where a map sends its prompts."""

    llm: RemoteLLM
    raw: bool = False
    schema: Mapping[str, Any] | bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def look_ahead(self) -> int:
        """Prompts under way at a time."""
        return MAP_CONCURRENCY

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise RequestError for values out of range and unknown names."""
        if self.raw and ("system" in params or self.chat_template_kwargs):
            raise RequestError("system and chat_template_kwargs: only for chats; leave out raw=True", param="raw")
        self.llm.check(_without_system(params))

    def submit(self, prompt: str, params: Mapping[str, Any]) -> "RemoteJob":
        """Send one prompt."""
        sampling = _without_system(params)
        if self.raw:
            return RemoteJob(self.llm.submit_completion(prompt, sampling, schema=self.schema))
        messages = chat_messages(prompt, params.get("system"))
        kwargs = self.chat_template_kwargs
        return RemoteJob(self.llm.submit_chat(messages, sampling, schema=self.schema, template_kwargs=kwargs))


@dataclass(frozen=True)
class RemoteJob:
    """One prompt of a map at the server."""

    stream: RemoteStream

    def answer(self) -> Answer:
        """What came so far; raises what ended it, if something failed."""
        if self.stream.error is not None:
            raise self.stream.error
        builder = ReplyBuilder()
        for delta in self.stream.drain(0):
            builder.add(delta)
        output = self.stream.snapshot()
        usage = output.usage
        return Answer(
            builder.content,
            builder.reasoning or None,
            usage.completion_tokens,
            usage.prompt_tokens,
            usage.cached_tokens,
            work_seconds(output.metrics),
            output.outputs[0].finish_reason,
        )


def _without_system(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != "system"}
