"""Which way a model runs over pages, where rounding, its own code or a kernel stands in the way."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.runner import warm_up
from engine.runner.backends import ContiguousBackend
from engine.runner.kv.attention_path import describe
from engine.runner.paged_backend import PagedBackend
from engine.runner.warm_up import choose_backend
from tests.engine.parity.bare_engine import BareEngine
from tests.engine.parity.tiny_architectures import VOCAB, tiny_model
from tests.engine.runner.kernels.host_kernels import HostKernels


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_model_of_states_alone_keeps_its_slots_in_half_precision(dtype: mx.Dtype, *, kernels: bool) -> None:
    model = tiny_model("mamba2")
    model.set_dtype(dtype)
    engine = BareEngine(model, kernels=HostKernels() if kernels else None)
    assert engine.note is None
    assert isinstance(engine.backend, PagedBackend)
    engine.backend.close()


def test_what_rounding_the_tokens_vectors_once_changes_is_small_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3")
    model.set_dtype(mx.bfloat16)
    kinds = [type(layer) for _, layer in model.named_modules()]
    exact, coarse = tiny_model("qwen3"), warm_up.sensitivity(model, VOCAB)
    fine = warm_up.sensitivity(exact, VOCAB)
    assert 0 < fine < coarse < 1
    assert [type(layer) for _, layer in model.named_modules()] == kinds


def test_a_model_that_rounding_moves_far_keeps_its_pages_and_one_whose_pages_are_wrong_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("qwen3")
    model.set_dtype(mx.bfloat16)

    class Slightly(HostKernels):
        """Wrong by more than what rounding is taken to be."""

        def attention_problem(self, **_shape: Any) -> None:
            return None

        def paged_attention(self, *given: Any, **how: Any) -> mx.array:
            return super().paged_attention(*given, **how) * 3

    found = {}
    for moved in (1e-3, 10.0):
        monkeypatch.setattr(warm_up, "sensitivity", lambda *_given, moved=moved: moved)
        backend = BareEngine(model, kernels=Slightly()).backend
        assert isinstance(backend, PagedBackend)
        found[moved] = describe(backend.attention_paths)
        backend.close()
    assert "with kernels its logits differ by" in found[1e-3]
    assert found[10.0] == "pages read in place by kernels (4 layers full)"


def test_a_model_that_refuses_to_be_asked_how_far_rounding_moves_it_still_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_given: Any) -> float:
        raise TypeError("one argument too many")

    monkeypatch.setattr(warm_up, "sensitivity", refuses)
    monkeypatch.setattr(warm_up, "paging_difference", lambda *_given: np.inf)
    model = tiny_model("qwen3")
    model.set_dtype(mx.bfloat16)
    engine = BareEngine(model)
    assert "one argument too many" in str(engine.note)


def test_in_float32_on_a_cpu_nothing_is_put_down_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "paging_difference", lambda *_given: 0.01)
    monkeypatch.setattr(warm_up, "sensitivity", lambda *_given: 9.0)
    backend, line = choose_backend(tiny_model("llama"), paged=True, block_size=16, device="cpu", vocab_size=VOCAB)
    assert isinstance(backend, ContiguousBackend)
    assert "its logits differ by 0.01" in str(line)
