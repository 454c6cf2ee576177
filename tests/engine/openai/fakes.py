"""An engine without a model: it replies with a fixed text, slowly, badly or not at all, as a test wants."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Unpack, cast

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HFTokenizer

from engine.chat.request import ChatPreparer, ChatRequest, PreparedRequest, PromptRequest
from engine.core.request import Standing
from engine.errors import ContextLengthError, EngineClosedError, GenerationError, RequestError
from engine.memory.plan import MemoryPlan
from engine.openai.serving.backend import ServedEngine
from engine.outputs import CompletionDelta, Logprob, LogprobsAtPosition
from engine.params.engine_args import EngineArgs
from engine.params.sampling_params import SamplingParams
from engine.params.settings import Settings
from engine.runtime.metrics import EngineMetrics
from engine.runtime.stream import RequestStream
from engine.text.parse.parser_choice import ParserChoice
from engine.text.template.chat_template import ChatTemplate
from engine.text.tokens.detokenizer import Detokenizer
from engine.text.tokens.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}{% endfor %}"
    "{% if raise_please %}{{ raise_exception('the template says no') }}{% endif %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}{{ extra }}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte; ``<|start|>`` (256) and ``<|end|>`` (257, EOS) are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hf = HFTokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    hf.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 256)])
    return Tokenizer(hf, named_tokens={"eos_token": "<|end|>"})


class FakeLLM:
    """Fits ``ServedEngine``. Attributes steer every later request.

    ``reply``: the text; ``token_seconds``: the pause before each token; ``prefill_seconds``: before
    the first; ``fail_after``: raise GenerationError after so many tokens; ``abort_after``: the
    engine aborts by itself.
    """

    def __init__(self, reply: str = "Hello, wörld!", max_model_len: int = 512) -> None:
        self.args = EngineArgs(model="org/fake-model", served_model_name=("fake", "org/fake-model"))
        self.tokenizer = byte_tokenizer()
        self.plan = cast(MemoryPlan, SimpleNamespace(max_model_len=max_model_len))
        self.settings = Settings()
        self.metrics = EngineMetrics("fake")
        self.created = 1_700_000_000.0
        self.closed = False
        self.reply = reply
        self.token_seconds = 0.0
        self.prefill_seconds = 0.0
        self.fail_after: int | None = None
        self.abort_after: int | None = None
        self.submitted: list[RequestStream] = []
        self.prepared: list[PreparedRequest] = []
        self.options: list[dict[str, Any]] = []
        self.aborted = threading.Event()
        self.reasoning_parser: str | None = None
        self.tool_call_parser: str | None = None
        self.chat_template = ChatTemplate(TEMPLATE)

    @property
    def preparer(self) -> ChatPreparer:
        parsers = ParserChoice(self.reasoning_parser, self.tool_call_parser, None, frozenset())
        return ChatPreparer(self.tokenizer, self.chat_template, parsers, self.settings)

    def prepare(self, request: ChatRequest | PromptRequest) -> PreparedRequest:
        return self.preparer.prepare(request, self.plan.max_model_len)

    def sampling_params(self, **given: Any) -> SamplingParams:
        wanted = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**{"max_tokens": None, **self.settings.snapshot(), **wanted})

    def submit(
        self,
        request: PreparedRequest,
        *,
        request_id: str | None = None,
        **standing: Unpack[Standing],
    ) -> RequestStream:
        if self.closed:
            raise EngineClosedError("The engine is closed: load a model again.")
        ids, params = request.token_ids, request.params
        if not ids:
            raise RequestError("The prompt is empty: give at least one token.", param="prompt")
        if len(ids) + (params.max_tokens or 1) > self.plan.max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self.plan.max_model_len} tokens. However, …", param="prompt"
            )
        gone = threading.Event()

        def abort() -> None:
            gone.set()
            self.aborted.set()

        stream = RequestStream(request_id or "fake", request.prompt, ids, params, abort)
        self.submitted.append(stream)
        self.prepared.append(request)
        given = {
            "request_id": request_id,
            **standing,
            "constraints": request.constraints,
            "notes": request.account.notes,
        }
        self.options.append(given)
        threading.Thread(target=self._generate, args=(stream, gone), daemon=True).start()
        return stream

    def _generate(self, stream: RequestStream, gone: threading.Event) -> None:
        params = stream.params
        if gone.wait(self.prefill_seconds):
            return self._end_aborted(stream)
        if params.prompt_logprobs is not None:
            stream.prompt_logprobs = [None, *self.logprobs(stream.prompt_token_ids[1:], params.prompt_logprobs)]
        tokens = self.tokenizer.encode(self.reply, False)[: params.max_tokens]
        texts = [Detokenizer(self.tokenizer, stream.prompt_token_ids, params) for _ in range(params.n)]
        running = set(range(params.n))
        reason = "length" if len(tokens) == params.max_tokens else "stop"
        for position, token in enumerate(tokens):
            if gone.wait(self.token_seconds) or position == self.abort_after:
                return self._end_aborted(stream)
            if position == self.fail_after:
                return stream.end(GenerationError("The engine failed on this request: out of luck."))
            for index in sorted(running):
                last = position == len(tokens) - 1
                step = texts[index].step([token], finished=last)
                over = "stop" if step.stop_reason else (reason if last else None)
                logprobs = None if params.logprobs is None else self.logprobs([token], params.logprobs)
                stream.put(CompletionDelta(index, step.text_delta, [token], logprobs, over, step.stop_reason))
                if over:
                    running.discard(index)
        stream.end()
        return None

    def _end_aborted(self, stream: RequestStream) -> None:
        for index in range(stream.params.n):
            stream.put(CompletionDelta(index, "", [], None, "abort"))
        stream.end()

    def logprobs(self, tokens: Sequence[int], num_top: int) -> list[LogprobsAtPosition]:
        """The token itself (rank 2), then the likeliest: tokens 65, 66 …; one is minus infinity."""
        text = self.tokenizer.token_text
        found: list[LogprobsAtPosition] = []
        for token in tokens:
            at = {token: Logprob(-1.5, 2, text(token))}
            for rank in range(num_top):
                other = 65 + rank if 65 + rank != token else 95
                at[other] = Logprob(-0.25 if rank == 0 else float("-inf"), rank + 1, text(other))
            found.append(at)
        return found


def served(llm: FakeLLM) -> ServedEngine:
    """``llm`` as the port sees it: a type checker finds what it lacks."""
    return llm
