"""Entries of other types than they should be are refused by name, in one line, before anything is computed of them."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest

import engine
from engine.errors import ModelLoadError, ModelNotFoundError
from engine.models.folder import stored_weights
from engine.models.gguf_config import gguf_config
from engine.models.gguf_file import open_gguf
from engine.models.quantization import quantization_of
from engine.models.resolve import resolve
from engine.models.spelling import with_every_spelling
from engine.models.weight_format import end_token_ids
from tests.sweep.configurations import tiny_config


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"vocab_size": {"a": 1}}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings"),
        ({"original_max_position_embeddings": "x"}, "original_max_position_embeddings"),
        ({"intermediate_size": "x"}, "intermediate_size"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "su", "long_factor": 3}}, "rope_scaling.long_factor"),
        ({"rope_parameters": {"full_attention": {"factor": [1]}}}, "rope_parameters.full_attention.factor"),
        ({"layer_types": [{"a": 1}]}, "layer_types"),
        ({"text_config": 1.5}, "text_config"),
        ({"text_config": {"vocab_size": "x"}}, "text_config.vocab_size"),
        ({"quantization": "4bit"}, "quantization"),
        ({"per_layer_config": {"0": None}}, "per_layer_config"),
    ],
)
def test_an_entry_of_another_type_is_refused_by_name(entries: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"config.json has (a )?{named}\b") as refused:
        with_every_spelling({"model_type": "llama", **entries})
    assert "\n" not in str(refused.value)


def test_entries_that_are_null_or_tell_each_layer_apart_are_left_to_the_model() -> None:
    with_every_spelling(
        {
            "model_type": "step3p5",
            "rope_theta": [10000.0, 5e6],
            "intermediate_size": [64, 32],
            "rope_scaling": None,
            "quantization": False,
            "head_dim": None,
            "max_position_embeddings": None,
        }
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "mxfp4", "modules_to_not_convert": 3},
        {"quant_method": "modelopt", "quantization": 3},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [3]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": 3}}},
        {"quant_method": "fp8", "weight_block_size": 3},
        {"quant_method": "awq", "group_size": "x"},
    ],
)
def test_settings_of_a_quantization_of_other_types_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="quantization_config has"):
        quantization_of({"quantization_config": settings}, tmp_path)


@pytest.mark.parametrize("value", ["x", [[]], {"a": 1}, 0.5])
def test_end_tokens_that_are_no_numbers_are_refused(value: Any) -> None:
    with pytest.raises(ModelLoadError, match="eos_token_id"):
        end_token_ids({"eos_token_id": value})


@pytest.mark.parametrize("entry", [{"sliding_window": float("inf")}, {"sliding_window": 0}, {"num_hidden_layers": -1}])
def test_a_configuration_that_its_model_cannot_run_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config("gpt_oss"), **entry}))
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        engine.plan(str(tmp_path), device_memory="2GB")


@pytest.mark.parametrize(
    "entry", [{"num_attention_heads": 0}, {"num_attention_heads": -2.5}, {"num_hidden_layers": "x"}]
)
def test_a_configuration_of_which_no_model_can_be_built_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config("qwen3_moe"), **entry}))
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        engine.plan(str(tmp_path), device_memory="2GB")


def test_a_width_of_each_layer_is_planned_by_the_widest(tmp_path: Path) -> None:
    config = tiny_config("gemma3n")
    text = config["text_config"]
    plans = []
    for width in (text["intermediate_size"], [text["intermediate_size"]] * text["num_hidden_layers"]):
        text["intermediate_size"] = width
        (tmp_path / "config.json").write_text(json.dumps(config))
        plans.append(engine.plan(str(tmp_path), device_memory="2GB"))
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, [4]]},
        {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
    ],
)
def test_a_header_of_other_types_is_not_a_safetensors_file(entry: dict[str, Any], tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        stored_weights(tmp_path)


@pytest.mark.parametrize("metadata", [[], {"total_size": "x"}, {"total_size": []}, 3])
def test_an_index_without_a_size_leaves_it_open(metadata: Any, tmp_path: Path) -> None:
    index = {"metadata": metadata, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_weights(tmp_path).num_bytes == 0


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("gone")])
def test_a_folder_or_a_link_to_nothing_is_no_file_of_weights(make: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    make(tmp_path / "model.safetensors")
    assert stored_weights(tmp_path).tensors == ()
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors missing"):
        resolve(str(tmp_path))
    assert engine.plan(str(tmp_path), device_memory="2GB").model_memory


def _gguf(path: Path, key: str, value: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add = {str: writer.add_string, float: writer.add_float64, int: writer.add_int64, list: writer.add_array}
    add[type(value)](key, value)
    for name, to in (("write_header_to_file", ()), ("write_kv_data_to_file", ()), ("write_tensors_to_file", ())):
        getattr(writer, name)(*to)
    writer.close()
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.alignment", float("inf")),
        ("split.count", "x"),
        ("tokenizer.ggml.eos_token_id", float("nan")),
        ("tokenizer.ggml.token_type", 1.0),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.chat_template", 3),
    ],
)
def test_a_value_of_another_type_in_a_gguf_file_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"{key} = "):
        open_gguf(_gguf(tmp_path / "m.gguf", key, value))


@pytest.mark.parametrize("value", ["x", float("nan"), 0])
def test_layers_that_are_no_count_in_a_gguf_file_are_refused(value: Any, tmp_path: Path) -> None:
    file = open_gguf(_gguf(tmp_path / "m.gguf", "llama.block_count", value))
    with pytest.raises(ModelLoadError, match=r"m\.gguf"):
        gguf_config(file)
