"""A sampling parameter is described once, and every place that lists parameters reads it there."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from engine.errors import RequestError
from engine.explain.explainer import sampling_values
from engine.openai.schema.messages_protocol import MessagesRequest
from engine.openai.schema.protocol import SAMPLING_FIELDS, ChatCompletionRequest, CompletionRequest
from engine.openai.schema.responses_protocol import ResponsesRequest
from engine.params.live_sampling import LIVE_NAMES
from engine.params.sampling_field import NUMBER, Range
from engine.params.sampling_params import COMMON, CONSTRAINTS, PARAMETERS, SamplingParams
from vm_magic.panel.sampling import FIELDS, SLIDERS
from vm_magic.state.chat_flags import SAMPLING_FLAGS
from vm_magic.state.settings_text import SETTABLE, check_setting

BODIES = (ChatCompletionRequest, CompletionRequest, MessagesRequest, ResponsesRequest)


def test_every_field_but_the_sources_is_described() -> None:
    assert [*PARAMETERS, "sources"] == [field.name for field in fields(SamplingParams)]


def test_the_common_parameters_stand_in_one_order_everywhere() -> None:
    sliders = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
    expected = [*sliders, "max_tokens", "seed"]
    assert [name for name in COMMON if name in expected] == expected
    assert [dest for _, dest, _, _ in SAMPLING_FLAGS] == list(COMMON)
    assert [value.name for value in sampling_values(SamplingParams(), 16)] == list(COMMON)
    assert [name for name in SLIDERS if name in expected] == sliders
    assert list(SLIDERS) == [name for name in COMMON if name in SLIDERS]


def test_a_request_body_takes_what_is_sent_under_the_parameters_own_name() -> None:
    for body in BODIES:
        assert {name for name, known in PARAMETERS.items() if known.wire == "all"} <= body.model_fields.keys()
    assert set(SAMPLING_FIELDS) <= ChatCompletionRequest.model_fields.keys() & CompletionRequest.model_fields.keys()
    assert not {"n", "prompt_logprobs"} & (MessagesRequest.model_fields.keys() | ResponsesRequest.model_fields.keys())
    body = CompletionRequest.model_validate({"prompt": "a", "stop": "b", "stop_token_ids": [1], "top_k": 2})
    assert [getattr(body, name) for name in ("stop", "stop_token_ids", "top_k", "min_p")] == ["b", [1], 2, None]
    with pytest.raises(ValueError, match="min_p"):
        CompletionRequest.model_validate({"prompt": "a", "min_p": "much"})


def test_what_can_be_set_has_a_control_in_the_panel_and_what_is_live_can_be_set() -> None:
    assert {*SLIDERS, *FIELDS} == {name for name, known in PARAMETERS.items() if known.settable}
    assert {*SLIDERS, *FIELDS} < set(SETTABLE)
    assert set(LIVE_NAMES) <= {*SLIDERS, *FIELDS}
    assert not {*CONSTRAINTS, "n"} & {*SLIDERS, *FIELDS}


@pytest.mark.parametrize("name", SLIDERS)
def test_the_ends_of_a_slider_are_values_that_can_be_set(name: str) -> None:
    slider = SLIDERS[name]
    assert [SamplingParams(**{name: end}) for end in (slider.low, slider.high)]


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "must"),
    [
        (Range(0, 1), (0, 0.5, 1), (-0.1, 1.1, float("nan")), "be in [0, 1]"),
        (Range(0, 1, low_open=True), (0.1, 1), (0, -1), "be in (0, 1]"),
        (Range(1), (1, 1e300), (0, float("inf"), float("nan")), "be at least 1"),
        (Range(high=3), (-5, 3), (4,), "be at most 3"),
        (Range(0, must="be non-negative"), (0,), (-1,), "be non-negative"),
    ],
)
def test_a_range_says_what_is_inside_and_how_it_reads(
    bounds: Range, inside: tuple[float, ...], outside: tuple[float, ...], must: str
) -> None:
    assert str(bounds) == must
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0, True, "3"])
def test_a_setting_of_the_wrong_kind_is_refused_by_name(value: Any) -> None:
    with pytest.raises(RequestError, match="top_k must be a whole number"):
        check_setting("top_k", value)


def test_a_number_may_be_whole_as_a_setting_but_not_a_switch() -> None:
    assert NUMBER.takes_setting(1)
    assert not NUMBER.takes_setting(True)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("seed", np.int64(3), 3),
        ("top_k", np.uint8(5), 5),
        ("temperature", np.float64(0.5), 0.5),
        ("temperature", 1, 1),
        ("stop_token_ids", np.array([1, 2]), (1, 2)),
        ("logit_bias", {np.int64(5): np.float32(2)}, {5: 2.0}),
        ("logit_bias", {5: -math.inf}, {5: -math.inf}),
    ],
)
def test_values_are_kept_as_pythons_own(name: str, value: Any, kept: Any) -> None:
    found = getattr(SamplingParams(**{name: value}), name)
    assert found == kept
    assert type(found) is type(kept)
    for one in found if isinstance(found, tuple) else [*found, *found.values()] if isinstance(found, dict) else []:
        assert type(one) in (int, float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("temperature", "repetition_penalty") for value in (10**400, 1e39)],
        *[("logit_bias", {5: value}) for value in (10**400, 1e39, -1e39)],
        *[(name, -(10**400)) for name in ("temperature", "seed", "min_tokens")],
        *[(name, True) for name in ("seed", "temperature", "max_tokens")],
        ("stop_token_ids", [True]),
        ("stop", b"bytes"),
    ],
)
def test_numbers_that_logits_cannot_be_computed_with_are_refused_in_a_line(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must [^\n]{{1,200}}$"):
        SamplingParams(**{name: value})
