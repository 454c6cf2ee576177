"""What a model's own rounding is worth when its pages are compared with mlx-lm's caches."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.runner import warm_up
from engine.runner.backends import ContiguousBackend
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.paged_backend import PagedBackend
from engine.runner.warm_up import choose_backend, sensitivity
from tests.engine.parity.tiny_architectures import VOCAB, tiny_model
from tests.engine.runner.kernels.host_kernels import HostKernels


def half(name: str) -> Any:
    model = tiny_model(name)
    model.set_dtype(mx.bfloat16)
    return model


def test_rounding_the_tokens_vectors_once_moves_logits_little_and_leaves_the_model_as_it_was() -> None:
    model = half("llama")
    kinds = [type(module) for module in model.modules()]
    before = np.array(model(mx.array([[5, 6, 7]])).astype(mx.float32))
    assert 0 < sensitivity(model, VOCAB) < 0.5
    assert [type(module) for module in model.modules()] == kinds
    assert np.array_equal(np.array(model(mx.array([[5, 6, 7]])).astype(mx.float32)), before)


@pytest.mark.parametrize(
    ("difference", "own", "paged"), [(0.2, 0.0, True), (4.5, 2.8, True), (0.5, 0.1, False), (4.5, 0.3, False)]
)
def test_pages_are_kept_where_rounding_alone_explains_what_differs(
    difference: float, own: float, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up, "paging_difference", lambda *_given: difference)
    monkeypatch.setattr(warm_up, "sensitivity", lambda *_given: own)
    kernels: AttentionKernels = HostKernels()
    backend, _ = choose_backend(
        half("qwen3"), paged=True, block_size=16, device="cuda", vocab_size=VOCAB, kernels=kernels
    )
    assert isinstance(backend, PagedBackend if paged else ContiguousBackend)
    backend.close() if paged else backend.reset()


def test_in_float32_on_a_cpu_nothing_is_put_down_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "paging_difference", lambda *_given: 0.01)
    monkeypatch.setattr(warm_up, "sensitivity", lambda *_given: 9.0)
    backend, line = choose_backend(tiny_model("llama"), paged=True, block_size=16, device="cpu", vocab_size=VOCAB)
    assert isinstance(backend, ContiguousBackend)
    assert "its logits differ by 0.01" in str(line)
