"""A scripted model: the LLM's doors without an engine. Words, delays and failures are set per instance."""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.chat.request import Account, ChatRequest, PreparedRequest, PromptRequest
from engine.errors import EngineClosedError, ModelNotFoundError
from engine.models.weight_format import CachedModel
from engine.outputs import CompletionDelta, CompletionOutput, RequestMetrics, RequestOutput
from engine.params.engine_args import EngineArgs
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.sampling_params import SamplingParams
from engine.params.settings import Settings
from engine.text.parse.output_parser import OutputParser, make_output_parser

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
MEMORY = {"bytes": 1_000_000}
MADE: list["FakeLLM"] = []


@dataclass
class FakePlan:
    model_memory: int = 145_000_000
    max_model_len: int = 2048

    def log_line(self) -> str:
        return "metal_limit=51.54GB, fraction=0.90, usable_metal=46.39GB, num_blocks=128, max_tokens_cached=2048"


@dataclass
class FakeStats:
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 128
    num_used_blocks: int = 32
    num_cached_blocks: int = 8
    num_free_blocks: int = 88
    kv_cache_usage: float = 0.25


@dataclass
class FakeServer:
    model: str
    port: int
    host: str
    api_key: str | None
    options: Mapping[str, Any]
    running: bool = True
    base_url: str = field(init=False)

    def __post_init__(self) -> None:
        self.base_url = f"http://{self.host}:{self.port}/v1"

    def stop(self) -> None:
        self.running = False

    def __repr__(self) -> str:
        return f"{self.model} at {self.base_url}"


class FakeStream:
    """Gives the words of ``script`` one by one from a thread, as the engine's thread would."""

    def __init__(
        self, prompt_ids: list[int], params: SamplingParams, script: list[str], delay: float, fail: bool
    ) -> None:
        self.prompt_token_ids = prompt_ids
        self.params = params
        self.finished = False
        self.aborted = False
        self.interrupt_after: int | None = None
        self._deltas: queue.Queue[CompletionDelta] = queue.Queue()
        self._all: list[CompletionDelta] = []
        self._over = threading.Event()
        self._stop = threading.Event()
        self._fail = fail
        self._metrics = RequestMetrics(arrival_time=time.monotonic())
        threading.Thread(target=self._produce, args=(script, delay), daemon=True).start()

    def _produce(self, script: list[str], delay: float) -> None:
        limit = self.params.max_tokens if self.params.max_tokens is not None else len(script) + 1
        self._metrics.first_token_time = time.monotonic()
        for i, word in enumerate(script[:limit]):
            if self._stop.wait(delay):
                break
            self._put(CompletionDelta(0, word if i == 0 else f" {word}", [i]))
        if not self._fail:
            reason = "abort" if self._stop.is_set() else "length" if limit < len(script) else "stop"
            self._put(CompletionDelta(0, "", [], finish_reason=reason))
        self._metrics.last_token_time = time.monotonic()
        self.finished = True
        self._over.set()

    def _put(self, delta: CompletionDelta) -> None:
        self._all.append(delta)
        self._deltas.put(delta)

    def drain(self, timeout: float | None = None) -> list[CompletionDelta]:
        found = []
        if self.interrupt_after is not None and len(self._all) >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt
        try:
            found.append(self._deltas.get(timeout=timeout))
            while True:
                found.append(self._deltas.get_nowait())
        except queue.Empty:
            return found

    def abort(self) -> None:
        self.aborted = True
        self._stop.set()

    def result(self) -> RequestOutput:
        while not self._over.wait(0.05):
            pass
        if self._fail:
            raise EngineClosedError("the engine's thread failed; load the model again")
        text = "".join(d.text for d in self._all)
        tokens = [t for d in self._all for t in d.token_ids]
        completion = CompletionOutput(0, text, tokens, finish_reason=self._all[-1].finish_reason)
        return RequestOutput("r", None, self.prompt_token_ids, [completion], True, None, self._metrics, 4)


class FakeLLM:
    """What ``engine.LLM`` promises to the magics."""

    def __init__(self, model: str, *, progress: Any = None, **options: Any) -> None:
        fake_find(EngineArgs(model))
        for done in range(0, 101, 20):
            if progress:
                threading.Thread(target=progress, args=("weights", done, 100)).run()
            if model == "slow":
                time.sleep(5)
        self.args = EngineArgs.from_options(model, options)
        self.plan = FakePlan()
        self.settings = Settings()
        self.notes = ["CPU: float32 (fastest here)"]
        self.closed = False
        self.servers: list[FakeServer] = []
        self.reasoning_parser: str | None = None
        self.tool_call_parser: str | None = None
        self.tokenizer: Any = None
        self.takes_tools = True
        self.template_variables = frozenset({"enable_thinking"})
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

    @property
    def defaults(self) -> SamplingDefaults:
        return SamplingDefaults({}, {}, self.settings)

    def sampling_params(self, **given: Any) -> SamplingParams:
        return self.defaults.resolve(given)

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        if isinstance(request, PromptRequest):
            assert isinstance(request.prompt, str)
            text, account = request.prompt, Account(request.source)
        else:
            self.template_kwargs.append(request.template.variables())
            text = "".join(f"<{m['role']}>{m['content']}" for m in request.messages) + "<assistant>"
            account = Account(request.source, (), lambda: self._parser(request, text))
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

    def submit(self, request: PreparedRequest) -> FakeStream:
        self.prepared.append(request)
        logging.getLogger("engine.fake").info("request submitted")
        stream = FakeStream(request.token_ids, request.params, self.words, self.delay, self.fail)
        stream.interrupt_after = self.interrupt_after
        self.streams.append(stream)
        return stream

    def submit_prompt(self, prompt: str, params: SamplingParams) -> FakeStream:
        return self.submit(self.prepare(PromptRequest(prompt=prompt, sampling=params)))

    def serve(
        self, port: int = 0, host: str = "127.0.0.1", api_key: Any = None, no_api_key: bool = False, **options: Any
    ) -> FakeServer:
        key = None if no_api_key else api_key[0] if api_key else "random"
        self._stop_servers()
        self.servers.append(FakeServer(self.args.names[0], port or 54321, host, key, options))
        return self.servers[-1]

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


def fake_find(args: EngineArgs, progress: Any = None) -> None:
    if args.model == "missing":
        raise ModelNotFoundError("no model named missing here; %vllm_metal load smollm2 fetches one")


def fake_models() -> list[CachedModel]:
    from pathlib import Path

    return [
        CachedModel("smollm2", Path("/m/smollm2.gguf"), 93_000_000, "gguf"),
        CachedModel("org/Tiny-0.1B", Path("/m/tiny"), 200_000_000, "folder"),
    ]


@dataclass(frozen=True)
class PlanRecord:
    model: str
    options: Mapping[str, Any]


def fake_plan(model: str, **options: Any) -> PlanRecord:
    return PlanRecord(model, options)


def replacements() -> Iterator[tuple[str, Any]]:
    """(name in vm_magic.state.session, what stands in for it)."""
    yield "new_llm", lambda model, progress, **options: FakeLLM(model, progress=progress, **options)
    yield "find_model", fake_find
    yield "memory_in_use", lambda: MEMORY["bytes"]
    yield "new_plan", fake_plan
    yield "new_plan_table", fake_plan
    yield "cached_models", fake_models


def install() -> None:
    """Stand in for the engine in this process (a kernel under test runs this)."""
    import vm_magic.state.session

    for name, stand_in in replacements():
        setattr(vm_magic.state.session, name, stand_in)
