"""Every architecture over pages that kernels read and write in place, against mlx-lm.

The kernels here compute in numpy and write into the pages' own memory, as a GPU's do; what is tested is all that is
built upon them: block tables, positions, order, chunks, prefix hits, blocks that are used again, preemption.
"""

import mlx.core as mx
import numpy as np
import pytest

from engine.core.request import Request
from engine.params.sampling_params import SamplingParams
from engine.runner.kv import attention_grid, attention_patch, paged_cache
from engine.runner.paged_backend import PagedBackend
from tests.engine.parity.bare_engine import BareEngine, greedy
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.test_architectures import long_prompt
from tests.engine.parity.tiny_architectures import CONFIGS, VOCAB, build, config_of, tiny_model
from tests.engine.runner.kernels.host_kernels import HostKernels

NUM_TOKENS = 6
MAMBA_2 = {"mamba2", "nemotron_h", "falcon_h1", "granitemoehybrid"}
UNSERVED = {"deepseek_v32", "llama4"}
"""Latent attention that picks tokens by an index of its own; chunks of attention that a model masks for one sequence at
a time."""


def kernel_engine(name: str) -> tuple[BareEngine, HostKernels, PagedBackend]:
    kernels = HostKernels()
    engine = BareEngine(tiny_model(name), kernels=kernels)
    backend = engine.backend
    assert isinstance(backend, PagedBackend)
    assert backend.kernels is not None, backend.attention_paths
    return engine, kernels, backend


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in UNSERVED])
def test_pages_read_in_place_give_mlx_lms_tokens(name: str) -> None:
    engine, kernels, backend = kernel_engine(name)
    prompts = mixed_prompts(5, VOCAB, 90, seed=1)
    expected = [greedy(engine.backend.model, prompt, NUM_TOKENS) for prompt in prompts]
    try:
        for chunk in (512, 512, 16):  # at once, from the prefix cache, in chunks
            if chunk == 16:
                engine.start(chunk=16)
            assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
        assert not paged_cache._lent
        attends = {path.kind: path.backend for path in backend.attention_paths}
        kinds = {kind for kind in ("full", "latent") if kind in attends}
        assert all(attends[kind] == "paged" for kind in {*kinds, *({"state"} & attends.keys())})
        attended = kernels.calls["paged_attention"] + kernels.calls["latent_attention"]
        assert bool(kinds) == (attended > 0 < kernels.calls["collect"])
        moved = kernels.states.calls
        assert ("state" in attends) == (moved["write_slots"] > 0 or moved["delta_step"] > 0 < moved["delta_scan"])
        assert (name in MAMBA_2) == (moved["ssm_step"] > 0 < moved["conv_step"])
    finally:
        engine.backend.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_packed_pages_give_the_tokens_and_the_pages_of_the_reference_path(name: str, kv_cache_dtype: str) -> None:
    """Of the first layer, whose rows differ by no more than the rounding of the products that they come from."""
    model = build({**config_of(name), "head_dim": 32})
    prompts = mixed_prompts(5, VOCAB, 90, seed=1)
    outputs, memories = [], []
    for kernels in (HostKernels(), None):
        engine = BareEngine(model, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
        backend = engine.backend
        assert isinstance(backend, PagedBackend)
        assert {path.backend for path in backend.attention_paths} == {"paged" if kernels else "reference"}
        outputs.append([one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)])
        first_layer = [backend.pools[0].keys[0], backend.pools[0].values[0]]  # type: ignore[attr-defined]
        memories.append([np.array(array) for pages in first_layer for array in pages.arrays])
        if kernels is not None:
            outputs.append([one.output_token_ids for one in engine.start(chunk=16).generate(prompts, NUM_TOKENS)])
            assert min(kernels.calls["paged_attention"], kernels.calls["collect"]) > 0
        backend.close()
    assert outputs[0] == outputs[1] == outputs[2]
    for ours, reference in zip(*memories, strict=True):
        alike = ours == reference if ours.dtype == np.uint32 else np.isclose(ours, reference, rtol=1e-4, atol=1e-6)
        assert alike.mean() > 0.99


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "gemma4_text", "qwen3_5", "lfm2", "nemotron_h", "deepseek_v3"]
)
def test_blocks_are_used_again_at_once_and_requests_give_way(name: str) -> None:
    engine, _, _ = kernel_engine(name)
    prompts = mixed_prompts(9, VOCAB, 60, seed=4)
    expected = [greedy(engine.backend.model, prompt, NUM_TOKENS) for prompt in prompts]
    try:
        blocks = max(len(prompt) + NUM_TOKENS for prompt in prompts) // 8 + 3
        engine.start(num_blocks=blocks, num_seqs=5, chunk=24)
        assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
        assert engine.scheduler.num_preemptions > 0
        twice = [row for row in expected[:3] for _ in range(2)]
        assert [one.output_token_ids for one in engine.start().generate(prompts[:3], NUM_TOKENS, n=2)] == twice
    finally:
        engine.backend.close()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "gemma4_text", "qwen3_5"])
def test_chunks_padded_to_few_shapes_give_mlx_lms_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_grid, "GRID", 32)
    monkeypatch.setattr(attention_patch, "is_planned", lambda queries, _values: queries.shape[2] > 1)
    shapes = set()
    plain = attention_grid.on_grid

    def noting(attention: attention_grid.Attention, *arrays: mx.array, **how: object) -> mx.array:
        def attend(queries: mx.array, keys: mx.array, values: mx.array, **how: object) -> mx.array:
            shapes.add((queries.shape[2] % 32, keys.shape[2] % 32))
            return attention(queries, keys, values, **how)

        return plain(attend, *arrays, **how)

    monkeypatch.setattr(attention_patch, "on_grid", noting)
    engine, _, _ = kernel_engine(name)
    prompts = mixed_prompts(5, VOCAB, 90, seed=6)
    expected = [greedy(engine.backend.model, prompt, NUM_TOKENS) for prompt in prompts]
    for chunk in (512, 512, 24):  # at once, from the prefix cache, in chunks
        if chunk == 24:
            engine.start(chunk=chunk)
        assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    assert shapes == {(0, 0)}
    engine.backend.close()


