"""GGUF files as models: every architecture against mlx-lm's own model, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType as Type

from engine.errors import ModelLoadError
from engine.models.gguf_architectures import ARCHITECTURES
from engine.models.gguf_config import gguf_config
from engine.models.gguf_file import open_gguf
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig, read_model_config
from engine.params.engine_args import EngineArgs

mx = pytest.importorskip("mlx.core")

from engine.runner.load.gguf import GGUFWeights, choice_of, load_gguf  # noqa: E402
from engine.runner.load.loader import load_model  # noqa: E402
from engine.runner.load.weight_types import parameter_bytes  # noqa: E402
from tests.checkpoints.gguf import CASES, Case, write  # noqa: E402

IDS = [[1, 5, 9, 100, 33, 60, 7, 7, 12, 50, 21, 4, 77, 130, 8, 90, 91, 14, 2, 3, 6, 1, 8, 0, 3, 3, 9, 8, 8, 7]]
"""Longer than the windows of the tiny models."""
FLOAT32 = EngineArgs("m", dtype="float32")


def resolved(path: Path) -> ResolvedModel:
    return ResolvedModel(path.name, path, "gguf")


def config_of(path: Path) -> ModelConfig:
    return read_model_config(resolved(path), FLOAT32)


def logits(model: Any) -> npt.NDArray[np.float32]:
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def loaded(path: Path, *, keep_packed: bool, dtype: Any = mx.float32) -> Any:
    file, config = open_gguf(path), config_of(path)
    return load_gguf(file, config, choice_of(file, config, dtype, keep_packed=keep_packed), lambda *_: None)


def with_keys(case: Case, **keys: Any) -> Case:
    return dataclasses.replace(case, keys={**case.keys, **{key.replace("__", "."): keys[key] for key in keys}})


def add_to(path: Path, case: Case, tensors: dict[str, npt.NDArray[np.float32]]) -> Path:
    """The file of ``case`` with further tensors."""
    write(path, dataclasses.replace(case, stored=(*case.stored, lambda own, _: {**own, **tensors})))
    return path


def test_every_architecture_that_is_known_has_a_file_here() -> None:
    assert {case.arch for case in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_logits_of_mlx_lms_model(tmp_path: Path, name: str) -> None:
    expected = logits(write(tmp_path / "m.gguf", CASES[name]))
    ours = logits(load_model(resolved(tmp_path / "m.gguf"), FLOAT32).model)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(ours, expected, atol=5e-5)
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.MXFP4], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["llama", "qwen2 moe", "qwen3 next", "qwen3.5 moe", "gemma4 moe", "gpt-oss", "phi3"])
def test_matrices_that_stay_packed_compute_what_the_unpacked_ones_do(tmp_path: Path, name: str, kind: Type) -> None:
    write(tmp_path / "m.gguf", CASES[name], kind)
    packed, plain = (loaded(tmp_path / "m.gguf", keep_packed=keep) for keep in (True, False))
    modes = {getattr(module, "mode", None) for _, module in packed.named_modules() if hasattr(module, "bits")}
    assert modes == {"mxfp4" if kind == Type.MXFP4 else "affine"}
    np.testing.assert_allclose(logits(packed), logits(plain), atol=2e-3)


@pytest.mark.parametrize(("kind", "dtype"), [(Type.Q8_0, "float32"), (Type.Q5_0, "float16"), (Type.MXFP4, "bfloat16")])
@pytest.mark.parametrize("name", ["llama llama3", "qwen3.5 moe", "gemma4", "gpt-oss", "deepseek 3", "granite hybrid"])
def test_the_plan_bills_the_bytes_that_are_loaded(tmp_path: Path, name: str, kind: Type, dtype: str) -> None:
    write(tmp_path / "m.gguf", CASES[name], kind)
    file, config = open_gguf(tmp_path / "m.gguf"), config_of(tmp_path / "m.gguf")
    for keep in (True, False):
        choice = choice_of(file, config, getattr(mx, dtype), keep_packed=keep)
        model = load_gguf(file, config, choice, lambda *_: None)
        assert choice.num_bytes == pytest.approx(parameter_bytes(model), rel=0.01)
        assert bool(choice.packed) == keep


def test_the_plan_of_a_file_is_the_load_of_it(tmp_path: Path) -> None:
    from engine.runner.device.devices import describe_device

    write(tmp_path / "m.gguf", CASES["qwen3.5 moe"], Type.Q4_0)
    file, config = resolved(tmp_path / "m.gguf"), config_of(tmp_path / "m.gguf")
    plan = GGUFWeights().abstract(file, config, EngineArgs("m"), describe_device())
    assert plan.num_bytes == load_model(file, EngineArgs("m")).num_bytes == parameter_bytes(plan.model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3.5"])
def test_queries_keys_and_values_in_one_matrix_are_divided(tmp_path: Path, name: str) -> None:
    case = CASES[name]

    def joined(tensors: dict[str, npt.NDArray[np.float32]], _config: Any) -> dict[str, npt.NDArray[np.float32]]:
        stored = dict(tensors)
        for query in [key for key in tensors if ".q_proj." in key]:
            layer, leaf = query.split("layers.")[1].split(".")[0], query.rsplit(".", 1)[1]
            parts = [stored.pop(query.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            stored[f"blk.{layer}.attn_qkv.{leaf}"] = np.concatenate(parts)
        return stored

    path = tmp_path / "m.gguf"
    expected = write(path, dataclasses.replace(case, stored=(*case.stored, joined)))
    if name == "qwen3.5":  # where the name means the linear layers' matrix
        with pytest.raises(ModelLoadError, match=r"not in model: .*in_proj_qkv.*; load the model's safetensors"):
            load_model(resolved(path), FLOAT32)
        return
    np.testing.assert_allclose(logits(load_model(resolved(path), FLOAT32).model), logits(expected), atol=5e-5)


def test_layers_that_only_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = with_keys(CASES["qwen3"], block_count=5, nextn_predict_layers=1)
    spare = {"blk.4.attn_norm.weight": np.ones(64, np.float32), "blk.4.nextn.eh_proj.weight": np.ones((64, 128))}
    path = add_to(tmp_path / "m.gguf", case, spare)
    model = load_model(resolved(path), FLOAT32).model
    assert len(model.layers) == 4
    np.testing.assert_array_equal(logits(model), logits(write(tmp_path / "plain.gguf", CASES["qwen3"])))


def split(path: Path) -> list[Path]:
    """The file in three parts, as llama.cpp's tool divides it."""
    reader = gguf.GGUFReader(path)
    parts = [path.with_name(f"s-Q8_0-{number:05d}-of-00003.gguf") for number in (1, 2, 3)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF."):
                kinds = field.types
                writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(parts))
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number :: len(parts)]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_a_model_in_several_files_is_read_from_any_of_them_if_all_are_there(tmp_path: Path) -> None:
    write(tmp_path / "whole.gguf", CASES["qwen3 next"], Type.Q8_0)
    parts = split(tmp_path / "whole.gguf")
    expected = logits(load_model(resolved(tmp_path / "whole.gguf"), FLOAT32).model)
    for part in parts:
        np.testing.assert_array_equal(logits(load_model(resolved(part), FLOAT32).model), expected)
    parts[1].rename(tmp_path / "away.gguf")
    with pytest.raises(ModelLoadError, match=r"s-Q8_0-00002-of-00003\.gguf is missing beside it; fetch all 3 parts"):
        load_model(resolved(parts[0]), FLOAT32)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelLoadError, match=r"one of 3; its name has to end in -00001-of-00003\.gguf"):
        load_model(resolved(tmp_path / "renamed.gguf"), FLOAT32)


