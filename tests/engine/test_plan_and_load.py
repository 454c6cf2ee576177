"""The plan's bytes of weights are those that loading takes: from headers alone, on every kind of device."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import MemoryPlanError
from engine.memory.planner import what_if
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from tests.tiny_models import tiny_config

mx = pytest.importorskip("mlx.core")
gguf = pytest.importorskip("gguf")

DEVICES = {
    "cpu": Device("cpu", "a CPU", 16 << 30),
    "full cpu": Device("cpu", "a CPU with no room for unpacked weights", 16 << 30),
    "gpu": Device("metal", "a GPU", 16 << 30),
}


def loaded_bytes(path: Path) -> int:
    from engine.runner.load.loader import load_model

    return load_model(resolve(str(path)), EngineArgs(str(path))).num_bytes


def planned_bytes(path: Path, **options: Any) -> int:
    return engine.plan(str(path), overhead=0, max_model_len=256, **options).model_memory


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """This process takes itself for a machine of that kind."""
    found = DEVICES[request.param]
    if request.param == "full cpu":
        monkeypatch.setattr("engine.runner.load.weight_types._EASY_SHARE", 0)
    for module in ("engine.planning", "engine.runner.load.loader"):
        monkeypatch.setattr(f"{module}.describe_device", lambda: found)
    monkeypatch.setattr("engine.runner.load.loader._check_room", lambda *_: None)
    return found


@pytest.fixture(scope="module")
def folders(tiny_model_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model as mlx-lm's tools write it: float32, bfloat16, 4-bit, and with a vision tower."""
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    def half(model: Any) -> Any:
        model.update(tree_map(lambda value: value.astype(mx.bfloat16), model.parameters()))
        return model

    root = tmp_path_factory.mktemp("plan")
    source = tiny_model_dir("llama")
    model, config = load_model(source)
    bf16, packed, seeing = root / "bf16", root / "packed", root / "seeing"
    save_model(bf16, half(model))
    save_config({**config, "torch_dtype": "float32"}, bf16 / "config.json")  # the files are right, not the config
    model, config = quantize_model(half(model), config, 32, 4)
    save_model(packed, model)
    save_config(config, packed / "config.json")

    text = tiny_config("gemma3_text")
    seeing.mkdir()
    (seeing / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vocab_size": text["vocab_size"]})
    )
    inner = dict(tree_flatten(load_model(tiny_model_dir("gemma3_text"))[0].parameters()))
    weights = {f"language_model.{name}": value for name, value in inner.items()}
    weights |= {"vision_tower.patches": mx.zeros((512, 512)), "multi_modal_projector.weight": mx.zeros((64, 512))}
    mx.save_safetensors(str(seeing / "model.safetensors"), weights, metadata={"format": "mlx"})
    return {"float32": source, "bf16": bf16, "packed": packed, "seeing": seeing}


@pytest.mark.parametrize("kind", ["float32", "bf16", "packed", "seeing"])
def test_a_folder_takes_what_was_planned(folders: dict[str, Path], kind: str, device: Device) -> None:
    assert planned_bytes(folders[kind]) == pytest.approx(loaded_bytes(folders[kind]), rel=0.001)


def test_packed_weights_are_billed_unpacked_only_where_they_are_unpacked(
    folders: dict[str, Path], device: Device
) -> None:
    bits = 32 if device is DEVICES["cpu"] else 4 + 2 * (32 if device.kind == "cpu" else 16) / 32
    unpacked = engine.plan(str(folders["float32"]), overhead=0, max_model_len=256, dtype="float32").model_memory
    assert planned_bytes(folders["packed"]) == pytest.approx(unpacked * bits / 32, rel=0.01)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"])
def test_a_gguf_file_takes_what_was_planned(tmp_path: Path, kind: str, device: Device) -> None:
    from tests.checkpoints.gguf import CASES, write

    path = tmp_path / "tiny.gguf"
    write(path, CASES["llama linear"], gguf.GGMLQuantizationType[kind])
    assert planned_bytes(path) == pytest.approx(loaded_bytes(path), rel=0.001)


def test_another_device_takes_the_checkpoint_as_it_is(folders: dict[str, Path]) -> None:
    assert planned_bytes(folders["bf16"], device_memory="8GB") == pytest.approx(
        planned_bytes(folders["bf16"], dtype="bfloat16"), rel=0.001
    )


def hub_entry(root: Path, source: Path) -> Path:
    """``org/tiny`` in a Hugging Face cache: config.json only."""
    entry = root / "models--org--tiny"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("abc")
    shutil.copy(source / "config.json", snapshot)
    return snapshot


