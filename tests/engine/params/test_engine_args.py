"""Engine options: what is refused names what the user turned."""

import pytest

from engine.errors import ConfigError
from engine.params.engine_args import EngineArgs


@pytest.mark.parametrize(
    ("options", "variables", "said", "flag"),
    [
        (
            {},
            {"VLLM_METAL_MEMORY_FRACTION": "2"},
            "VLLM_METAL_MEMORY_FRACTION=2.0: must be",
            "VLLM_METAL_MEMORY_FRACTION",
        ),
        ({}, {"VLLM_METAL_MEMORY_FRACTION": "all"}, "VLLM_METAL_MEMORY_FRACTION=all: ", "VLLM_METAL_MEMORY_FRACTION"),
        (
            {"gpu_memory_utilization": 2},
            {"VLLM_METAL_MEMORY_FRACTION": "0.5"},
            "--gpu-memory-utilization 2.0: must be",
            "gpu_memory_utilization",
        ),
    ],
)
def test_a_bad_fraction_is_refused_under_the_name_it_was_given_by(options, variables, said, flag):
    with pytest.raises(ConfigError) as refused:
        EngineArgs.from_options("smollm2", options, variables)
    assert str(refused.value).startswith(said)
    assert refused.value.flag == flag


@pytest.mark.parametrize("given", ["nan", float("nan"), 0, -1, 1.01, float("inf")])
def test_a_fraction_that_is_no_fraction_is_refused_by_its_flag_and_range(given):
    with pytest.raises(ConfigError, match=r"memory-fraction .*: must be \(0, 1\]"):
        EngineArgs.from_options("smollm2", {"memory_fraction": given}, {})


def test_overridden_defaults_out_of_range_are_refused_before_anything_is_loaded():
    with pytest.raises(
        ConfigError, match=r"--override-generation-config: temperature must be non-negative, got -3"
    ) as refused:
        EngineArgs.from_options("smollm2", {"override_generation_config": {"temperature": -3}}, {})
    assert refused.value.flag == "override_generation_config"


def test_a_step_has_a_token_for_every_sequence_or_is_refused_in_vllms_words():
    with pytest.raises(
        ConfigError, match=r"max_num_batched_tokens \(32\) must be greater than or equal to max_num_seqs"
    ):
        EngineArgs("m", max_num_seqs=33, max_num_batched_tokens=32)
    assert EngineArgs("m", max_num_seqs=32, max_num_batched_tokens=32).batched_tokens(512) == 32
    assert EngineArgs("m", max_num_seqs=600).batched_tokens(512) == 600
    assert EngineArgs("m").batched_tokens(512) == 512