def test_contexts_past_every_fast_path_of_a_gpu() -> None:
    engine, _, _ = kernel_engine("llama")
    prompts = [(long_prompt() * 5)[:length] for length in (255, 256, 300, 530)]
    expected = [greedy(engine.backend.model, prompt, NUM_TOKENS) for prompt in prompts]
    assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    engine.backend.close()


def test_what_a_slot_held_before_is_never_read() -> None:
    """NaN in every slot: one that is read before it was written shows in the logits."""
    engine, _, backend = kernel_engine("gemma3_text")
    prompts = mixed_prompts(4, VOCAB, 60, seed=5)
    expected = [greedy(engine.backend.model, prompt, NUM_TOKENS) for prompt in prompts]
    for pool in backend.pools:
        pool.grow(100)
        for pages in pool.pages:  # type: ignore[attr-defined]
            pages.arrays[0] = mx.array(np.full(pages.arrays[0].shape, np.nan, np.float32))
    assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    engine.backend.close()


def test_a_kernel_that_computes_wrongly_serves_no_layer() -> None:
    class Wrong(HostKernels):
        def paged_attention(self, *args: mx.array, **how: object) -> mx.array:
            return super().paged_attention(*args, **how) * 1.1  # type: ignore[arg-type]

    engine = BareEngine(tiny_model("llama"), kernels=Wrong())
    assert isinstance(engine.backend, PagedBackend)
    (path,) = engine.backend.attention_paths
    assert (engine.backend.kernels, path.backend) == (None, "reference")
    assert "differ" in path.why or "error" in path.why
    engine.backend.close()


def test_a_kernel_that_does_not_compile_serves_no_layer() -> None:
    class Broken(HostKernels):
        def collect(self, *_args: mx.array, **_how: object) -> tuple[mx.array, mx.array]:
            raise RuntimeError("error: expected ';'")

    engine = BareEngine(tiny_model("llama"), kernels=Broken())
    assert isinstance(engine.backend, PagedBackend)
    (path,) = engine.backend.attention_paths
    assert (path.backend, "expected ';'" in path.why) == ("reference", True)
    engine.backend.close()


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("deepseek_v3", "int8", "no kernel for latent vectors in int8 yet"),
        ("llama", "bfloat16", "bfloat16 pages under a model in float32"),
    ],
)
def test_layers_that_no_kernel_serves_say_why(name: str, dtype: str, why: str) -> None:
    engine = BareEngine(tiny_model(name), kernels=HostKernels(), kv_cache_dtype=dtype)
    assert isinstance(engine.backend, PagedBackend)
    assert [(path.backend, path.why) for path in engine.backend.attention_paths] == [("reference", why)]
    engine.backend.close()


def test_closing_leaves_the_models_classes_as_they_were() -> None:
    model = tiny_model("gemma2")
    kinds = [type(layer) for _, layer in model.named_modules()]
    engine = BareEngine(model, kernels=HostKernels())
    assert [type(layer) for _, layer in model.named_modules()] != kinds
    engine.backend.close()
    assert [type(layer) for _, layer in model.named_modules()] == kinds


def test_requests_that_come_back_together_read_what_the_first_of_them_writes() -> None:
    """Both lost their blocks; the second finds all but one token in the cache, computed in the very same step."""
    engine, _, _ = kernel_engine("llama")
    prompt = (long_prompt() * 2)[:30]
    expected = greedy(engine.backend.model, prompt, 8)
    requests = [
        Request(str(i), list(prompt), SamplingParams(temperature=0, max_tokens=8), max_tokens=8) for i in range(2)
    ]
    for request in requests:
        engine.scheduler.add(request)
    came_back = False
    while engine.scheduler.has_work:
        if not came_back and {len(request.all_token_ids) for request in requests} == {33}:
            came_back = True
            for request in requests:  # as after a step that failed
                engine.scheduler.preempt(request)
            engine.scheduler.kv.reset_prefix_cache()
            engine.runner.recover()
        scheduled = engine.scheduler.schedule()
        if came_back and len(scheduled.scheduled_requests) == 2 and scheduled.scheduled_requests[0].start == 0:
            assert [one.num_tokens for one in scheduled.scheduled_requests] == [33, 1]
        step = engine.runner.execute(scheduled)
        step.submit()
        for token in step.read(str).tokens:
            engine.scheduler.update(token.scheduled, token.token_id)
    assert came_back
    assert [request.output_token_ids for request in requests] == [expected, expected]
    engine.backend.close()


def test_a_chunk_that_wants_no_logits_is_computed_in_its_step_whatever_others_want() -> None:
    engine, _, backend = kernel_engine("llama")
    engine.start(chunk=32)
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    for name, params in (("scored", scored), ("plain", SamplingParams(temperature=0, max_tokens=1))):
        engine.scheduler.add(Request(name, long_prompt()[:100], params, max_tokens=1))
    step = engine.runner.execute(engine.scheduler.schedule())
    assert [one.samples for one in step.scheduled_requests] == [False, False]
    assert any(array is backend._newest for array in step._arrays())
    assert all(view.collected is None for cache in backend._group_caches for view in cache.views.values())  # type: ignore[union-attr]
    engine.backend.close()
