"""Values come to the host in a way in which a device that failed is an exception: never through the buffer protocol."""

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runner.device.host import floats, to_numpy


def test_values_keep_their_shape_and_type_and_are_a_copy() -> None:
    for array in (mx.arange(6).reshape(2, 3), mx.array(1.5), mx.zeros((0, 4), mx.uint8), mx.ones((3, 2)).T):
        values = to_numpy(array)
        assert values.tolist() == array.tolist()
        assert values.shape == array.shape
        assert str(values.dtype) == str(array.dtype).rpartition(".")[2]
    given = mx.zeros(3)
    to_numpy(given)[:] = 1.0
    assert given.tolist() == [0.0, 0.0, 0.0]
    assert floats(mx.array([1.5, -2.0], mx.bfloat16)).tolist() == [1.5, -2.0]


def test_what_fails_while_it_is_computed_is_raised() -> None:
    with pytest.raises(ValueError, match="matmul"):
        to_numpy(mx.matmul(mx.ones((2, 3)), mx.ones((2, 3))))


def spied(original: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    def spy(values: Any = None, *more: Any, **named: Any) -> Any:
        frame = sys._getframe(1)
        if isinstance(values, mx.array) and frame.f_globals.get("__name__", "").startswith("engine."):
            found.append(f"{frame.f_globals['__name__']}:{frame.f_lineno}")
        return original(values, *more, **named)

    return spy


def test_an_engine_reads_no_device_memory_through_the_buffer_protocol(
    tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    for name in ("array", "asarray", "ascontiguousarray"):
        monkeypatch.setattr(np, name, spied(getattr(np, name), found))
    with LLM(str(tiny_model_dir("llama")), max_model_len=128) as llm:
        params = [
            SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1),
            SamplingParams(seed=1, max_tokens=3, top_p=0.9, frequency_penalty=0.5),
        ]
        llm.generate(["Once", "Twice"], params, use_tqdm=False)
    np.array(mx.zeros(2))  # not the engine's
    assert found == []
