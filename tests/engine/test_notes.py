"""What a user is told about a model's architecture when it is loaded, on a whole engine."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.llm import LLM
from engine.params.engine_args import EngineArgs
from engine.params.sampling_params import SamplingParams
from engine.runner.device.devices import Device
from engine.runner.kv.attention_path import AttentionPath, describe
from engine.runner.sampling.sampler_choice import choose_sampler
from engine.runtime import builder
from engine.runtime.builder import attention_note, check_attention
from tests.engine.runner.kernels.host_draw_rows import HostDrawRows, host_best_rows
from tests.engine.runner.kernels.host_kernels import HostKernels
from tests.sweep.configurations import tiny_config
from tests.tiny_models import VOCAB_SIZE

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
OPTIONS = {"max_model_len": 256, "gpu_memory_utilization": 0.2}


def test_an_architecture_that_cannot_page_says_so_and_answers_all_the_same(tiny_model_dir: Any) -> None:
    folder = tiny_model_dir("plamo3", **{**tiny_config("plamo3"), "vocab_size": VOCAB_SIZE})
    with LLM(str(folder), **OPTIONS) as llm:
        (line,) = [note for note in llm.notes if "contiguous" in note]
        assert line.startswith("contiguous KV caches for this architecture, no prefix cache (")
        prompts = [[5, 6, 7], [8, 9]]
        together = llm.generate(prompts, GREEDY, use_tqdm=False)
        alone = [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
        assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_a_checkpoint_that_also_sees_serves_its_text_part_and_says_so(tiny_model_dir: Any, tmp_path: Path) -> None:
    import mlx.core as mx

    plain = tiny_model_dir("gemma3_text")
    folder = Path(shutil.copytree(plain, tmp_path / "gemma3"))
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3", "vocab_size": text["vocab_size"], "text_config": text, "eos_token_id": 2,
              "vision_config": {"hidden_size": 4}, "torch_dtype": "float32"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"language_model.{key}": value for key, value in mx.load(str(plain / "model.safetensors")).items()}
    weights["vision_tower.vision_model.post_layernorm.weight"] = mx.ones((4,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    prompt = list(range(40, 90))
    with LLM(str(folder), **OPTIONS) as seeing, LLM(str(plain), **OPTIONS) as reading:
        assert "only the text part is loaded, not vision: this engine serves text" in seeing.notes
        assert not any("text part" in note for note in reading.notes)
        outputs = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for llm in (seeing, reading)]
    assert outputs[0] == outputs[1]


CPU, GPU = Device("cpu", "a CPU", 10**9), Device("metal", "a GPU", 10**9)
KERNELS = AttentionPath("full", (0, 1), "paged")
BY_KERNELS = "attention: pages read in place by kernels (2 layers full)"
PLAIN = AttentionPath("sliding", (2,), "reference", "it is slow")
CONTIGUOUS = AttentionPath("full", (0,), "contiguous", "contiguous KV caches")


@pytest.mark.parametrize(
    ("backend", "device", "paths", "line"),
    [
        ("auto", GPU, [KERNELS], BY_KERNELS),
        ("auto", GPU, [KERNELS, PLAIN], f"{BY_KERNELS}; MLX's own operations (1 layer sliding: it is slow)"),
        ("auto", GPU, [PLAIN], "attention: MLX's own operations (1 layer sliding: it is slow)"),
        ("reference", GPU, [PLAIN], "attention: MLX's own operations (1 layer sliding: it is slow)"),
        ("auto", CPU, [PLAIN], None),
        ("reference", CPU, [PLAIN], "attention: MLX's own operations (1 layer sliding: it is slow)"),
        ("paged", CPU, [KERNELS], BY_KERNELS),
        ("reference", GPU, [CONTIGUOUS], None),
    ],
)
def test_what_reads_pages_is_a_line_wherever_somebody_may_expect_kernels(
    backend: str, device: Device, paths: list[AttentionPath], line: str | None
) -> None:
    assert attention_note(EngineArgs("m", attention_backend=backend), device, paths) == line


def test_kernels_that_were_asked_for_must_serve_some_layer() -> None:
    asked = EngineArgs("m", attention_backend="paged")
    check_attention(asked, [KERNELS, PLAIN])
    with pytest.raises(ConfigError, match=r"sliding: it is slow\); take auto or leave it out$") as refused:
        check_attention(asked, [PLAIN])
    assert refused.value.flag == "attention_backend"
    check_attention(EngineArgs("m"), [PLAIN])


def test_a_cpu_speaks_of_attention_only_when_asked(tiny_model_dir: Any) -> None:
    folder = str(tiny_model_dir("gemma3_text"))
    with LLM(folder, **OPTIONS) as silent, LLM(folder, attention_backend="reference", **OPTIONS) as asked:
        assert not [note for note in silent.notes if note.startswith("attention")]
        (line,) = [note for note in asked.notes if note.startswith("attention: ")]
        assert "no GPU kernels on a CPU" in line


@pytest.fixture
def host_kernels(monkeypatch: pytest.MonkeyPatch) -> HostKernels:
    """Kernels that compute in numpy, in place of a GPU's."""
    kernels = HostKernels()
    monkeypatch.setattr(builder, "GPU_KERNELS", kernels)
    monkeypatch.setattr(builder, "kernels_available", lambda: True)
    return kernels


