"""Engine options: what is refused names what the user turned."""

import pytest

from engine.config import EngineArgs
from engine.errors import ConfigError


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
