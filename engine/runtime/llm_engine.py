"""The engine: single-threaded and deterministic. Read :meth:`LLMEngine.step` first."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.core.request import NewRequest, Request, RequestStatus, check_length
from engine.core.scheduler import Scheduler
from engine.core.step import ScheduledRequest, SchedulerOutput
from engine.errors import GenerationError, GrammarError, OutOfMemoryError, VMMagicError
from engine.format.text import shortened
from engine.memory.step_cost import AdmissionControl
from engine.outputs import CompletionDelta, LogprobsAtPosition
from engine.params.live_sampling import LiveSampling
from engine.params.sampling_params import SamplingParams
from engine.runner.model_runner import InFlightStep, ModelRunner, PromptLogprobs, SampledToken, StepResult
from engine.runtime.activity import EngineStats
from engine.runtime.failures import MEMORY_HELP, NOT_FINITE, failure_of, no_token
from engine.runtime.metrics import EngineMetrics
from engine.runtime.observer import EngineObserver
from engine.runtime.stats_log import log_cut_thought
from engine.runtime.step_tally import StepTally
from engine.runtime.stream import RequestStream, wake_all
from engine.text.tokens.detokenizer import Detokenizer

logger = logging.getLogger("engine")
PATIENCE = 5.0
"""Seconds that a request waits for memory while nothing else runs; then it ends with an error."""
LONG_STEP = 0.02
"""Seconds from which on a step with prompt tokens is waited for where others decode: building the next meanwhile would
save a few percent, and a request that comes would have its first token a whole step later."""
MakeDetokenizer = Callable[[list[int], SamplingParams], Detokenizer]


@dataclass(eq=False, slots=True)
class _Completion:
    """One of a request's completions, with its text under way."""

    request: Request
    detokenizer: Detokenizer


@dataclass(eq=False, slots=True)
class _Group:
    """A request with its ``n`` completions and the stream that its deltas go to."""

    stream: RequestStream
    completions: list[_Completion] = field(default_factory=list)
    prompt_logprobs: list[LogprobsAtPosition | None] = field(default_factory=list)
    num_unfinished: int = 0