def test_kernels_are_said_at_load_and_in_explain_and_used(tiny_model_dir: Any, host_kernels: HostKernels) -> None:
    folder = str(tiny_model_dir("gemma3_text"))
    with LLM(folder, attention_backend="paged", **OPTIONS) as llm, LLM(folder, **OPTIONS) as auto:
        said = describe(llm.attention_paths)
        assert said.startswith("pages read in place by kernels (")
        assert {path.backend for path in llm.attention_paths} == {"paged"}
        assert f"attention: {said}" in llm.notes
        assert auto.attention_paths == llm.attention_paths
        before = dict(host_kernels.calls)
        kernels = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        assert all(host_kernels.calls[name] > before[name] for name in ("paged_attention", "collect"))
        assert llm.explain().attention == said
    before = dict(host_kernels.calls)
    with LLM(folder, attention_backend="reference", **OPTIONS) as plain:
        assert plain.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == kernels
        assert {path.backend for path in plain.attention_paths} == {"reference"}
    assert host_kernels.calls == before, "reference means that no kernel runs"


def test_a_kind_of_layer_whose_kernel_is_wrong_is_named_with_the_reason(
    tiny_model_dir: Any, host_kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problem(**shape: Any) -> str | None:
        return "64 tokens: relative error 3.0e-01" if shape["window"] else None

    monkeypatch.setattr(host_kernels, "attention_problem", problem)
    with LLM(str(tiny_model_dir("gemma3_text")), **OPTIONS) as llm:
        backends = {path.kind: path.backend for path in llm.attention_paths}
        assert backends == {"full": "paged", "sliding": "reference"}
        (line,) = [note for note in llm.notes if note.startswith("attention: ")]
        assert "pages read in place by kernels (" in line
        assert line.endswith("sliding: 64 tokens: relative error 3.0e-01)")


def test_kernels_asked_for_over_packed_latent_pages_are_refused_with_the_reason(
    tiny_model_dir: Any, host_kernels: HostKernels
) -> None:
    with pytest.raises(ConfigError, match=r"^--attention-backend paged .*no kernel for latent vectors in int8"):
        LLM(str(tiny_model_dir("deepseek_v3")), attention_backend="paged", kv_cache_dtype="int8", **OPTIONS)


@pytest.mark.parametrize(
    ("line", "architecture", "entries"),
    [
        ("fused layers", "qwen3", {}),
        ("fused attention", "gemma4_text", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    ],
)
def test_what_takes_few_launches_is_said_at_load_and_used(
    line: str, architecture: str, entries: dict[str, Any], tiny_model_dir: Any, host_kernels: HostKernels
) -> None:
    folder = str(tiny_model_dir(architecture, **entries))
    with LLM(folder, **OPTIONS) as llm:
        (said,) = [note for note in llm.notes if note.startswith(f"{line}: ")]
        done, _, total = said.removeprefix(f"{line}: ").removesuffix(" layers").partition(" of ")
        assert done == total != "0"
        before = dict(host_kernels.calls)
        tokens = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        assert host_kernels.calls["joined_attention"] > before["joined_attention"]
        assert host_kernels.calls["paged_attention"] == before["paged_attention"]
    with LLM(folder, attention_backend="reference", **OPTIONS) as plain:
        assert plain.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == tokens
        assert not [note for note in plain.notes if note.startswith(line)]


@pytest.mark.parametrize("wrong", [False, True])
def test_a_kernel_samples_where_it_is_right_and_a_line_says_where_it_is_not(
    wrong: bool, tiny_model_dir: Any, host_kernels: HostKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kernel(HostDrawRows):
        def __call__(self, *given: Any) -> Any:
            return super().__call__(*given) + int(wrong)

    kernel = Kernel()
    monkeypatch.setattr(builder, "choose_sampler", partial(choose_sampler, kernel=kernel, best=host_best_rows))
    folder = str(tiny_model_dir("qwen3"))
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, presence_penalty=1.0, seed=3, max_tokens=6)
    with LLM(folder, **OPTIONS) as llm:
        before = kernel.calls
        tokens = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
        assert (kernel.calls > before) is not wrong
        said = [note for note in llm.notes if note.startswith("sampling: MLX's own operations (")]
        assert len(said) == wrong
    calls = kernel.calls
    with LLM(folder, attention_backend="reference", **OPTIONS) as plain:
        assert plain.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids == tokens
    assert kernel.calls == calls, "reference means that no kernel runs"
