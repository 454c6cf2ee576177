"""``LLM``: a model in this process, for Python, for the magics and for the port: one engine, one KV cache.

MLX lives on the engine's own thread; templates and tokenizing happen in the caller's.
"""

import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Unpack

from engine.batch.offline import chat_requests, one_conversation, one_request, params_of_each, prompt_requests, run_all
from engine.batch.score import Score, score_text
from engine.chat.request import ChatPreparer, ChatRequest, Message, PreparedRequest, PromptRequest, TemplateOptions
from engine.core.request import Standing
from engine.errors import RequestError
from engine.explain.explainer import Explainer, Explanation
from engine.explain.gauge import SpeedGauge
from engine.explain.request_log import RequestLog
from engine.models.resolve import resolve
from engine.outputs import CompletionDelta, RequestOutput
from engine.params.engine_args import EngineArgs
from engine.params.live_sampling import LiveSampling
from engine.params.sampling_params import SamplingParams
from engine.params.settings import Settings
from engine.params.structured_outputs import plain_schema
from engine.runner.device.devices import describe_device, prepare_backend
from engine.runner.device.faults import check_device
from engine.runner.device.memory import active_memory as memory_in_use
from engine.runner.device.placement import place
from engine.runtime.activity import Activity, BlockMap
from engine.runtime.async_deltas import AsyncDeltas
from engine.runtime.interrupt import submitted
from engine.runtime.load_clock import LoadClock
from engine.runtime.metrics import EngineMetrics
from engine.runtime.neighbours import Notice
from engine.runtime.preflight import FoundModel
from engine.runtime.request_maker import RequestMaker
from engine.runtime.stream import RequestStream
from engine.text.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pandas

    from engine.batch.bench import Bench
    from engine.batch.kernel_bench import KernelBench
    from engine.memory.plan import MemoryPlan
    from engine.openai.server import ServerHandle
    from engine.runner.kv.attention_path import AttentionPath
    from engine.runtime.activity import EngineStats
    from engine.runtime.builder import BuiltEngine
    from engine.runtime.llm_engine import LLMEngine
    from engine.runtime.load_clock import LoadClock

logger = logging.getLogger("engine")
Progress = Callable[[str, int, int], None]
Prompt = str | Sequence[int] | Mapping[str, Any]

__all__ = ["LLM", "RequestStream", "memory_in_use"]


