"""The self-check passes what is right, and says in one line what is wrong."""

from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kernels import self_check
from engine.runner.kernels.self_check import GPU_KERNELS, AttentionShape, attention_problem
from tests.engine.runner.kernels.host_kernels import HostKernels, memory

SHAPE = AttentionShape(dtype=mx.float32, heads=4, kv_heads=2, key_dim=16, value_dim=16, block_size=16)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 24}, {"sinks": True}, {"softcap": 2.0}, {"value_dim": 24, "scale": 0.1, "block_size": 8},
     {"heads": 21, "kv_heads": 3, "window": 100, "sinks": True}],
    ids=str,
)  # fmt: skip
def test_right_kernels_have_no_problem(dtype: mx.Dtype, options: dict[str, Any]) -> None:
    assert attention_problem(replace(SHAPE, dtype=dtype, **options), HostKernels()) is None


class Faulty(HostKernels):
    """Kernels with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def paged_attention(self, *arrays: Any, **options: Any) -> mx.array:
        if self.fault == "refuses":
            raise ValueError("no such\nthing")
        if self.fault in ("window", "sinks", "softcap"):
            options[self.fault] = None
        if self.fault == "several splits" and options["splits"] == 3:
            options["scale"] *= 1.05
        if self.fault == "write":
            arrays = (*arrays[:2], arrays[2] + 1, *arrays[3:])
        out = super().paged_attention(*arrays, **options)
        if self.fault == "padding":
            return out + (arrays[6] < 0)[:, None, None, None]
        if self.fault == "another slot":
            keys = memory(arrays[3])
            keys[np.isnan(keys)] = 0
        return out * float("nan") if self.fault == "nan" else out

    def collect(self, *arrays: Any, **options: Any) -> tuple[mx.array, mx.array]:
        keys, values = super().collect(*arrays, **options)
        return keys, values * 2 if self.fault == "collect" else values


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        ("refuses", {}, "ValueError: no such thing"),
        ("window", {"window": 24}, "50 tokens: relative error"),
        ("sinks", {"sinks": True}, "2 tokens: relative error"),
        ("softcap", {"softcap": 1.0}, "relative error"),
        ("several splits", {}, "(several splits)"),
        ("write", {}, "relative error"),
        ("padding", {}, "a padding row: relative error"),
        ("nan", {}, "2 tokens: not finite (one split)"),
        ("another slot", {}, "another slot was written"),
        ("collect", {}, "collected values of positions 0 to 25 are wrong"),
    ],
)  # fmt: skip
def test_a_fault_is_said_in_one_line(fault: str, options: dict[str, Any], said: str) -> None:
    problem = attention_problem(replace(SHAPE, **options), Faulty(fault))
    assert problem is not None
    assert said in problem
    assert "\n" not in problem


def test_kernels_have_no_room_for_what_they_do_not_know() -> None:
    """On any machine: a refusal comes before anything is launched."""
    wide = replace(SHAPE, key_dim=4096, value_dim=4096)
    assert "bytes of shared memory" in str(attention_problem(wide, GPU_KERNELS))
    assert "multiple of 16 bytes" in str(attention_problem(replace(SHAPE, key_dim=18), GPU_KERNELS))
    assert "block size of 5" in str(attention_problem(replace(SHAPE, block_size=5), GPU_KERNELS))


def test_a_shape_that_was_right_is_not_checked_again_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str | None] = ["wrong", None]
    monkeypatch.setattr(self_check, "attention_problem", lambda *_: answers.pop(0))
    kernels = self_check.GpuKernels()
    shape = {one.name: getattr(SHAPE, one.name) for one in fields(SHAPE)}
    assert [kernels.attention_problem(**shape) for _ in range(3)] == ["wrong", None, None]
    with pytest.raises(IndexError):
        kernels.attention_problem(**(shape | {"window": 7}))
