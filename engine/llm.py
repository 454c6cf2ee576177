"""``LLM``: a model in this process, for Python, for the magics and for the port.

All of them share one engine and one KV cache. MLX lives on the engine's own thread; templates and
tokenizing happen in the caller's.
"""

import itertools
import operator
import secrets
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from engine.config import EngineArgs, ModelConfig
from engine.constraints import Constraints
from engine.errors import ContextLengthError, RequestError
from engine.explain import Explainer, Explanation, Parsed
from engine.hub import resolve
from engine.metrics import EngineMetrics
from engine.outputs import CompletionDelta, RequestOutput
from engine.replay import collect_reply
from engine.request_log import RequestLog, RequestRecord
from engine.runner.devices import active_memory, prepare_backend
from engine.runner.sampling_metadata import check_token_ids
from engine.sampling_defaults import Resolved, SamplingDefaults
from engine.sampling_params import SamplingParams
from engine.settings import Settings
from engine.stream import RequestStream
from engine.text.chat_template import ChatTemplate, load_template
from engine.text.guides import Guides
from engine.text.output_parser import OutputParser, ToolChoice
from engine.text.parser_choice import ParserChoice
from engine.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.llm_engine import EngineStats, NewRequest
    from engine.memory import MemoryPlan
    from engine.openai.server import ServerHandle

Message = Mapping[str, Any]
Progress = Callable[[str, int, int], None]

Prompt = str | Sequence[int] | Mapping[str, Any]

__all__ = ["LLM", "RequestStream", "memory_in_use"]


def memory_in_use() -> int:
    """Bytes that MLX holds on the device for this process, caches for reuse excluded."""
    return active_memory()


