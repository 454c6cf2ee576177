"""``SamplingParams`` refuses values of the wrong kind by name, whoever gives them."""

from typing import Any

import numpy as np
import pytest

from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("temperature", "0.5", "be a number, got '0.5'"),
        ("top_p", None, "be a number, got None"),
        ("min_p", True, "be a number"),
        ("max_tokens", 2.5, "be a whole number or None, got 2.5"),
        ("max_tokens", True, "be a whole number or None, got True"),
        ("n", None, "be a whole number"),
        ("seed", "7", "be a whole number or None"),
        ("ignore_eos", "yes", "be True or False"),
        ("stop", 5, "be a list of texts, or one text, got 5"),
        ("stop", [5], "be a list of texts"),
        ("bad_words", "word", "be a list of texts"),
        ("stop_token_ids", ["a"], "be a list of token ids"),
        ("allowed_token_ids", 5, "be a list of token ids"),
        ("logit_bias", {"a": 1}, "map token ids to numbers"),
        ("logit_bias", [1], "map token ids to numbers"),
        ("temperature", float("nan"), "be non-negative"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(name: str, value: Any, must: str) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{name: value})
    assert str(refused.value).startswith(f"{name} must {must}")
    assert refused.value.param == name


def test_numpys_numbers_and_other_lists_are_taken() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), max_tokens=np.int64(3), stop_token_ids=np.array([1, 2]), stop=None, bad_words={"x"}
    )
    assert params.stop_token_ids == (1, 2)
    assert params.stop == ()


def test_a_clone_is_an_equal_copy() -> None:
    params = SamplingParams(temperature=0.3, stop="x")
    assert params.clone() == params
    assert params.clone() is not params