class LLM:
    """Loads ``model`` and serves it until :meth:`close`.

    ``options`` are vLLM's engine flags as keywords (``max_model_len=2048``, ``gpu_memory_utilization=0.5`` …);
    ``VLLM_METAL_*`` variables count where a keyword is not given. ``progress(stage, done, total)`` is called while
    loading (in bytes, kernels in numbers); raising in it cancels the load. Raises ModelNotFoundError, ModelLoadError,
    ConfigError or MemoryPlanError, each in one line, leaving nothing behind.
    """

    def __init__(self, model: str | os.PathLike[str], *, progress: Progress | None = None, **options: Any) -> None:
        self.args = EngineArgs.from_options(model, options)
        check_device()
        place(self.args.device)
        prepare_backend()  # before anything imports mlx
        self.resolved = resolved = resolve(self.args.model, self.args.revision, progress=progress)
        clock = LoadClock()
        found = FoundModel.of(self.args, resolved)
        from engine.runtime.loading import start_engine  # once there is memory for it

        self.tokenizer: Tokenizer = found.tokenizer
        clock.ended("tokenizer")
        self.metrics = EngineMetrics(self.args.names[0])
        self.settings = Settings()
        self.preparer = ChatPreparer(self.tokenizer, found.template, found.parsers, self.settings)
        self.defaults = found.sampling_defaults(self.settings)
        self.request_log = RequestLog()
        self._server: ServerHandle | None = None
        self.last_map: pandas.DataFrame | None = None
        self.created = time.time()
        self._serving = threading.Lock()
        self._thread, built = start_engine(resolved, self.args, self.tokenizer, self.metrics, progress)
        # Also when the object is dropped, and at exit, where a thread inside MLX would abort the process.
        weakref.finalize(self, self._thread.close)
        try:
            self._take(built, found, clock)
        except BaseException:  # an interrupt too: whoever meets it has no object to close
            self._thread.close()
            raise

    def _take(self, built: "BuiltEngine", found: FoundModel, clock: "LoadClock") -> None:
        """Be the model that was built."""
        from engine.runtime.snapshot import SnapshotPoller, snapshot_activity, snapshot_blocks

        self.plan: MemoryPlan = built.plan
        self.load_seconds = {**clock.seconds, **built.seconds}
        """What the parts of the load took, one after the other."""
        self.attention_paths: tuple[AttentionPath, ...] = built.attention_paths
        """Which way each kind of layer attends: by kernels over pages, or not and why."""
        self._requests = RequestMaker.of_model(
            self.args, built.config, self.tokenizer, found.parsers, built.engine.runner.vocab_size
        )
        more = (found.parsers.note, self.defaults.note(), self._requests.structured_outputs.note)
        self.notes = [*built.notes, *filter(None, more)]
        self.gauge = SpeedGauge(self._thread, self.args, self.attention_paths, self.notes)
        self._activity = SnapshotPoller(self._thread, snapshot_activity)
        self._blocks = SnapshotPoller(self._thread, snapshot_blocks)
        follow = weakref.WeakMethod(self._follow_settings)
        self.settings.on_change(lambda: (method := follow()) and method())
        self._reuses_prefixes = built.engine.scheduler.kv.groups[0].pool.enable_caching
        self._notice = self._thread.call(lambda _: Notice())
        weakref.finalize(self, self._notice.close)
        self.tell_neighbours()

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

    @property
    def server(self) -> "ServerHandle | None":
        """The running server's handle."""
        server = self._server
        return server if server is not None and server.running else None

    def sampling_params(self, **given: Any) -> SamplingParams:
        """Sampling values of a request with ``given``; ``max_tokens`` None means up to the end of the context."""
        return self.defaults.resolve(given)

    @property
    def template_variables(self) -> frozenset[str]:
        """What of ``chat_template_kwargs`` the chat template reads, such as ``enable_thinking``."""
        return self.preparer.template.variables

    @property
    def reasoning_parser(self) -> str | None:
        """The name of the parser of thoughts, None where there is none."""
        return self.preparer.parsers.reasoning_parser

    @property
    def tool_call_parser(self) -> str | None:
        """The name of the parser of tool calls, None where there is none."""
        return self.preparer.parsers.tool_call_parser

    @property
    def takes_tools(self) -> bool:
        """Whether tools can be used: the chat template shows them, and a parser reads the model's calls."""
        return self.preparer.takes_tools

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer (vLLM's name)."""
        return self.tokenizer

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
        reasoning_effort: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a chat; ``chat_template`` is Jinja text (sandboxed) or a name among the model's own."""
        options = TemplateOptions(
            chat_template,
            chat_template_kwargs or {},
            reasoning_effort,
            documents,
            add_generation_prompt,
            continue_final_message,
        )
        return self.preparer.render(messages, tools, options)

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        """What :meth:`submit` takes: prompt, parser and constraints of ``request``. Raises RequestError."""
        return self.preparer.prepare(request, self.plan.max_model_len)

    def submit(
        self, request: PreparedRequest, *, request_id: str | None = None, **standing: Unpack[Standing]
    ) -> RequestStream:
        """Queue a prepared request and return at once: the only way to the engine.

        ``standing``: ``priority``, ``cache_salt``, ``traceless`` and ``served`` of :class:`NewRequest`. Raises
        EngineClosedError, and ContextLengthError or another RequestError for what can never be served.
        """
        request_id = request_id or f"req-{uuid.uuid4().hex}"
        made = self._requests.make(
            request_id, request.token_ids, request.params, max_model_len=self.plan.max_model_len,
            constraints=request.constraints, make_parser=request.account.make_parser, scored_from=request.scored_from,
            **standing,
        )  # fmt: skip
        if self._notice.is_old:
            self.tell_neighbours()
        thread = self._thread
        stream = RequestStream(
            request_id, request.prompt, request.token_ids, request.params, lambda: thread.abort(request_id),
            lambda: thread.finish_thinking(request_id),
        )  # fmt: skip
        submitted(stream)
        try:
            thread.submit(made, stream)
            if request.remembered and not made.traceless:
                self.request_log.add(stream, request, max_tokens=made.max_tokens, cache_salt=made.cache_salt)
        except BaseException:
            stream.abort()  # an interrupt leaves nobody who could; a refused one is over
            raise
        return stream

    def submit_prompt(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        traceless: bool = False,
        **fields: Any,
    ) -> RequestStream:
        """:meth:`submit` for a raw prompt, text or token ids; ``fields`` as in :class:`PromptRequest`."""
        prepared = self.prepare(PromptRequest(prompt=prompt, sampling=params, **fields))
        standing = Standing(priority=priority, cache_salt=cache_salt, traceless=traceless)
        return self.submit(prepared, request_id=request_id, **standing)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; results in order. Interruptible: all are then aborted.

        A prompt is a string, token ids, or vLLM's ``{"prompt": …}`` or ``{"prompt_token_ids": …}``.
        Without ``sampling_params`` the model's recommended values apply, with vLLM's 16 tokens.
        """
        requests = prompt_requests(prompts, sampling_params, self.sampling_params)
        return run_all(self._start, requests, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Reply to one conversation or many. ``template`` takes what :meth:`render_chat` takes, and ``tool_choice``.

        A text is what the model wrote, the marks of thoughts and calls included: :func:`engine.parse_output` reads it.
        """
        requests = chat_requests(messages, sampling_params, self.sampling_params, template)
        return run_all(self._start, requests, use_tqdm=use_tqdm)

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
        replicas: int | Sequence[str] | None = None,
        **params: Any,
    ) -> "pandas.DataFrame":
        """Answer ``template`` (Jinja2) for every row of ``rows``: ``llm.map(df, "Summarise: {{ text }}")``.

        ``rows``: a DataFrame, a Series, or any iterable of mappings or texts (``{{ text }}``). ``params`` are
        sampling values and ``system``; those given as lists, and a list of templates, make a grid. ``raw``: no
        chat template. ``schema``: the answers are JSON of this schema (a dict, a pydantic model, or True).
        ``variables``: for the template, beside the row's own.

        The result is in row order with the index of ``rows``: prompt, parameters, text, tokens, prompt_tokens,
        cached_tokens, time (seconds), finish_reason, error. A row that fails says so in ``error``, the others go
        on. Interrupting raises MapInterrupted; ``last_map`` has what is done, and ``resume`` takes it from there.

        ``choices`` (labels): nothing is generated, each label's probability is computed (:mod:`engine.batch.choices`).
        Instead of text and tokens the columns are then choice (the likeliest label), p(LABEL) for each, which add up to
        1, and coverage: the probability that the model answers with one of the labels at all.
        ``replicas``: how many copies of the model share the rows, or their devices (``["cuda:0", "cuda:1"]``); each
        beside this one is a process of its own, gone at the end.
        """
        from engine.batch.choices import AnswerForm
        from engine.batch.map import MapRequest, map_prompts
        from engine.batch.replicas import FormClient, replicated

        ends = frozenset(token for token in self._requests.eos_token_ids if token < self._requests.vocab_size)
        form = AnswerForm(raw, plain_schema(schema), chat_template_kwargs or {}, choices, ends)
        own, columns = form.of(self, params)
        request = MapRequest.of(template, params, variables=variables, resume=resume, columns=columns)
        keep = partial(setattr, self, "last_map")
        with replicated(replicas, own, self, FormClient(form, params)) as client:
            return map_prompts(client, rows, request, keep=keep, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> Iterator[CompletionDelta]:
        """Deltas of a reply to a conversation (messages) or of a raw prompt (text or token ids).

        Leaving the loop early ends the request.
        """
        stream = self._start(one_request(prompt, sampling_params or self.sampling_params(), template))
        try:
            yield from stream
        finally:
            stream.abort()

    def astream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> AsyncIterator[CompletionDelta]:
        """:meth:`stream` for ``async for``; cancelling the task ends the request, too."""
        params = sampling_params or self.sampling_params()
        return AsyncDeltas(lambda: self._start(one_request(prompt, params, template)))

    async def achat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **template: Any
    ) -> RequestOutput:
        """:meth:`chat` with one conversation, to be awaited. Cancelling the task, or Ctrl-C, ends the request."""
        (params,) = params_of_each(sampling_params, 1, self.sampling_params)
        stream = self._start(one_conversation(messages, params, template))
        try:
            async for _ in stream:
                pass
            return stream.result()
        finally:
            stream.abort()

    def score(self, text: str, *, num_alternatives: int = 5) -> Score:
        """How likely the model finds ``text``: its perplexity and each token's log-probability.

        ``num_alternatives`` of the likeliest tokens are kept at each place (at most 20). Raises RequestError
        for fewer than two tokens and ContextLengthError for what does not fit.
        """
        return score_text(self.submit_prompt, self.tokenizer, text, num_alternatives, self.plan.max_model_len)

    def serve(self, port: int = 0, **options: Any) -> "ServerHandle":
        """Open the OpenAI port on a background thread (options: ``engine.openai.server.want_server``).

        A port that is open already closes once the new one can open.
        """
        from engine.openai.server import start_server

        with self._serving:
            self._thread.check_open()
            self._server = start_server(self, replaced=self.server, port=port, **options)
            self.tell_neighbours()
            return self._server

    def stats(self) -> "EngineStats":
        """Requests, blocks and counters now."""
        return self._thread.call(lambda engine: engine.stats())

    def what_if(self, **settings: Any) -> "MemoryPlan":
        """The current plan with other ``settings`` (see :func:`engine.memory.planner.what_if`); changes nothing."""
        from engine.memory.planner import what_if

        return what_if(self.plan, **settings)

    def replan(
        self,
        *,
        fraction: float | Literal["auto"] | None = None,
        max_model_len: int | Literal["auto"] | None = None,
        max_num_seqs: int | Literal["auto"] | None = None,
    ) -> "MemoryPlan":
        """Change the memory plan while the engine runs; gives the new :attr:`plan`. Weights and requests stay.

        Where it raises, nothing is changed: ConfigError for values out of range, MemoryPlanError for what does not fit,
        MemoryInUseError where requests under way hold more.
        """
        from engine.runtime.replan import replan

        def change(engine: "LLMEngine") -> "MemoryPlan":
            args = self.args.with_memory(fraction, max_model_len, max_num_seqs)
            plan = replan(engine, self.plan, fraction=fraction, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
            self.plan, self.args = plan, args
            return plan

        plan = self._thread.call(change)
        self.metrics.set_cache_config(num_gpu_blocks=plan.num_blocks, gpu_memory_utilization=plan.fraction)
        self._follow_settings()
        self.tell_neighbours()
        return plan

    def bench(self, **options: Any) -> "Bench":
        """This model's speed, see :class:`engine.batch.bench.Bench`: ``llm.bench(seconds=20).run()``."""
        from engine.batch.bench import Bench

        device = self._thread.call(lambda _: describe_device())
        return Bench(self, f"{device.name} ({device.kind})", self._requests.vocab_size, **options)

    def bench_kernels(self) -> "KernelBench":
        """Whether the GPU kernels are right at this model's shapes, and how fast: see :mod:`engine.batch.kernel_bench`.

        Between steps, on the engine's thread: requests under way wait for one row at a time.
        """
        from engine.batch.kernel_bench import bench_model_kernels

        return bench_model_kernels(self.args.names[0], self._thread)

    def activity(self) -> Activity:
        """Requests under way, counters and recent speed; while a step takes long, as it began (see ``age``)."""
        return self._activity.latest()

    def block_map(self) -> BlockMap:
        """Who holds which KV block; while a step takes long, as it began (see ``age``)."""
        return self._blocks.latest()

    def abort(self, request_id: str) -> None:
        """End a request soon, whoever sent it; its last delta says ``abort``. A request that is over is left alone."""
        self._thread.abort(request_id)

    def finish_thinking(self) -> None:
        """End the thoughts of all requests that think now; their answers follow."""
        self._thread.post(lambda engine: engine.finish_all_thinking())

    def explain(self, count: int = 1) -> Explanation:
        """Why the last request went as it did, whoever sent it; ``count`` 2 is the one before, and so on.

        Measures the device, once and while no request runs. Raises RequestError if it is not among the latest 32.
        """
        self.gauge.measure()
        explainer = Explainer.of_model(
            self.request_log, self.tokenizer, self.plan, attention_paths=self.attention_paths,
            eos_token_ids=self._requests.eos_token_ids, caching_wanted=self.args.enable_prefix_caching,
            reuses_prefixes=self._reuses_prefixes, gauge=self.gauge,
        )  # fmt: skip
        return explainer.explain_latest(count)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._thread.call(lambda engine: engine.scheduler.kv.reset_prefix_cache())

    def close(self) -> None:
        """Close the port, end all requests and give all memory back. Safe to repeat."""
        try:
            if self._server is not None:
                self._server.stop()
        finally:
            self._thread.close()
            self._notice.close()
        self._server = None

    def tell_neighbours(self) -> None:
        """Say to other processes of this user what is held here now (:mod:`engine.runtime.neighbours`)."""
        port = None if self.server is None else self.server.port
        self._notice.write(self.args.names[0], self.plan.usable, port)

    def _start(self, request: ChatRequest | PromptRequest) -> RequestStream:
        return self.submit(self.prepare(request))

    def _follow_settings(self) -> None:
        """Hand the live settings to the requests under way."""
        budget = self.settings.thinking().get("thinking_token_budget")
        try:
            live = LiveSampling(self.defaults.resolve({}), budget, self.plan.max_model_len)
        except RequestError as error:  # new requests are refused with it; those under way go on as they are
            logger.warning("live settings contradict the model's own: %s", error)
            return
        self._thread.post(lambda engine: engine.follow(live))
