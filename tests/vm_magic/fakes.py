"""A scripted model: the LLM's doors without an engine. Words, delays and failures are set per instance."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from engine.batch.bench import BenchResult, BenchRow
from engine.batch.kernel_bench import KernelBenchResult
from engine.chat.request import Account, ChatRequest, PreparedRequest, PromptRequest
from engine.core.request import Standing
from engine.errors import EngineClosedError, ModelNotFoundError
from engine.memory.cache_spec import FullAttentionSpec
from engine.memory.plan import MemoryPlan
from engine.models.local import ResolvedModel
from engine.models.weight_format import CachedModel
from engine.outputs import CompletionDelta
from engine.params.engine_args import EngineArgs
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.sampling_params import SamplingParams
from engine.params.settings import Settings
from engine.runner.kv.attention_path import NO_KERNELS_ON_CPU, AttentionPath
from engine.runtime.metrics import EngineMetrics
from engine.runtime.stream import RequestStream
from engine.text.parse.output_parser import OutputParser, make_output_parser
from tests.memory_plans import make_plan
from vm_magic.state import session
from vm_magic.state.session import Progress

if TYPE_CHECKING:  # for mypy each stand-in is a subclass, so that its signatures cannot drift from the real class's
    from engine.batch.bench import Bench as _Bench
    from engine.batch.kernel_bench import KernelBench as _KernelBench
    from engine.llm import LLM as _LLM
    from engine.openai.server import ServerHandle as _ServerHandle
    from engine.runner.kernels.bench import KernelRow
    from engine.runtime.activity import EngineStats as _EngineStats
else:  # a kernel under test needs neither MLX nor a web server
    _Bench = _KernelBench = _LLM = _ServerHandle = _EngineStats = object

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
MEMORY = {"bytes": 1_000_000}
MADE: list["FakeLLM"] = []
OTHERS: list[str] = []
"""What is said of other processes, if anything."""


GIGABYTE = 10**9
MODEL_BYTES = 145_000_000


def small_plan() -> MemoryPlan:
    """A plan of 128 blocks, 2048 tokens, on a 64 GB Mac."""
    group = FullAttentionSpec((0,), 22_500_000)
    return make_plan(groups=[group], device_limit=51.54 * GIGABYTE, model_memory=MODEL_BYTES, context_length=2048)


@dataclass(frozen=True, slots=True)
class FakeStats(_EngineStats):
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 128
    num_used_blocks: int = 32
    num_cached_blocks: int = 8
    num_free_blocks: int = 88
    kv_cache_usage: float = 0.25


class FakeServer(_ServerHandle):
    """A port that nobody listens on. ``options``: what was asked of it beside what a test may ask it for."""

    running = True

    def __init__(self, model: str, port: int, host: str, api_key: str | None, options: Mapping[str, Any]) -> None:
        self.model = model
        self.max_model_len = 4096
        self.port = port
        self.host = host
        self.api_key = api_key
        self.options = options
        self.wanted = {**options, "host": host}
        self.taken_port = self.hub_url = None
        self.base_url = f"http://{host}:{port}/v1"

    def stop(self) -> None:
        self.running = False

    def __repr__(self) -> str:
        return f"{self.model} at {self.base_url}"


class FakeStream(RequestStream):
    """Gives the words of ``script`` one by one from a thread, as the engine's thread would."""

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams, script: list[str], delay: float, fail: bool
    ) -> None:
        self._stop = threading.Event()
        super().__init__("r", None, prompt_ids, params, self._stop.set)
        self.num_cached_tokens = 4
        self.interrupt_after: int | None = None
        self._fail = fail
        threading.Thread(target=self._produce, args=(script, delay), daemon=True).start()

    @property
    def aborted(self) -> bool:
        return self._stop.is_set()

    def _produce(self, script: list[str], delay: float) -> None:
        limit = self.params.max_tokens if self.params.max_tokens is not None else len(script) + 1
        self.metrics.first_token_time = time.monotonic()
        for i, word in enumerate(script[:limit]):
            if self._stop.wait(delay):
                break
            self.put(CompletionDelta(0, word if i == 0 else f" {word}", [i]))
        self.metrics.last_token_time = time.monotonic()
        if self._fail:
            self.end(EngineClosedError("the engine's thread failed; load the model again"))
            return
        reason = "abort" if self.aborted else "length" if limit < len(script) else "stop"
        self.put(CompletionDelta(0, "", [], finish_reason=reason))
        self.end()

    def drain(self, timeout: float | None = None) -> list[CompletionDelta]:
        if self.interrupt_after is not None and self.num_tokens >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt
        return super().drain(timeout)


class FakeBench(_Bench):
    """Gives ``rows``; an exception among them is raised."""

    def __init__(self, rows: Sequence[BenchRow | BaseException]) -> None:
        self.rows = rows
        self.result = BenchResult({"model": "tiny", "machine": "a <b>fast</b> one"}, notes=["a note"])

    def run(self) -> Iterator[BenchRow]:
        for row in self.rows:
            if isinstance(row, BaseException):
                raise row
            self.result.rows.append(row)
            yield row
        self.result.complete = True


class FakeKernelBench(_KernelBench):
    """Gives ``rows``; an exception among them is raised."""

    def __init__(self, rows: "Sequence[KernelRow | BaseException]", notes: Sequence[str] = ()) -> None:
        self.rows = rows
        facts = {"device": "a <b>GPU</b> (metal)"} if rows else {}
        self.result = KernelBenchResult(facts, notes=[*notes])

    def run(self) -> "Iterator[KernelRow]":
        for row in self.rows:
            if isinstance(row, BaseException):
                raise row
            self.result.rows.append(row)
            yield row
        self.result.complete = True