SCALINGS = {
    "linear": {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    "yarn": {
        "rope__scaling__type": "yarn", "rope__scaling__factor": 8.0, "rope__scaling__original_context_length": 64,
    },
}  # fmt: skip
FIRST = {case.arch: name for name, case in reversed(CASES.items()) if "llama3" not in str(case)}
"""A case of each architecture that scales no frequencies of its own."""


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("arch", FIRST)
def test_a_scaling_of_rope_is_computed_or_refused_never_ignored(tmp_path: Path, arch: str, kind: str) -> None:
    case = CASES[FIRST[arch]]
    plain = write(tmp_path / "scaled.gguf", with_keys(case, **SCALINGS[kind]))
    try:
        scaled = logits(load_model(resolved(tmp_path / "scaled.gguf"), FLOAT32).model)
    except ModelLoadError as error:
        assert "RoPE" in str(error) or "rope.scaling" in str(error)  # noqa: PT017
        return
    assert np.abs(scaled - logits(plain)).max() > 0.01


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a scaling beside windows": (
        "gemma2", {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "RoPE scaling 'yarn'"),
    "an unknown scaling": ("llama", {"rope__scaling__type": "ntk", "rope__scaling__factor": 4.0}, "scaling 'ntk'"),
    "a scaling without its type": ("gemma2", {"rope__scaling__factor": 4.0}, "RoPE scaling 'linear'"),
    "another strength of yarn": (
        "llama yarn", {"rope__scaling__yarn_attn_factor": 2.0}, "yarn_attn_factor = 2 is not supported"),
    "metadata that nobody knows": ("qwen3", {"attention__clamp_kqv": 8.0}, "attention.clamp_kqv = 8.0 is not under"),
    "values that differ between layers": ("qwen3", {"feed_forward_length": [96, 96, 96, 64]}, "differs between layers"),
    "heads that differ between layers": ("llama", {"attention__head_count": [4, 4, 2, 4]}, "head_count differs"),
    "keys that differ between layers": ("llama", {"attention__head_count_kv": [2, 1, 2, 2]}, "head_count_kv differs"),
    "a part of the head that rotates": ("llama", {"rope__dimension_count": 8}, "rope.dimension_count = 8 of heads"),
    "values of another size than keys": ("qwen3", {"attention__value_length": 8}, "value_length = 8"),
    "heads that do not divide the model": (
        "mixtral", {"attention__key_length": 32, "attention__value_length": 32, "rope__dimension_count": 32},
        "key_length = 32 is not supported"),
    "attention that looks ahead": ("qwen3", {"attention__causal": False}, "attention.causal = False"),
    "experts of DeepSeek 2": ("deepseek 3", {"expert_gating_func": 1}, "DeepSeek 2"),
    "experts in groups": ("qwen3 moe", {"expert_group_count": 4}, "expert_group_count = 4"),
    "a missing key": ("gpt-oss", {"expert_feed_forward_length": None}, "expert_feed_forward_length is missing"),
    "a window's own RoPE": ("olmo3", {"rope__freq_base_swa": 5e5}, "freq_base_swa"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_tokens_and_is_not_understood_is_refused_by_name(tmp_path: Path, what: str) -> None:
    name, keys, words = REFUSED[what]
    write(tmp_path / "m.gguf", with_keys(CASES[name], **keys))
    with pytest.raises(ModelLoadError, match=words) as caught:
        load_model(resolved(tmp_path / "m.gguf"), FLOAT32)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mpt")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"architecture 'mpt' is not supported \(llama, mistral3, qwen2"):
        load_model(resolved(tmp_path / "other.gguf"), FLOAT32)


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.0.attn_q_norm.weight", "enc.output", "mtp head.x"])
def test_an_unknown_tensor_is_named_not_dropped(tmp_path: Path, name: str) -> None:
    path = add_to(tmp_path / "m.gguf", CASES["llama"], {})
    file = open_gguf(path)
    extra = dataclasses.replace(file.tensors["output_norm.weight"], name=name)
    config = gguf_config(file)
    from engine.models.gguf_sources import sources

    more = dataclasses.replace(file, tensors={**file.tensors, name: extra})
    if name == "blk.0.attn_q_norm.weight":  # a name of other architectures: the model itself has no place for it
        assert any(source.name == "model.layers.0.self_attn.q_norm.weight" for source in sources(more, config))
        return
    with pytest.raises(ModelLoadError, match=f"tensor {name} is not known for architecture llama"):
        sources(more, config)


def without(part: str) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    return lambda tensors, _: {name: values for name, values in tensors.items() if part not in name}


@pytest.mark.parametrize(
    "part", ["layers.1.mlp.up_proj", "layers.0.linear_attn.in_proj_z", "layers.1.self_attn.q_norm"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, part: str) -> None:
    case = CASES["qwen3.5"]
    write(tmp_path / "m.gguf", dataclasses.replace(case, stored=(*case.stored, without(part))))
    with pytest.raises(ModelLoadError, match=part.replace(".", r"\.")) as caught:
        load_model(resolved(tmp_path / "m.gguf"), FLOAT32)
    assert "\n" not in str(caught.value)


def test_a_missing_half_of_a_joined_matrix_is_named(tmp_path: Path) -> None:
    case = CASES["qwen3 next"]
    write(tmp_path / "m.gguf", dataclasses.replace(case, stored=(*case.stored, without("blk.0.attn_gate"))))
    with pytest.raises(ModelLoadError, match=r"tensor blk\.0\.attn_gate\.weight is missing"):
        load_model(resolved(tmp_path / "m.gguf"), FLOAT32)


@pytest.mark.parametrize("keep", [3, 100, 4000, -10])
def test_a_file_cut_short_is_one_line_at_any_cut(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.gguf"
    write(path, CASES["llama"])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"not a GGUF file|cut short") as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_a_note_says_which_types_stay_packed_and_which_do_not(tmp_path: Path) -> None:
    from engine.runner.device.devices import describe_device

    write(tmp_path / "m.gguf", CASES["llama"], Type.Q4_0)
    write(tmp_path / "mixed.gguf", CASES["llama"], Type.Q4_0, {"blk.0.ffn_up.weight": Type.F16})
    gpu = dataclasses.replace(describe_device(), kind="metal")
    notes = {}
    for name in ("m", "mixed"):
        file = resolved(tmp_path / f"{name}.gguf")
        notes[name] = GGUFWeights().prepare(file, config_of(file.path), EngineArgs("m"), gpu).describe(None)
    assert notes["m"] == "float16 (Q4_0 weights kept packed)"
    assert notes["mixed"] == "float16 (Q4_0 weights kept packed, F16 unpacked exactly)"
    assert load_model(resolved(tmp_path / "m.gguf"), FLOAT32).notes[0].endswith("(Q4_0 weights unpacked exactly)")


def test_progress_counts_the_files_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", CASES["gemma4 moe"], Type.Q8_0)
    seen: list[tuple[str, int, int]] = []
    load_model(resolved(tmp_path / "m.gguf"), EngineArgs("m"), lambda *at: seen.append(at))
    assert all(stage == "load" for stage, _, _ in seen)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(info.num_bytes for info in open_gguf(tmp_path / "m.gguf").tensors.values())


def test_the_config_carries_length_scaling_end_tokens_and_vocabulary(tmp_path: Path) -> None:
    case = with_keys(CASES["qwen2"], rope__scaling__type="linear", rope__scaling__factor=4.0)
    write(tmp_path / "m.gguf", case)
    config = load_model(resolved(tmp_path / "m.gguf"), EngineArgs("m")).config
    assert config.context_length == 4 * 4096
    assert config.hf_config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert (config.vocab_size, config.eos_token_ids, config.model_type) == (199, {3}, "qwen2")


def test_the_header_reader_agrees_with_ggufs_own_reader(smollm2_gguf: Path) -> None:
    reader, file = gguf.GGUFReader(smollm2_gguf), open_gguf(smollm2_gguf)
    theirs = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    assert theirs == dict(file.metadata)
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {
        name: info.offset for name, info in file.tensors.items()
    }