def test_a_hub_id_is_planned_offline_from_its_config_alone_and_from_its_index(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = hub_entry(tmp_path, folders["float32"])
    given: dict[str, Any] = {"device_memory": "8GB", "max_model_len": 256}
    from_config = engine.plan("org/tiny", **given).model_memory
    assert from_config == loaded_bytes(folders["float32"])
    index = {"metadata": {"total_size": 3_000_000}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert engine.plan("org/tiny", **given).model_memory == 3_000_000


def test_a_step_runs_ahead_of_windows_by_the_chunk_of_the_device_that_is_planned_for(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text", max_position_embeddings=32768)
    (tmp_path / "config.json").write_text(json.dumps(config))

    def ahead(**options: Any) -> int:
        plan = engine.plan(str(tmp_path), **options)
        group = next(group for group in plan.groups if group.kind == "sliding")
        assert group.window == 32
        return group.ahead

    from engine.runner.device.devices import describe_device

    assert ahead(device_memory="16GB") == 2048
    assert ahead() == describe_device().chunk_size
    assert ahead(max_num_batched_tokens=64) == 64
    assert ahead(max_model_len=128) == describe_device().chunk_size  # a longer request may come, live


SPECIAL = {
    "gemma3n": {"kinds": ["full", "sliding"], "shared": (4, 5)},
    "gemma4_text": {"kinds": ["full", "sliding"], "shared": (4, 5)},
    "deepseek_v3": {"kinds": ["latent"], "shared": ()},
    "qwen3_5": {"kinds": ["full", "state"], "shared": ()},
    "mamba2": {"kinds": ["state"], "shared": ()},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_the_groups_say_which_layers_keep_what(name: str, tmp_path: Path) -> None:
    from tests.engine.parity.tiny_architectures import config_of

    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    plan = engine.plan(str(tmp_path), device_memory="2GB")
    assert [group.kind for group in plan.groups] == SPECIAL[name]["kinds"]
    assert plan.inputs.shared_layers == SPECIAL[name]["shared"]
    rows = [line.split()[0] for line in str(plan).splitlines()[-3 - len(plan.groups) : -2]]
    shared = ["shared"] if SPECIAL[name]["shared"] else ["group"]
    assert sorted(rows) == sorted([*SPECIAL[name]["kinds"], *shared])


@pytest.mark.parametrize(("architecture", "options"), [("gemma3_text", {}), ("llama", {"kv_cache_dtype": "float16"})])
def test_a_loaded_models_plan_is_the_one_made_before_but_for_the_measured_overhead(
    tiny_model_dir: Any, architecture: str, options: dict[str, Any]
) -> None:
    path = str(tiny_model_dir(architecture))
    with engine.LLM(path, max_model_len=512, gpu_memory_utilization=0.2, **options) as llm:
        found = llm.plan
    given = {"max_model_len": 512, "gpu_memory_utilization": 0.2, "overhead": found.overhead, **options}
    assert engine.plan(path, **given) == found


@pytest.mark.parametrize("architecture", ["qwen3_5", "gemma3_text"])
def test_contiguous_caches_are_billed_for_what_they_keep(tiny_model_dir: Any, architecture: str) -> None:
    """States and windows cost the same there as in pages; only their bytes are mlx-lm's own arrays."""
    options = {"max_model_len": 512, "gpu_memory_utilization": 0.2}
    path = str(tiny_model_dir(architecture))
    paged = engine.plan(path, **options)
    contiguous = engine.plan(path, **options, use_paged_attention=False)
    assert contiguous.state_bytes_per_seq == paged.state_bytes_per_seq > 0
    assert contiguous.per_block_bytes == paged.per_block_bytes
    with engine.LLM(path, **options, use_paged_attention=False, max_num_seqs=4) as llm:
        assert llm.plan.state_bytes_per_seq == paged.state_bytes_per_seq
        prompts = [list(range(11, 11 + length)) for length in (90, 3, 60, 40, 70, 5)]
        params = engine.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 6
        assert llm.stats().num_used_blocks == 0
        assert llm.replan(max_num_seqs=2).max_num_seqs == 2
        assert llm.generate(prompts, params, use_tqdm=False)[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_a_cache_of_an_unknown_kind_is_billed_by_its_size(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Any) -> None:
    from engine.runner.kv import kv_spec

    path, options = str(tiny_model_dir("qwen3_5")), {"max_model_len": 512, "gpu_memory_utilization": 0.2}
    known = engine.plan(path, **options)

    def refuse(_: Any) -> Any:
        raise kv_spec.UnsupportedCacheError("new")

    monkeypatch.setattr(kv_spec, "probe_caches", refuse)
    measured = engine.plan(path, **options)
    assert [group.kind for group in measured.groups] == ["full", "state"]
    assert measured.per_block_bytes == known.per_block_bytes
    assert measured.state_bytes_per_seq == known.state_bytes_per_seq


@pytest.mark.parametrize("limit", [8e9, 2e9])
def test_the_overhead_of_a_step_follows_the_length_that_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """A CPU's attention holds the scores of a step over the whole context: at 131072 tokens nothing would be left."""
    from engine import planning
    from engine.runner.device.devices import Device

    monkeypatch.setattr(planning, "describe_device", lambda: Device("cpu", "a small machine", int(limit)))
    config = tiny_config("llama", num_attention_heads=32, num_key_value_heads=2, max_position_embeddings=131072)
    (tmp_path / "config.json").write_text(json.dumps(config))
    longest = engine.plan(str(tmp_path), max_model_len="auto")
    assert 16_384 < longest.max_model_len < 131_072
    with pytest.raises(MemoryPlanError, match=r"decrease max_model_len to \d+ or less") as refused:
        engine.plan(str(tmp_path))
    assert refused.value.max_model_len_that_fits == longest.max_model_len
    assert engine.plan(str(tmp_path), max_model_len=longest.max_model_len).overhead == longest.overhead
    shorter = what_if(longest, max_model_len=2048)
    assert shorter.overhead < longest.overhead / 4
    assert what_if(shorter, max_model_len="auto").max_model_len == longest.max_model_len