class FakeLLM(_LLM):
    """What ``engine.LLM`` promises to the magics."""

    closed = False
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    takes_tools = True
    template_variables = frozenset({"enable_thinking"})

    def __init__(self, model: str, *, progress: Progress | None = None, **options: Any) -> None:
        fake_find(EngineArgs(model))
        for done in range(0, 101, 20):
            if progress:
                threading.Thread(target=progress, args=("weights", done, 100)).run()
            if model == "slow":
                time.sleep(5)
        self.args = EngineArgs.from_options(model, options)
        self.resolved = ResolvedModel(model, Path("nowhere", model), "gguf")
        self.plan = small_plan()
        self.settings = Settings()
        self.attention_paths = (AttentionPath("full", (0,), "reference", NO_KERNELS_ON_CPU),)
        self.notes = ["CPU: float32 (fastest here)"]
        self.metrics = EngineMetrics(self.args.names[0])
        self.defaults = SamplingDefaults({}, {}, self.settings)
        self.servers: list[FakeServer] = []
        self.tokenizer: Any = None
        self.prompt_end = ""
        self.prepared: list[PreparedRequest] = []
        self.words = list(WORDS)
        self.delay = 0.0
        self.fail = False
        self.interrupt_after: int | None = None
        self.prompts: list[Any] = []
        self.template_kwargs: list[Mapping[str, Any]] = []
        self.streams: list[FakeStream] = []
        MEMORY["bytes"] += 145_000_000
        MADE.append(self)

    def sampling_params(self, **given: Any) -> SamplingParams:
        return self.defaults.resolve(given)

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        if isinstance(request, PromptRequest):
            assert isinstance(request.prompt, str)
            text, account = request.prompt, Account(request.source)
        else:
            self.template_kwargs.append(request.template.variables())
            text = "".join(f"<{m['role']}>{m['content']}" for m in request.messages) + "<assistant>"
            account = Account(request.source, (), lambda *, reasoning=None: self._parser(request, text))
        self.prompts.append(text)
        return PreparedRequest(text, [1] * len(text.split()), request.sampling, request.constraints(), account)

    def _parser(self, request: ChatRequest, prompt: str) -> OutputParser:
        return make_output_parser(
            reasoning_parser=self.reasoning_parser,
            tool_call_parser=self.tool_call_parser,
            tools=request.tools,
            tool_choice=request.tool_choice,
            prompt_suffix=prompt + self.prompt_end,
        )

    def submit(
        self,
        request: PreparedRequest,
        *,
        request_id: str | None = None,
        **standing: Unpack[Standing],
    ) -> FakeStream:
        assert request_id is None, "no magic sends it"
        assert not any(standing.values()), "nor these"
        self.prepared.append(request)
        stream = FakeStream(request.token_ids, request.params, self.words, self.delay, self.fail)
        stream.interrupt_after = self.interrupt_after
        self.streams.append(stream)
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
    ) -> FakeStream:
        prepared = self.prepare(PromptRequest(prompt=prompt, sampling=params, **fields))
        standing = Standing(priority=priority, cache_salt=cache_salt, traceless=traceless)
        return self.submit(prepared, request_id=request_id, **standing)

    def serve(self, port: int = 0, **options: Any) -> FakeServer:
        host, keys = options.pop("host", "127.0.0.1"), options.pop("api_key", None)
        key = None if options.pop("no_api_key", False) else keys[0] if keys else "random"
        self._stop_servers()
        self.servers.append(FakeServer(self.args.names[0], port or 54321, host, key, options))
        return self.servers[-1]

    def bench(self, **options: Any) -> FakeBench:
        raise AssertionError(f"a test brings its own bench; asked: {options}")

    @property
    def server(self) -> FakeServer | None:
        return next((server for server in self.servers if server.running), None)

    def stats(self) -> FakeStats:
        return FakeStats()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            MEMORY["bytes"] -= 145_000_000
            self._stop_servers()

    def _stop_servers(self) -> None:
        for server in self.servers:
            server.stop()


def fake_llm(model: str, progress: Progress | None, **options: Any) -> FakeLLM:
    return FakeLLM(model, progress=progress, **options)


def fake_find(args: EngineArgs, progress: Progress | None = None) -> None:
    if args.model == "missing":
        raise ModelNotFoundError("no model named missing here; %vllm_metal load smollm2 fetches one")


def fake_models() -> list[CachedModel]:
    return [
        CachedModel("smollm2", Path("/m/smollm2.gguf"), 93_000_000, "gguf"),
        CachedModel("org/Tiny-0.1B", Path("/m/tiny"), 200_000_000, "folder"),
    ]


@dataclass(frozen=True)
class PlanRecord:
    model: str
    options: Mapping[str, Any]


def fake_memory() -> int:
    return MEMORY["bytes"]


def fake_plan(model: str, **options: Any) -> PlanRecord:
    return PlanRecord(model, options)


def fake_others(planned: int) -> str | None:
    return OTHERS[-1] if OTHERS else None


REPLACED = (
    *("new_llm", "find_model", "memory_in_use", "new_plan", "new_plan_table", "new_card", "cached_models"),
    "others_line",
)
"""Functions of :mod:`vm_magic.state.session` that :func:`install` replaces."""


def install() -> None:
    """Stand in for the engine in this process (a kernel under test runs this)."""
    session.new_llm = fake_llm
    session.find_model = fake_find
    session.memory_in_use = fake_memory
    session.new_plan = fake_plan
    session.new_plan_table = fake_plan
    session.new_card = fake_plan
    session.cached_models = fake_models
    session.others_line = fake_others
