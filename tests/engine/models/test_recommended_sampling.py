"""Sampling values that a model's authors recommend: from where they come, and how that is said."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

import engine
from engine import LLM, SamplingParams
from engine.errors import ConfigError, ContextLengthError
from engine.models.gguf import GGUFFormat
from engine.models.pypi import PACKAGE_MODELS
from engine.params.engine_args import EngineArgs
from engine.params.sampling_defaults import MODEL_SOURCES, SamplingDefaults, is_default_source
from engine.params.settings import Settings
from engine.runtime.preflight import check_load

CARD = "the model card of HuggingFaceTB/SmolLM2-135M-Instruct"


def header(path: Path, **values: float | int) -> Path:
    """A GGUF file of metadata alone that recommends ``values``."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(f"general.sampling.{key}", value)
    for name in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, name)()
    writer.close()
    return path


def test_a_gguf_file_recommends_what_its_header_says(tmp_path: Path) -> None:
    file = header(tmp_path / "m.gguf", temp=0.6, top_k=20, top_p=0.95, min_p=0.05, penalty_repeat=1.1, mirostat=0)
    assert GGUFFormat().generation_config(file) == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize(("temp", "read"), [(-1.0, 0), (0.0, 0.0), (float("nan"), None), (float("inf"), None)])
def test_a_temperature_below_zero_in_a_header_is_greedy_and_no_number_is_left_out(
    temp: float, read: float | None, tmp_path: Path
) -> None:
    assert GGUFFormat().generation_config(header(tmp_path / "m.gguf", temp=temp)).get("temperature") == read


def test_a_gguf_file_without_recommendations_recommends_nothing(tmp_path: Path) -> None:
    assert GGUFFormat().generation_config(header(tmp_path / "m.gguf")) == {}


@pytest.mark.parametrize("name", PACKAGE_MODELS)
def test_every_package_model_names_its_card_and_valid_values(name: str) -> None:
    model = PACKAGE_MODELS[name]
    assert "/" in model.model_card
    defaults = SamplingDefaults(model.recommended, {}, Settings(), "auto", "model card", model.model_card)
    params = defaults.resolve({})
    assert params.temperature == model.recommended["temperature"]
    assert params.sources["temperature"] == "model card"
    assert params.sources["presence_penalty"] == "default"


def test_a_request_overrides_a_recommendation_and_live_settings_do_while_it_runs() -> None:
    settings = Settings()
    defaults = SamplingDefaults(
        {"temperature": 0.2, "top_p": 0.9}, {"top_p": 0.8}, settings, "auto", "model card", "a/b"
    )
    params = defaults.resolve({"temperature": 0.7})
    assert (params.temperature, params.sources["temperature"]) == (0.7, "request")
    assert (params.top_p, params.sources["top_p"]) == (0.8, "--override-generation-config")
    assert all(map(is_default_source, MODEL_SOURCES))
    assert not is_default_source("request")


def test_the_recommendation_is_said_in_plain_words_with_its_source() -> None:
    own = {"temperature": 0.2, "top_p": 0.9}
    card = SamplingDefaults(own, {}, Settings(), "auto", "model card", "a/b")
    assert card.note() == (
        "Sampling, as the model recommends: temperature 0.2, top_p 0.9 (the model card of a/b); "
        "--generation-config vllm does without"
    )
    header = SamplingDefaults(own, {"top_k": 5}, Settings(), "auto", "general.sampling")
    assert header.note() == (
        "Sampling, as the model recommends: temperature 0.2, top_p 0.9 (the GGUF file's `general.sampling`); top_k 5 "
        "(--override-generation-config); --generation-config vllm does without"
    )
    folder = SamplingDefaults(own, {}, Settings(), "/some/folder")
    assert folder.note() == "Sampling: temperature 0.2, top_p 0.9 (/some/folder); --generation-config vllm does without"
    only = SamplingDefaults({}, {"top_k": 5}, Settings(), "vllm")
    assert only.note() == "Sampling: top_k 5 (--override-generation-config)"
    assert SamplingDefaults({}, {}, Settings()).note() is None
    assert SamplingDefaults({"eos_token_id": 2}, {}, Settings()).note() is None


@pytest.mark.weights
def test_a_package_model_samples_as_its_card_recommends_unless_told_otherwise(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "engine"), LLM("smollm2", max_model_len=256) as llm:
        assert (llm.sampling_params().temperature, llm.sampling_params().top_p) == (0.2, 0.9)
        assert any(note.startswith("Sampling, as the model recommends") and CARD in note for note in llm.notes)
        assert f"have been overridden by {CARD}: `{{'temperature': 0.2, 'top_p': 0.9}}`" in caplog.text
    facts = engine.inspect("smollm2").section("sampling defaults")
    assert (facts["temperature"].value, facts["temperature"].source) == (
        0.2,
        f"{CARD.removeprefix('the ')}: temperature",
    )
    assert not engine.inspect("smollm2", generation_config="vllm").section("sampling defaults")


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 2}, {"top_k": 1.5}, {"max_new_tokens": 0}])
def test_a_recommended_value_out_of_its_range_is_refused_by_the_load_with_the_way_out(
    wrong: dict[str, Any], tiny_model_dir: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps(wrong))
    with pytest.raises(ConfigError, match=r"`generation_config\.json`: .*--generation-config vllm does without"):
        check_load(EngineArgs.from_options(str(folder), {}))
    check_load(EngineArgs.from_options(str(folder), {"generation_config": "vllm"}))


def test_more_tokens_than_there_is_room_for_are_fewer_where_the_model_recommends_them(
    tiny_model_dir: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 32768}')
    with LLM(str(folder), max_model_len=64, gpu_memory_utilization=0.2) as llm:
        reply = llm.chat([{"role": "user", "content": "Hi"}], use_tqdm=False)
        assert reply[0].outputs[0].finish_reason in ("length", "stop")
        with pytest.raises(ContextLengthError, match="you requested 32768"):
            llm.generate("Hi", SamplingParams(max_tokens=32768), use_tqdm=False)
