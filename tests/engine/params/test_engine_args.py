"""Engine options: what is refused names what the user turned."""

from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("given", ["auto", "paged", "reference", "PAGED"])
def test_an_attention_backend_is_chosen_by_flag_or_variable_and_the_flag_goes_first(given):
    assert EngineArgs("m").attention_backend == "auto"
    variable = {"VLLM_METAL_ATTENTION_BACKEND": given}
    assert EngineArgs.from_options("m", {}, variable).attention_backend == given.lower()
    assert EngineArgs.from_options("m", {"attention-backend": "reference"}, variable).attention_backend == "reference"
    assert EngineArgs.from_options("m", {}, variable).memory_flag == "gpu_memory_utilization"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("fast", "must be one of auto, paged, reference"),
        ("small", "must be one of auto, paged, reference"),
        *(
            (name, "vLLM's name; this engine has auto, paged, reference: take paged")
            for name in ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "ROCM_AITER_FA", "xformers", "FLASH_ATTN_DIFFKV")
        ),
        *((name, r"take reference") for name in ("TORCH_SDPA", "FLEX_ATTENTION")),
        *((name, r"take auto") for name in ("FLASHMLA", "FLASHINFER_MLA", "TRITON_MLA", "CPU_ATTN", "FLASHMLA_SPARSE")),
    ],
)
def test_another_attention_backend_is_refused_with_the_one_to_take(given, why):
    with pytest.raises(ConfigError, match=rf"^--attention-backend {given}: .*{why}$") as refused:
        EngineArgs.from_options("m", {"attention_backend": given}, {})
    assert (refused.value.flag, refused.value.value) == ("attention_backend", given)
    assert refused.value.allowed == "auto, paged, reference"
    variable = "VLLM_METAL_ATTENTION_BACKEND"
    with pytest.raises(ConfigError, match=rf"^{variable}={given}: .*{why}$") as refused:
        EngineArgs.from_options("m", {}, {variable: given})
    assert refused.value.flag == variable
    with pytest.raises(ConfigError, match=why):
        EngineArgs("m", attention_backend=given)


def test_kernels_over_pages_and_contiguous_caches_are_not_asked_for_together():
    contiguous = {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}
    line = (
        "--attention-backend paged (or VLLM_METAL_ATTENTION_BACKEND) needs pages, and VLLM_METAL_USE_PAGED_ATTENTION=0 "
        "turns them off: leave one of the two out"
    )
    with pytest.raises(ConfigError) as refused:
        EngineArgs.from_options("m", {"attention_backend": "paged"}, contiguous)
    assert str(refused.value) == line
    with pytest.raises(ConfigError, match="leave one of the two out"):
        EngineArgs.from_options("m", {}, {**contiguous, "VLLM_METAL_ATTENTION_BACKEND": "paged"})
    for name in ("auto", "reference"):  # neither needs pages
        assert not EngineArgs.from_options("m", {"attention_backend": name}, contiguous).use_paged_attention


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


@pytest.mark.parametrize(
    "name", ["trust_remote_code", "enable_prefix_caching", "enable_auto_tool_choice", "use_paged_attention"]
)
def test_a_switch_is_what_its_words_say_and_nothing_else_turns_it(name: str) -> None:
    for value, wanted in {"false": False, "0": False, "No": False, " off ": False, "true": True, "1": True}.items():
        assert getattr(EngineArgs.from_options("m", {name: value}), name) is wanted
    for value in ("maybe", "", 0, 1, [], object()):
        with pytest.raises(ConfigError, match="must be true or false"):
            EngineArgs.from_options("m", {name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 1.5}, {"block_size": True}, {"gpu_memory_utilization": True}, {"max_num_seqs": False},
        {"served_model_name": 5}, {"served_model_name": [5]},
    ],
)  # fmt: skip
def test_values_are_never_cut_or_taken_for_others(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} [^\\n]*: must be "):
        EngineArgs.from_options("m", given)


def test_a_model_is_a_name_or_a_path() -> None:
    assert EngineArgs.from_options(Path("some") / "folder", {}).model == str(Path("some") / "folder")
    for model in (5, b"x", None, Path):
        with pytest.raises(ConfigError, match=r"^a model is a name or a path, not of type "):
            EngineArgs.from_options(model, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "seed"])
@pytest.mark.parametrize("value", [1 << 64, 10**400, 1 << 20_000], ids=["64", "400", "20000"])
def test_numbers_beyond_all_sense_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} of \d+ bits: must be at most \d+$"):
        EngineArgs.from_options("m", {name: value})
