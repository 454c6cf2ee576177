"""Named sampling sets, what is set over them, and where each value came from."""

import pytest

from engine.errors import ConfigError, RequestError
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.settings import PRESETS, Settings


def test_the_three_qwen_sets_are_those_of_the_model_card() -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")
    assert {name: tuple(values[key] for key in names) for name, values in PRESETS.items()} == {
        "qwen-thinking": (1.0, 0.95, 20, 0.0, 1.5, 1.0),
        "qwen-coding": (0.6, 0.95, 20, 0.0, 0.0, 1.0),
        "qwen-instruct": (0.7, 0.80, 20, 0.0, 1.5, 1.0),
    }


def test_a_preset_replaces_what_was_set_of_its_names_and_nothing_else() -> None:
    settings = Settings()
    settings.update(temperature=0.1, max_tokens=7)
    settings.update(preset="qwen-coding")
    assert dict(settings.snapshot()) == {**PRESETS["qwen-coding"], "max_tokens": 7}
    settings.update(top_k=5)
    assert settings.snapshot()["top_k"] == 5
    settings.update(preset="model")
    assert dict(settings.snapshot()) == {"max_tokens": 7}
    assert settings.preset is None


def test_the_settings_show_their_values() -> None:
    settings = Settings()
    assert repr(settings) == "Settings()"
    settings.update(temperature=0.2, stop=["x"], thinking_token_budget=9)
    assert repr(settings) == "Settings(temperature=0.2, stop=['x'], thinking_token_budget=9)"


def test_an_unknown_preset_or_a_bad_value_beside_one_changes_nothing() -> None:
    settings = Settings()
    settings.update(preset="qwen-instruct", seed=3)
    before = dict(settings.snapshot())
    with pytest.raises(ConfigError, match="qwen-thinking, qwen-coding, qwen-instruct, model"):
        settings.update(preset="qwen")
    with pytest.raises(RequestError, match="top_p"):
        settings.update(preset="qwen-coding", top_p=2)
    assert (settings.preset, dict(settings.snapshot())) == ("qwen-instruct", before)


def test_every_value_tells_which_layer_it_came_from() -> None:
    settings = Settings()
    settings.update(preset="qwen-coding")
    settings.update(top_p=0.5)
    defaults = SamplingDefaults({"temperature": 0.9, "max_new_tokens": 50}, {"repetition_penalty": 1.2}, settings)
    params = defaults.resolve({"min_p": 0.1, "seed": None}, source="flag")
    told = {name: (getattr(params, name), source) for name, source in params.sources.items() if source != "default"}
    assert told == {
        "temperature": (0.6, "preset qwen-coding"),
        "top_p": (0.5, "set"),
        "top_k": (20, "preset qwen-coding"),
        "min_p": (0.1, "flag"),
        "presence_penalty": (0.0, "preset qwen-coding"),
        "repetition_penalty": (1.0, "preset qwen-coding"),
        "max_tokens": (50, "generation_config.json"),
    }


def test_a_changed_copy_tells_what_was_changed_and_sources_do_not_make_values_differ() -> None:
    params = SamplingDefaults({}, {}, Settings()).resolve({"top_k": 3})
    changed = params.replace(temperature=0.2)
    assert changed.sources["temperature"] == "request"
    assert changed.sources["top_p"] == "default"
    assert params == type(params)(top_k=3, max_tokens=None)
    with pytest.raises(RequestError, match="sources"):
        params.replace(sources={})


def test_the_line_about_the_models_defaults_is_vllms() -> None:
    own = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}
    assert SamplingDefaults(own, {}, Settings()).log_line() == (  # as in the seed
        "Default vLLM sampling parameters have been overridden by the model's `generation_config.json`: "
        "`{'temperature': 1.0, 'top_k': 64, 'top_p': 0.95}`. If this is not intended, please relaunch vLLM instance "
        "with `--generation-config vllm`."
    )
    said = SamplingDefaults(own, {"top_k": 5}, Settings(), "/some/folder").log_line()
    assert said is not None
    assert "overridden by /some/folder: `{'temperature': 1.0, 'top_k': 5, 'top_p': 0.95}`" in said
    assert SamplingDefaults({}, {"temperature": 0.3}, Settings(), "vllm").log_line() is None
    assert SamplingDefaults({}, {}, Settings()).log_line() is None
