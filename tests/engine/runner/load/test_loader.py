import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.errors import ConfigError, MemoryPlanError, ModelLoadError
from engine.models.formats import FORMATS
from engine.models.local import ResolvedModel
from engine.models.model_config import context_length, read_model_config
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load import loader
from engine.runner.load.loader import WEIGHT_READERS, LoadedModel, load_model
from engine.runner.load.weight_types import packed_modules
from tests.tiny_models import family_config, tiny_config, write_weights

mx = pytest.importorskip("mlx.core")
GPU = Device("cuda", "a GPU", 80 << 30)
CPU = Device("cpu", "a CPU", 16 << 30)
SMALL_CPU = Device("cpu", "a small CPU", 1 << 20)


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny", **options))


def on(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(loader, "describe_device", lambda: device)
    monkeypatch.setattr(loader, "prepare_backend", lambda: None)
    monkeypatch.setattr(loader, "_check_room", lambda *_: None)


def logits(loaded: LoadedModel) -> Any:
    return np.array(loaded.model(mx.array([[1, 2, 300, 4000, 5]])).astype(mx.float32))


@pytest.fixture
def quantized_dir(tiny_model_dir: Any, tmp_path: Path) -> Path:
    """A 4-bit folder with bfloat16 scales, as mlx-lm's converter writes it."""
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model as load_plain
    from mlx_lm.utils import quantize_model, save_config, save_model

    source = tiny_model_dir("llama")
    model, config = load_plain(source)
    model.update(tree_map(lambda v: v.astype(mx.bfloat16), model.parameters()))
    model, config = quantize_model(model, config, 32, 4)
    folder = tmp_path / "quantized"
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    tiny_model_dir: Any, smollm2: ResolvedModel, kind: str
) -> None:
    resolved = smollm2 if kind == "gguf" else ResolvedModel("tiny", tiny_model_dir("llama"), "folder")
    args = EngineArgs("tiny", gpu_memory_utilization=1e-4, memory_flag="VLLM_METAL_MEMORY_FRACTION")
    read: list[Any] = []
    with pytest.raises(MemoryPlanError, match=r"Paged attention: not enough .* for KV cache") as refused:
        load_model(resolved, args, lambda *news: read.append(news))
    assert not read
    assert "increase VLLM_METAL_MEMORY_FRACTION" in str(refused.value)
    assert refused.value.model_memory > refused.value.usable
    assert refused.value.kv_budget < 0


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (tiny_config("llama", head_dim=64, torch_dtype="bfloat16"), {"kv_cache_dtype": "int8"}),
        (tiny_config("llama"), {"max_num_batched_tokens": 5, "enable_prefix_caching": False, "block_size": 32}),
        (tiny_config("gemma3_text"), {}),
        (family_config("gemma4_text"), {}),
    ],
    ids=["quantized pages", "a step's tokens", "windows", "shared layers"],
)
def test_a_refusal_before_the_weights_are_read_bills_what_a_plan_bills(
    config: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    write_weights(tmp_path, config)
    args = EngineArgs(str(tmp_path), gpu_memory_utilization=1e-6, **options)
    with pytest.raises(MemoryPlanError) as planned:
        engine.plan(str(tmp_path), overhead=0, gpu_memory_utilization=1e-6, **options)
    with pytest.raises(MemoryPlanError) as refused:
        load_model(resolve(str(tmp_path)), args, pytest.fail)
    assert refused.value.numbers == planned.value.numbers
    assert str(refused.value) == str(planned.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_folder_gives_mlx_lms_logits_exactly(tiny_model_dir: Any, architecture: str) -> None:
    from mlx_lm.utils import load_model as load_plain

    folder = tiny_model_dir(architecture)
    plain, _ = load_plain(folder)
    ours = load(folder, dtype="float32")
    np.testing.assert_array_equal(logits(ours), np.array(plain(mx.array([[1, 2, 300, 4000, 5]]))))
    assert (ours.config.context_length, ours.config.vocab_size, ours.config.eos_token_ids) == (4096, 49152, {2})


def test_on_a_cpu_weights_become_float32_and_the_note_says_so(
    quantized_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, CPU)
    loaded = load(quantized_dir)
    assert loaded.dtype == mx.float32
    assert not packed_modules(loaded.model)
    assert loaded.notes == ["a CPU, float32 (4-bit weights unpacked exactly)"]


def test_on_a_small_cpu_weights_stay_packed_with_float32_scales(
    quantized_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, SMALL_CPU)
    loaded = load(quantized_dir)
    packed = packed_modules(loaded.model)
    assert packed
    assert all(module.scales.dtype == mx.float32 for module in packed.values())
    assert "kept packed" in loaded.notes[0]
    on(monkeypatch, CPU)
    np.testing.assert_allclose(logits(load(quantized_dir)), logits(loaded), atol=1e-3)


def test_on_a_gpu_a_checkpoint_stays_as_it_is(quantized_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, GPU)
    loaded = load(quantized_dir)
    assert loaded.dtype == mx.bfloat16
    assert packed_modules(loaded.model)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", [CPU, GPU], ids=lambda device: device.kind)
def test_an_explicit_dtype_is_honoured_everywhere(
    quantized_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, device: Device
) -> None:
    from mlx.utils import tree_flatten

    on(monkeypatch, device)
    loaded = load(quantized_dir, dtype=name)
    floats = {value.dtype for _, value in tree_flatten(loaded.model.parameters()) if value.dtype != mx.uint32}
    assert floats == {getattr(mx, name)}
    assert loaded.dtype == getattr(mx, name)


def test_a_gguf_file_stays_packed_on_a_gpu_and_is_unpacked_on_a_cpu(
    smollm2: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, GPU)
    packed = load_model(smollm2, EngineArgs("smollm2"))
    assert packed.dtype == mx.float16
    assert packed.num_bytes < 110_000_000
    assert packed.notes == ["a GPU, float16 (Q4_1, Q8_0 weights kept packed)"]
    on(monkeypatch, CPU)
    plain = load_model(smollm2, EngineArgs("smollm2"))
    assert (plain.dtype, plain.num_bytes) == (mx.float32, 538_060_032)


def test_every_format_that_is_recognised_has_a_reader_of_its_weights() -> None:
    assert sorted(one.kind for one in FORMATS) == sorted(WEIGHT_READERS)


def test_progress_goes_up_to_all_bytes_and_can_cancel(tiny_model_dir: Any) -> None:
    folder = tiny_model_dir("llama")
    model = ResolvedModel("tiny", folder, "folder")
    seen: list[tuple[str, int, int]] = []
    loaded = load_model(model, EngineArgs("tiny"), lambda *at: seen.append(at))
    assert seen[-1] == ("load", loaded.num_bytes, loaded.num_bytes)
    assert len(seen) > 10
    del loaded
    before = mx.get_active_memory()

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_model(model, EngineArgs("tiny"), interrupt)
    assert mx.get_active_memory() <= before


def test_a_model_loads_and_runs_on_a_thread_of_its_own(tiny_model_dir: Any) -> None:
    folder = tiny_model_dir("qwen3")
    shapes: list[tuple[int, ...]] = []

    def work() -> None:
        shapes.append(logits(load(folder)).shape)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert shapes == [(1, 5, 49152)]


def changed(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_an_unknown_architecture_is_named_in_one_line(tiny_model_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="model_type 'gpt9' is not supported by mlx-lm") as caught:
        load(changed(tiny_model_dir("llama"), tmp_path, model_type="gpt9"))
    assert "\n" not in str(caught.value)


def test_a_config_without_a_model_type_is_refused(tiny_model_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="names no model_type"):
        load(changed(tiny_model_dir("llama"), tmp_path, model_type=None))


def test_weights_that_do_not_fit_the_config_are_one_line(tiny_model_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="tiny: ValueError") as caught:
        load(changed(tiny_model_dir("llama"), tmp_path, num_hidden_layers=5))
    assert "\n" not in str(caught.value)


def test_a_models_own_python_runs_only_when_trusted(tiny_model_dir: Any, tmp_path: Path) -> None:
    folder = changed(tiny_model_dir("llama"), tmp_path, model_file="own.py")
    (folder / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    with pytest.raises(ModelLoadError, match=r"'own\.py'.*--trust-remote-code"):
        load(folder)
    assert logits(load(folder, trust_remote_code=True)).shape == (1, 5, 49152)


def test_another_config_may_be_given(tiny_model_dir: Any, tmp_path: Path) -> None:
    folder = tiny_model_dir("llama")
    other = changed(folder, tmp_path, rope_theta=500.0, max_position_embeddings=100)
    ours = load(folder, hf_config_path=str(other), dtype="float32")
    assert ours.config.context_length == 100
    np.testing.assert_array_equal(logits(ours), logits(load(other, dtype="float32")))
    assert load(folder, hf_config_path=str(other / "config.json")).config.context_length == 100


def test_sampling_defaults_are_the_models_none_or_a_folders(tiny_model_dir: Any, tmp_path: Path) -> None:
    folder = changed(tiny_model_dir("llama"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [2, 7]}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text(json.dumps({"temperature": 0.1}))

    def config(choice: str) -> Any:
        model = ResolvedModel("tiny", folder, "folder")
        return read_model_config(model, EngineArgs("tiny", generation_config=choice))

    assert config("auto").generation_config["temperature"] == 0.6
    assert config("vllm").generation_config == {}
    assert config(str(other)).generation_config == {"temperature": 0.1}
    assert config("vllm").eos_token_ids == {2, 7}
    with pytest.raises(ConfigError, match=r"no generation_config\.json there"):
        config(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 262144}}, 262144),
        ({"n_positions": 1024, "max_position_embeddings": 2048}, 1024),
        ({}, 2048),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            131072,
        ),
        ({"model_type": "gemma3", "text_config": {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full": {"rope_type": "linear", "factor": 2}}}, 8192),
    ],
)
def test_the_context_length_is_vllms(config: dict[str, Any], expected: int) -> None:
    assert context_length(config) == expected


def test_a_tokenizers_own_limit_counts(tiny_model_dir: Any, tmp_path: Path) -> None:
    folder = changed(tiny_model_dir("llama"), tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1000}))
    assert read_model_config(ResolvedModel("t", folder, "folder"), EngineArgs("t")).context_length == 1000
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    assert read_model_config(ResolvedModel("t", folder, "folder"), EngineArgs("t")).context_length == 4096