class LLMEngine:
    """Requests in, deltas out to their streams. ``submit_first`` says how steps overlap.

    On a GPU the next step is submitted before the last one's tokens are read. On a CPU, where MLX
    computes in the submitting thread's time, the next step is built, the last one read, and only
    then the next one submitted: the reader has its token a step sooner, and a step that nobody
    needs any more is never computed.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        make_detokenizer: MakeDetokenizer,
        token_text: Callable[[int], str],
        metrics: EngineMetrics,
        *,
        submit_first: bool,
        admission: AdmissionControl,
        max_model_len: int,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._make_detokenizer = make_detokenizer
        self._token_text = token_text
        self._observer = EngineObserver(metrics)
        self._submit_first = submit_first
        self.admission = admission
        self.patience = PATIENCE
        self.max_model_len = max_model_len
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[Request, tuple[_Group, _Completion]] = {}
        self._in_flight: InFlightStep | None = None
        self._suspects: Sequence[ScheduledRequest] = ()
        self._stuck_since: float | None = None
        self._chunk_seconds = LONG_STEP
        self._news: list[RequestStream] = []
        """Streams with deltas that whoever waits was not told of yet."""
        self._live: LiveSampling | None = None
        self.throughput = self._observer.throughput
        self.tally = StepTally.of_groups(scheduler.kv.groups)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return self.scheduler.has_work or self._in_flight is not None

    @property
    def stuck(self) -> bool:
        """Whether the last :meth:`step` could schedule nothing for lack of memory."""
        return self._stuck_since is not None and self.has_work

    def step(self) -> None:
        """Schedule the next step, build it for the device, and hand out the tokens of the step in flight.

        Each request under way gets the tokens that it still needs, within the step's budget. The next step is submitted
        before the tokens of the last one are read, or after (``submit_first``); a long one is waited for, so that what
        comes meanwhile has its turn in the next. If this raises, :meth:`fail_step` ends the requests of the step that
        failed.
        """
        self._suspects = ()
        scheduled = self.scheduler.schedule()
        self._suspects = scheduled.scheduled_requests
        following = self.runner.execute(scheduled) if scheduled.scheduled_requests else None
        submit_now = self._submit_first or self._in_flight is None
        if following is not None and submit_now:
            following.submit()
        self._end_short_of_memory(waits=following is None and self._in_flight is None)
        self.drain()
        self._suspects = scheduled.scheduled_requests
        self._in_flight = following if submit_now else self._submit_if_wanted(following)
        if self._submit_first and self._takes_long(scheduled):
            self.drain()
        self._observer.state(self.scheduler)

    def add_request(self, new: NewRequest, stream: RequestStream) -> None:
        """Queue a request; its ``n`` completions share the blocks of the prompt.

        Raises ContextLengthError where ``max_model_len`` became shorter than what the request was made for.
        """
        group = self._groups[new.request_id] = _Group(stream)
        check_length(len(new.prompt_token_ids), new.params.max_tokens, self.max_model_len)
        first: Request | None = None
        prompt = list(new.prompt_token_ids)  # whoever sent it may go on with the list
        for index in range(new.params.n):
            request = self._completion_request(new, prompt, index, stream.metrics.arrival_time)
            completion = _Completion(request, self._make_detokenizer(prompt, new.params))
            group.completions.append(completion)
            group.num_unfinished += 1
            self._group_of[request] = (group, completion)
            self._follow(group, request)
            self.scheduler.add(request, fork_of=first if self.runner.backend.paged else None)
            first = first or request
        stream.metrics = group.completions[0].request.metrics

    def abort_request(self, request_id: str) -> None:
        """End a request now: blocks free at once, last deltas say ``abort``. Unknown ids are over already."""
        group = self._groups.get(request_id)
        if group is None:
            return
        logger.info("Aborted request %s.", request_id)
        for completion in group.completions:
            if not completion.request.finished:
                self._finish(group, completion, RequestStatus.FINISHED_ABORTED)
        self._observer.state(self.scheduler)
        self._tell_waiting()

    def finish_thinking(self, request_id: str) -> None:
        """End the thoughts of a request's completions; their answers follow. Unknown ids are over already."""
        group = self._groups.get(request_id)
        for completion in group.completions if group is not None else []:
            request = completion.request
            if request.guide is not None and not request.finished:
                request.guide.finish_thinking(in_flight=request.num_pending > 0)

    def finish_all_thinking(self) -> None:
        """:meth:`finish_thinking` for every request under way."""
        for request_id in list(self._groups):
            self.finish_thinking(request_id)

    def follow(self, live: LiveSampling) -> None:
        """Give requests under way, and those that come, the live value of whatever they did not set themselves."""
        self._live = live
        for group in self._groups.values():
            for completion in group.completions:
                if not completion.request.finished:
                    self._follow(group, completion.request)

    def requests(self) -> list[list[Request]]:
        """The completions of every request under way, in order of arrival."""
        return [[completion.request for completion in group.completions] for group in self._groups.values()]

    def streams(self) -> list[RequestStream]:
        """The streams of every request under way."""
        return [group.stream for group in self._groups.values()]

    def fail_request(self, request_id: str, error: VMMagicError) -> None:
        """End one request with an error. Unknown ids are over already."""
        group = self._groups.get(request_id)
        if group is not None:
            self._fail(group, error)

    def fail_all(self, error: VMMagicError) -> None:
        """End all requests with an error, and start again from empty pages."""
        self._in_flight = None
        for group in list(self._groups.values()):
            self._fail(group, error)
        self.scheduler.kv.reset_prefix_cache()
        self.runner.recover()

    def drain(self) -> None:
        """Hand out the step in flight: then every sampled token is known, and nothing is being computed."""
        last, self._in_flight = self._in_flight, None
        if last is not None:
            self._suspects = last.scheduled_requests
            result = last.read(self._token_text)
            self.tally.add(last.scheduled_requests, last.submitted)
            if any(scheduled.num_tokens > 1 for scheduled in last.scheduled_requests):
                self._chunk_seconds = time.monotonic() - last.submitted
            self._hand_out(result)

    def fail_step(self, error: VMMagicError) -> None:
        """After :meth:`step` or :meth:`drain` raised: end the requests of the step that failed, and only those.

        The others compute their tokens again, since the pages are lost.
        """
        suspects, last = self._suspects, self._in_flight
        if not suspects:
            self.fail_all(error)
            return
        failed = {scheduled.request for scheduled in suspects}
        try:
            self.drain()  # the step before it may be as good as any
        except BaseException as other:  # noqa: BLE001  (then its requests end as well)
            logger.error("the step before failed too: %s", other)
            failed |= {scheduled.request for scheduled in last.scheduled_requests} if last is not None else set()
        for group, _ in [self._group_of[request] for request in failed if request in self._group_of]:
            self._fail(group, error)
        self.start_over()

    def start_over(self) -> None:
        """Have running requests compute everything again, from empty pages; what they sampled is kept."""
        self._in_flight = None
        for request in list(self.scheduler.running):
            request.num_pending = 0
            self.scheduler.preempt(request)
        self.scheduler.kv.reset_prefix_cache()
        self.runner.recover()
        self._observer.state(self.scheduler)

    def stats(self) -> EngineStats:
        """The engine's counters now."""
        pool = self.scheduler.kv.groups[0].pool
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_held_blocks,
            num_cached_blocks=pool.num_free_cached,
            num_free_blocks=pool.num_free_blocks - pool.num_free_cached,
            kv_cache_usage=self.scheduler.kv.usage,
            num_preemptions=self.scheduler.num_preemptions,
            **self._observer.counts.to_dict(),
        )

    def close(self) -> None:
        """Give all memory back."""
        self._in_flight = None
        self._observer.ended()
        self.runner.close()

    def _takes_long(self, step: SchedulerOutput) -> bool:
        """Whether a step computes a prompt beside others, and the last that did took long beside the host's work."""
        prompts = any(scheduled.num_tokens > 1 for scheduled in step.scheduled_requests)
        return prompts and len(step.scheduled_requests) > 1 and self._chunk_seconds >= LONG_STEP

    def _end_short_of_memory(self, *, waits: bool) -> None:
        """Where the engine can do nothing but wait for memory (``waits``), end one request once patience is over."""
        short_of_memory = self.scheduler.short_of_memory
        if not waits or not short_of_memory:
            self._stuck_since = None
            return
        now = time.monotonic()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since >= self.patience:
            self._stuck_since = None
            request = short_of_memory[0]
            missing = request.num_tokens - request.num_computed_tokens
            why = self.admission.shortage(missing, request.num_computed_tokens)
            self._fail(self._group_of[request][0], OutOfMemoryError(f"{why}; {MEMORY_HELP}"))

    def _submit_if_wanted(self, following: InFlightStep | None) -> InFlightStep | None:
        """Submit the next step unless all its requests ended meanwhile.

        A chunk of a prompt is computed all the same: its blocks may be found in the prefix cache already.
        """
        if following is None:
            return None
        unwanted = all(scheduled.request.finished and scheduled.pending for scheduled in following.scheduled_requests)
        if unwanted and self.runner.discard(following):
            return None
        following.submit()
        return following

    @staticmethod
    def _completion_request(new: NewRequest, prompt: list[int], index: int, arrival_time: float) -> Request:
        return Request(
            request_id=new.request_id,
            prompt_token_ids=prompt,
            params=new.params,
            eos_token_ids=new.eos_token_ids,
            max_tokens=new.max_tokens,
            priority=new.priority,
            cache_salt=new.cache_salt,
            traceless=new.traceless,
            served=new.served,
            seed=new.seed + index,
            bad_words_token_ids=new.bad_words_token_ids,
            scored_from=new.scored_from,
            index=index,
            arrival_time=arrival_time,
            guide=None if new.make_guide is None else new.make_guide(),
        )

    def _follow(self, group: _Group, request: Request) -> None:
        live = self._live
        if live is None:
            return
        params = live.params_for(request.params)
        if params is not request.params:
            group.stream.params = request.params = params
            request.max_tokens = live.max_tokens_for(params, request.num_prompt_tokens)
        if request.guide is not None:
            group.stream.default_thinking_budget = live.thinking_token_budget
            request.guide.set_default_budget(live.thinking_token_budget, in_flight=request.num_pending > 0)

    def _hand_out(self, result: StepResult) -> None:
        for prompt in result.prompt_logprobs:
            self._hand_out_prompt(prompt)
        now = time.monotonic()
        num_tokens = 0
        try:
            for sampled in result.tokens:
                if not sampled.scheduled.request.finished:
                    num_tokens += sampled.token_id >= 0
                    self._hand_out_token_safely(sampled, now)
        finally:
            self._tell_waiting()
        self._observer.step(num_tokens, now)

    def _tell_waiting(self) -> None:
        """Wake whoever waits for the deltas that were delivered: once for a step, not for each token."""
        news, self._news = self._news, []
        wake_all(news)

    def _hand_out_prompt(self, prompt: PromptLogprobs) -> None:
        if prompt.request not in self._group_of or prompt.request.index:
            return
        group, _ = self._group_of[prompt.request]
        known = group.prompt_logprobs or [None] * prompt.first
        group.prompt_logprobs = [*known[: prompt.first], *prompt.positions]

    def _hand_out_token_safely(self, sampled: SampledToken, now: float) -> None:
        """A grammar, parser or text that breaks over a token ends its own request, not those of the same step."""
        group, _ = self._group_of[sampled.scheduled.request]
        try:
            self._hand_out_token(sampled, now)
        except BaseException as error:  # noqa: BLE001  (the request is told)
            self._fail(group, failure_of("the model's token could not be read", error))

    def _hand_out_token(self, sampled: SampledToken, now: float) -> None:
        request = sampled.scheduled.request
        group, completion = self._group_of[request]
        if sampled.token_id < 0:
            self._end_without_token(group, request)
            return
        self._observer.token(request, now)
        status = self.scheduler.update(sampled.scheduled, sampled.token_id)
        guide = request.guide
        if guide is not None and guide.error is not None:
            self._fail(group, GrammarError(f"the grammar failed: {guide.error}"))
            return
        text = completion.detokenizer.next_text(sampled.token_id) if status is None else None
        if text is None:
            text, status = self._end_on_stop_string(completion, sampled.token_id, status)
        if len(request.output_token_ids) == 1 and not request.index:
            self._tell_prompt(group, request)
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        delta = CompletionDelta(request.index, text, [sampled.token_id], logprobs)
        if guide is not None:
            delta.thinking_cut = guide.thinking_cut
        self._deliver(group, completion, delta, status)

    def _end_without_token(self, group: _Group, request: Request) -> None:
        why = no_token(request)
        self._fail(group, GenerationError(why))
        if why == NOT_FINITE:  # nor is what it left in pages, and NaN without weight is NaN
            self.scheduler.kv.reset_prefix_cache()
            self.runner.blank(self.scheduler.kv.free_blocks())

    def _end_on_stop_string(
        self, completion: _Completion, token_id: int, status: RequestStatus | None
    ) -> tuple[str, RequestStatus | None]:
        """The text that a token brings, and the completion's status: it may be over by a stop string."""
        request = completion.request
        step = completion.detokenizer.step(
            [token_id], finished=status is not None, ends_on_stop_token=status is RequestStatus.FINISHED_STOPPED
        )
        if step.stop_reason is not None:
            request.stop_reason = step.stop_reason
            self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
            status = request.status = RequestStatus.FINISHED_STOPPED
        return step.text_delta, status

    def _tell_prompt(self, group: _Group, request: Request) -> None:
        """What is known of the prompt, now that its first token is there."""
        group.stream.num_cached_tokens = max(0, request.num_cached_tokens)
        if request.params.prompt_logprobs is not None:
            group.stream.prompt_logprobs = group.prompt_logprobs or [None]
        self._observer.prompt(request)

    def _finish(self, group: _Group, completion: _Completion, status: RequestStatus) -> None:
        """End a completion that its tokens did not end, telling its stream."""
        self.scheduler.finish(completion.request, status)
        step = completion.detokenizer.step([], finished=True)
        delta = CompletionDelta(completion.request.index, step.text_delta, [])
        self._deliver(group, completion, delta, status)

    def _deliver(
        self, group: _Group, completion: _Completion, delta: CompletionDelta, status: RequestStatus | None
    ) -> None:
        if status is not None:
            request = completion.request
            delta.finish_reason, delta.stop_reason = status.finish_reason, request.stop_reason
            log_cut_thought(request)
            self.runner.forget(request)
            del self._group_of[request]
            self._observer.finished(request)
        group.stream.append(delta)
        self._news.append(group.stream)
        if status is not None:
            group.num_unfinished -= 1
            if not group.num_unfinished:
                self._close(group, None)

    def _fail(self, group: _Group, error: VMMagicError) -> None:
        logger.error("Request %s failed: %s", group.stream.request_id, shortened(" ".join(str(error).split()), 200))
        for completion in group.completions:
            self.scheduler.finish(completion.request, RequestStatus.FINISHED_ERROR)
            if completion.request in self._group_of:  # else its end was counted
                self._observer.finished(completion.request)
        self._observer.state(self.scheduler)
        self._close(group, error)

    def _close(self, group: _Group, error: BaseException | None) -> None:
        self._groups.pop(group.stream.request_id, None)
        for completion in group.completions:
            if self._group_of.pop(completion.request, None) is not None:
                self.runner.forget(completion.request)
        self._observer.closed([completion.request for completion in group.completions])
        group.stream.end(error)