class LLM:
    """Loads ``model`` and serves it until :meth:`close`.

    ``options`` are vLLM's engine flags as keywords (``max_model_len=2048``,
    ``gpu_memory_utilization=0.5`` …); ``VLLM_METAL_*`` variables count where a keyword is not
    given. ``progress(stage, done_bytes, total_bytes)`` is called while loading; raising in it
    cancels the load. Raises ModelNotFoundError, ModelLoadError, ConfigError or MemoryPlanError,
    each in one line, leaving nothing behind.
    """

    def __init__(self, model: str, *, progress: Progress | None = None, **options: Any) -> None:
        self.args = EngineArgs.from_options(model, options)
        prepare_backend()  # before anything imports mlx
        from engine.builder import build_engine
        from engine.engine_thread import EngineThread

        resolved = resolve(self.args.model, self.args.revision, progress=progress)
        self.tokenizer: Tokenizer = load_tokenizer(resolved, self.args)
        self._template = self._make_template()
        self._parsers = ParserChoice.of_model(self.args, self._template.source, self.tokenizer)
        self.reasoning_parser = self._parsers.reasoning_parser
        self.tool_call_parser = self._parsers.tool_call_parser
        self.metrics = EngineMetrics(self.args.names[0])
        self.settings = Settings()
        self.request_log = RequestLog()
        self.server: ServerHandle | None = None
        self.created = time.time()
        self._request_numbers = itertools.count()
        self._serving = threading.Lock()
        cancelled = threading.Event()

        def report(stage: str, done: int, total: int) -> None:
            if cancelled.is_set():
                raise KeyboardInterrupt
            if progress is not None:
                progress(stage, done, total)

        args, tokenizer, metrics = self.args, self.tokenizer, self.metrics
        self._thread = EngineThread(lambda: build_engine(resolved, args, tokenizer, metrics, report))
        try:
            built = self._thread.start()
        except BaseException:
            cancelled.set()
            self._thread.close()
            raise
        # Also when the object is dropped, and at exit, where a thread inside MLX would abort the process.
        weakref.finalize(self, self._thread.close)
        self.model_config: ModelConfig = built.config
        self.plan: MemoryPlan = built.plan
        self.defaults = SamplingDefaults(
            built.config.generation_config, self.args.override_generation_config, self.settings
        )
        self.notes = [*built.notes, *filter(None, [self._parsers.note, self.defaults.log_line()])]
        self._vocab_size = built.engine.runner.vocab_size
        self._eos_token_ids = built.config.eos_token_ids | self.tokenizer.eos_token_ids
        self._guides = self._make_guides()
        self._reuses_prefixes = built.engine.scheduler.kv.groups[0].pool.enable_caching

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM {self.args.names[0]}{', closed' if self.closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether requests are refused: after :meth:`close`, or when the engine failed."""
        return not self._thread.alive

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Sampling values in force for a request that says ``given`` (see :mod:`engine.sampling_defaults`).

        ``max_tokens`` None means up to the end of the context.
        """
        return self.resolve_sampling(**given).params

    def resolve_sampling(self, *, source: str = "request", **given: Any) -> Resolved:
        """:meth:`sampling_params` with the source of each value; ``source`` is what ``given`` is called."""
        return self.defaults.resolve(given, source)

    @property
    def template_variables(self) -> frozenset[str]:
        """What of ``chat_template_kwargs`` the chat template reads, such as ``enable_thinking``."""
        return self._template.variables

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Rendered chats bring their special tokens: pass False for them."""
        return self.tokenizer.encode(text, add_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a chat, from the model's template or ``chat_template`` (Jinja text, sandboxed)."""
        template = self._template if chat_template is None else self._template.with_source(chat_template)
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(chat_template_kwargs or {}),
        )

    def output_parser(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = None,
        prompt: str = "",
        parallel_tool_calls: bool = True,
    ) -> OutputParser:
        """A parser for one completion: thoughts and tool calls apart from the answer.

        ``prompt`` is the rendered prompt, which may open the thought. The request must run with
        ``skip_special_tokens=False`` where the parser's ``needs_special_tokens`` says so.
        """
        return self._parsers.make(
            tools=tools, tool_choice=tool_choice, prompt=prompt, parallel_tool_calls=parallel_tool_calls
        )

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
        """Queue a request and return at once. ``prompt`` is text or token ids.

        ``constraints``: a grammar, a thinking budget, repetition detection (``Constraints.from_request``
        takes the fields of a request). Raises ContextLengthError or another RequestError for what
        can never be served, and EngineClosedError.
        """
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        request = self._new_request(request_id, token_ids, params, priority, cache_salt, constraints)
        thread = self._thread
        stream = RequestStream(
            request_id,
            text,
            token_ids,
            params,
            lambda: thread.abort(request_id),
            lambda: thread.finish_thinking(request_id),
        )
        self._thread.submit(request, stream)
        self.request_log.add(stream, max_tokens=request.max_tokens, cache_salt=cache_salt, constraints=constraints)
        return stream

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; results in order. Interruptible: all are then aborted.

        A prompt is a text, token ids, or vLLM's ``{"prompt": …}`` or ``{"prompt_token_ids": …}``.

        Without ``sampling_params`` the model's recommended values apply, with vLLM's 16 tokens.
        """
        single = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
        wanted: Any = [prompts] if single else prompts
        each = self._params_of(sampling_params, len(wanted))
        return self._run([(_one_prompt(prompt), params) for prompt, params in zip(wanted, each, strict=True)], use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Reply to one conversation or many. ``template`` takes what :meth:`render_chat` takes."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Sequence[Message]] = [messages] if single else messages  # type: ignore[assignment,list-item]
        prompts = [self._chat_tokens(conversation, template) for conversation in conversations]
        return self._run(list(zip(prompts, self._params_of(sampling_params, len(prompts)), strict=True)), use_tqdm)

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> Iterator[CompletionDelta]:
        """Deltas of a reply to a conversation (messages) or of a raw prompt (text or token ids).

        Leaving the loop early ends the request.
        """
        stream = self._submit_any(prompt, sampling_params, template)
        try:
            yield from stream
        finally:
            stream.abort()

    async def astream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> AsyncIterator[CompletionDelta]:
        """:meth:`stream` for ``async for``."""
        stream = self._submit_any(prompt, sampling_params, template)
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.abort()

    def serve(self, port: int = 0, **options: Any) -> "ServerHandle":
        """Open the OpenAI port on a background thread (see ``engine.openai.server.start_server``)."""
        from engine.openai.server import start_server

        with self._serving:
            if self.server is not None and self.server.running:
                self.server.stop()
            self.server = start_server(self, port=port, **options)
            return self.server

    def stats(self) -> "EngineStats":
        """Requests, blocks and counters now."""
        return self._thread.call(lambda engine: engine.stats())

    def explain(self, count: int = 1) -> Explanation:
        """Why the last request went as it did, whoever sent it; ``count`` 2 is the one before, and so on.

        Raises RequestError if no such request is remembered (the latest 32 are).
        """
        record = self.request_log.latest(count)
        if record is None:
            known = len(self.request_log)
            raise RequestError(
                f"there is no request {count} from the end: {known} are remembered"
                if known
                else "there was no request yet; ask something first (%%chat, or a client)",
                param="count",
            )
        return self._explainer().explain(record)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._thread.call(lambda engine: engine.scheduler.kv.reset_prefix_cache())

    def close(self) -> None:
        """Close the port, end all requests and give all memory back. Safe to repeat."""
        server, self.server = self.server, None
        if server is not None:
            server.stop()
        self._thread.close()

    def _explainer(self) -> Explainer:
        why = "prefix caching is off (--no-enable-prefix-caching)"
        if self.args.enable_prefix_caching and not self._reuses_prefixes:
            why = "this model runs on mlx-lm's contiguous caches, which keep nothing between requests"
        return Explainer(
            log=self.request_log,
            decode=lambda token_ids: self.tokenizer.decode(token_ids, skip_special_tokens=False),
            token_text=self.tokenizer.token_text,
            parse=self._parse_again,
            eos_token_ids=self._eos_token_ids,
            block_size=self.plan.block_size,
            no_caching="" if self._reuses_prefixes else why,
        )

    def _parse_again(self, record: RequestRecord, text: str) -> Parsed:
        """What the door's parser made of ``text``; where the door does not parse, all is content."""
        if record.parsing is None:
            return Parsed(text)
        reply = collect_reply(self.output_parser(**record.parsing), [text], None)
        return Parsed(reply.text, reply.reasoning, [call["function"] for call in reply.tool_calls])

    def _make_guides(self) -> Guides:
        return Guides(
            self.tokenizer,
            self._vocab_size,
            self._eos_token_ids,
            reasoning_parser=self.reasoning_parser,
            tool_call_parser=self.tool_call_parser,
            reasoning_config=self.args.reasoning_config,
        )

    def _make_template(self) -> ChatTemplate:
        return ChatTemplate(
            load_template(self.args.chat_template, self.tokenizer.chat_template),
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
            default_kwargs=self.args.default_chat_template_kwargs,
        )

    def _submit_any(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        params: SamplingParams | None,
        template: Mapping[str, Any],
    ) -> RequestStream:
        params = params or self.sampling_params()
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            return self.submit(self._chat_tokens(prompt, template), params)  # type: ignore[arg-type]
        if template:
            raise RequestError(f"{', '.join(template)}: only for a conversation (a list of messages)")
        return self.submit(prompt, params)  # type: ignore[arg-type]

    def _chat_tokens(self, messages: Sequence[Message], template: Mapping[str, Any]) -> list[int]:
        return self.tokenize(self.render_chat(messages, **template), add_special_tokens=False)

    def _params_of(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        """Sampling values of each of ``count`` requests."""
        if given is None:
            resolved = self.sampling_params()
            given = resolved if resolved.max_tokens is not None else resolved.replace(max_tokens=16)
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise RequestError("The lengths of prompts and params must be the same.", param="sampling_params")
        return given

    def _run(
        self, requests: Sequence[tuple[str | Sequence[int], SamplingParams]], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Submit all, wait for all; if anything raises, abort the rest."""
        streams: list[RequestStream] = []
        try:
            for prompt, params in requests:
                streams.append(self.submit(prompt, params))
            waited: Iterable[RequestStream] = streams
            if use_tqdm and len(streams) > 1:
                from tqdm.auto import tqdm

                waited = tqdm(streams, desc="Processed prompts")
            return [stream.result() for stream in waited]
        except BaseException:
            for stream in streams:
                stream.abort()
            raise

    def _new_request(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str | None,
        constraints: Constraints | None,
    ) -> "NewRequest":
        from engine.llm_engine import NewRequest

        if not token_ids:
            raise RequestError("The prompt is empty: give at least one token.", param="prompt")
        if max(token_ids) >= self._vocab_size or min(token_ids) < 0:
            raise RequestError(f"Token id {max(token_ids)} is out of vocabulary ({self._vocab_size}).", param="prompt")
        check_token_ids(params, self._vocab_size)
        return NewRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=self._max_tokens(len(token_ids), params.max_tokens),
            eos_token_ids=self._eos_token_ids,
            seed=self._seed(params),
            bad_words_token_ids=self._bad_words(params),
            priority=priority,
            cache_salt=cache_salt,
            make_guide=self._guides.prepare(constraints, token_ids, params),
        )

    def _max_tokens(self, num_prompt: int, asked: int | None) -> int:
        limit = self.plan.max_model_len
        if num_prompt + (asked or 1) > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested {asked or 1} output "
                f"tokens and your prompt contains at least {num_prompt} input tokens, for a total of at least "
                f"{num_prompt + (asked or 1)} tokens. Please reduce the length of the input prompt or the number of "
                "requested output tokens.",
                param="max_tokens" if num_prompt < limit else "prompt",
            )
        return asked or limit - num_prompt

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        if self.args.seed is not None:
            return self.args.seed * 1_000_003 + next(self._request_numbers)
        return secrets.randbits(63)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, at the start of a text and behind a space, as in vLLM."""
        found: list[tuple[int, ...]] = []
        for word in params.bad_words:
            plain = tuple(self.tokenize(word.lstrip(), add_special_tokens=False))
            spaced = tuple(self.tokenize(" " + word.lstrip(), add_special_tokens=False))
            found.append(plain)
            if spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        return tuple(found)


def _one_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise RequestError(
            "a prompt is a text, a list of token ids, or {'prompt': …} or {'prompt_token_ids': …}", param="prompt"
        ) from None
