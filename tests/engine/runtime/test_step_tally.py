"""What steps are counted as, and what requests keep of it."""

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.params.sampling_params import SamplingParams
from engine.runtime.step_tally import StepTally, attended


def request(prompt: int) -> Request:
    return Request("one", [1] * prompt, SamplingParams())


def part(of: Request, start: int, num_tokens: int, *, samples: bool = True) -> ScheduledRequest:
    return ScheduledRequest(of, start, num_tokens, (), samples, pending=False)


def test_attended_tokens_are_those_of_a_loop() -> None:
    for window in (None, 1, 3, 8, 100, 0):
        for start, end in ((0, 1), (0, 9), (2, 5), (5, 20), (90, 130)):
            each = [place + 1 if window is None else min(place + 1, window) for place in range(start, end)]
            assert attended(start, end, window) == sum(each), (window, start, end)


def test_a_prompt_then_decodes_are_told_apart_and_marked() -> None:
    now = 10.0
    tally = StepTally([None, 4, 0], clock=lambda: now)
    one = request(6)
    tally.add([part(one, 0, 6)], submitted=9.0)
    assert (tally.totals.prompts, tally.totals.prompt_tokens, tally.totals.prompt_seconds) == (1, 6, 1.0)
    assert tally.totals.pairs == (21, 1 + 2 + 3 + 4 * 3, 0)
    assert tally.totals.mixed == 0
    one.append_output_token(5)
    now = 10.5
    tally.add([part(one, 6, 1)], submitted=9.9)  # submitted while the prompt was computed
    assert (tally.totals.decodes, tally.totals.rows, tally.totals.decode_seconds) == (1, 1, 0.5)
    assert tally.totals.context == (7, 4, 0)
    metrics = one.metrics
    assert metrics.steps_before is not None
    assert metrics.steps_first is not None
    assert metrics.steps_last is not None
    assert (metrics.steps_before.prompts, metrics.steps_first.prompts, metrics.steps_first.decodes) == (0, 1, 0)
    assert metrics.steps_last.decodes == 1


def test_a_prompt_in_chunks_has_its_first_token_with_the_last_of_them() -> None:
    tally = StepTally([None], clock=lambda: 1.0)
    one = request(10)
    for start, num_tokens in ((0, 4), (4, 4), (8, 1)):
        tally.add([part(one, start, num_tokens, samples=False)], submitted=0.5)
        assert one.metrics.steps_first is None
    tally.add([part(one, 9, 1)], submitted=0.5)
    assert one.metrics.steps_first is tally.totals
    first = tally.totals
    one.append_output_token(3)
    for place in (10, 11, 12):
        tally.add([part(one, place, 1)], submitted=0.5)
    assert (one.metrics.steps_first, one.metrics.steps_last) == (first, tally.totals)
    assert tally.totals.since(first).decodes == 3


def test_a_step_with_a_prompt_and_a_reply_is_mixed_and_a_request_that_is_over_keeps_its_marks() -> None:
    tally = StepTally([None], clock=lambda: 1.0)
    replies, asks = request(3), request(5)
    replies.append_output_token(7)
    tally.add([part(replies, 3, 1), part(asks, 0, 4, samples=False)], submitted=0.5)
    assert (tally.totals.mixed, tally.totals.mixed_seconds, tally.totals.decodes) == (1, 0.5, 0)
    assert asks.metrics.steps_first is None
    kept = replies.metrics.steps_last
    replies.status = type(replies.status).FINISHED_LENGTH
    tally.add([part(asks, 4, 1)], submitted=1.0)
    assert replies.metrics.steps_last is kept
    assert asks.metrics.steps_first is tally.totals, "a prompt whose last token is a step of its own"
    asks.append_output_token(1)
    for place in range(5, 8):
        tally.add([part(asks, place, 1)], submitted=1.0)
    assert asks.metrics.steps_last is tally.totals
    assert tally.totals.decodes == 4
