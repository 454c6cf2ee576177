"""``engine.plan``: the memory plan from a config alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ConfigError, MemoryPlanError
from engine.memory.plan import MemoryPlan
from tests.tiny_models import tiny_config, write_weights
from vm_magic.show.plan_view import plan_html

GIVEN = {"device_memory": 51.54e9, "model_memory": 14.96e9, "overhead": 1.13e9}


def test_the_seeds_line_comes_out_of_a_config_of_its_size(tmp_path):
    shape = {"num_hidden_layers": 55, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    config = tiny_config("llama", **shape, torch_dtype="bfloat16", max_position_embeddings=131072)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = engine.plan(str(tmp_path), fraction=0.90, **GIVEN)
    assert plan.log_line() == (
        "metal_limit=51.54GB, fraction=0.90, usable_metal=46.39GB, model_memory=14.96GB, overhead=1.13GB, "
        "kv_budget=30.30GB, per_block_bytes=3604480, num_blocks=8405, max_tokens_cached=134480"
    )


_HYBRID = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "torch_dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
    },
}


@dataclass(frozen=True)
class SeedCase:
    """A model that vllm-metal refused on 51.54 GB at fraction 0.75, and by hand what it needs.

    ``per_token``: bytes of a token on the full layers; ``sliding``: on those that slide; ``state``: of a sequence's
    recurrent and convolution states. ``model_memory`` and ``overhead`` are as the seed printed them.
    """

    config: dict[str, Any]
    length: int
    model_memory: float
    overhead: float
    layers: dict[str, int]
    per_token: int
    sliding: int = 0
    state: int = 0
    num_seqs: int = 0
    longest: int = 262144


SEED_CASES = {
    "gemma-4-26b-a4b": SeedCase(
        {"model_type": "gemma4", "text_config": {
            "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
            "num_attention_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_key_value_heads": 8,
            "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "sliding_window": 1024,
            "sliding_window_pattern": 6, "max_position_embeddings": 262144, "tie_word_embeddings": True,
            "attention_k_eq_v": True, "torch_dtype": "bfloat16"}},
        131072, 21.64e9, 1.08e9, {"full": 5, "sliding": 25},
        per_token=5 * 2 * 2 * 512 * 2,  # layers, keys and values, heads, dimension, bytes of a bfloat16
        sliding=25 * 2 * 8 * 256 * 2,
        num_seqs=59,
    ),
    "qwen3.6-35b-a3b": SeedCase(
        {"model_type": "qwen3_5_moe", "text_config": {
            "model_type": "qwen3_5_moe_text", **_HYBRID, "hidden_size": 2048, "num_hidden_layers": 40,
            "intermediate_size": 512, "num_key_value_heads": 2, "linear_num_value_heads": 32, "num_experts": 8,
            "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
            "decoder_sparse_step": 1, "norm_topk_prob": True}},
        32768, 22.75e9, 1.00e9, {"full": 10, "state": 30},
        per_token=10 * 2 * 2 * 256 * 2,
        # 32 value heads of 128 x 128 in float32; 3 earlier inputs of the convolution over q, k (16 x 128 each) and v
        state=30 * (32 * 128 * 128 * 4 + 3 * (2 * 2048 + 4096) * 2),
        num_seqs=140,
    ),
    "qwen3.6-27b": SeedCase(
        {"model_type": "qwen3_5", "text_config": {
            "model_type": "qwen3_5_text", **_HYBRID, "hidden_size": 5120, "num_hidden_layers": 64,
            "intermediate_size": 17408, "num_key_value_heads": 4, "linear_num_value_heads": 48}},
        32768, 26.19e9, 1.16e9, {"full": 16, "state": 48},
        per_token=16 * 2 * 4 * 256 * 2,
        state=48 * (48 * 128 * 128 * 4 + 3 * (2 * 2048 + 6144) * 2),
        num_seqs=39,
        longest=170144,
    ),
}  # fmt: skip


def seed_plan_of(case: SeedCase, folder: Path, **changes: Any) -> MemoryPlan:
    (folder / "config.json").write_text(json.dumps(case.config))
    given = {"model_memory": case.model_memory, "overhead": case.overhead, "max_model_len": case.length}
    return engine.plan(str(folder), fraction=0.75, device_memory="51.54GB", dtype="bfloat16", **{**given, **changes})


@pytest.mark.parametrize("name", SEED_CASES)
def test_the_three_models_that_the_seed_gave_up_fit_by_these_sums(name, tmp_path):
    case = SEED_CASES[name]
    plan = seed_plan_of(case, tmp_path)
    assert {group.kind: len(group.layers) for group in plan.groups} == case.layers
    assert plan.usable == 38_655_000_000
    fixed = case.state + (1024 // 16 + 1) * 16 * case.sliding  # a window, and the block that it begins in
    ahead = 2048 * case.sliding  # a step's tokens, which run ahead of all windows together
    each = fixed + 16 * case.sliding  # and each sequence's part of them may begin in one more block
    assert plan.state_bytes_per_seq == fixed
    available = 38_655_000_000 - int(case.model_memory) - int(case.overhead)
    one = case.length * case.per_token
    # As many sequences as hold 2048 tokens each, but no more than leave room for one of full length.
    most = min((available - ahead) // (2048 * case.per_token + each), (available - ahead - one) // each)
    assert plan.max_num_seqs == case.num_seqs == most
    checkpoints = (1 + case.num_seqs // 8) * case.state  # states that the prefix cache keeps
    assert plan.kv_budget == available - ahead - case.num_seqs * each - checkpoints > 0
    assert plan.per_block_bytes == 16 * case.per_token
    assert plan.num_blocks == plan.kv_budget // (16 * case.per_token)
    assert plan.max_tokens_cached == 16 * plan.num_blocks >= case.length
    assert plan.kv_bytes_at_max_len == one + fixed < 3 * 2**30
    assert plan.max_concurrency == plan.max_tokens_cached / case.length > 1
    assert plan.max_model_len_that_fits == case.longest
    assert case.longest == min(262144, (available - ahead - each) // (16 * case.per_token) * 16)
    assert plan.log_line().startswith(
        f"metal_limit=51.54GB, fraction=0.75, usable_metal=38.65GB, model_memory={case.model_memory / 1e9:.2f}GB, "
        f"overhead={case.overhead / 1e9:.2f}GB, kv_budget={plan.kv_budget / 1e9:.2f}GB, per_block_bytes="
    )
    assert plan.log_line() in str(plan)


def test_billing_every_layer_of_gemma_for_every_token_gives_vllm_metals_figures(tmp_path):
    """27.5 GiB needed, 21.01 GiB there, 100160 tokens at most: it refused what needs 2.9 GB."""
    case = SEED_CASES["gemma-4-26b-a4b"]
    billed = case.per_token + case.sliding
    assert 131072 * billed == 27.5 * 2**30
    there = (38_655_000_000 - 15_010_000_000 - 1_080_000_000) // (16 * billed) * 16
    assert there == 100_160
    assert round(there * billed / 2**30, 2) == 21.01
    plan = seed_plan_of(case, tmp_path, model_memory=15.01e9)
    assert plan.kv_bytes_at_max_len < 0.1 * 27.5 * 2**30


@pytest.mark.parametrize(("name", "published"), [("qwen3.6-35b-a3b", -1.57e9), ("qwen3.6-27b", -28.11e9)])
def test_setting_states_aside_for_256_sequences_gives_vllm_metals_shortfalls(name, published, tmp_path):
    case = SEED_CASES[name]
    with pytest.raises(MemoryPlanError, match=r"max_num_seqs to \d+ or less") as refused:
        seed_plan_of(case, tmp_path, max_num_seqs=256)
    assert refused.value.kv_budget == pytest.approx(published, abs=0.016e9)  # of figures rounded to 0.01
    fits = refused.value.max_num_seqs_that_fits
    assert seed_plan_of(case, tmp_path, max_num_seqs=fits).max_num_seqs == fits < 256
    longest = seed_plan_of(case, tmp_path, max_model_len="auto")
    assert longest.max_model_len_that_fits == case.longest
    # A chat's next turn needs a state of its own besides the one that the first left for it.
    beside = (case.state // (16 * case.per_token) + 1) * 16
    assert case.longest - beside <= longest.max_model_len <= 262144
    assert longest.max_num_seqs + longest.num_checkpoints >= 2


@pytest.mark.parametrize(
    ("options", "billed"),
    [
        ({"dtype": "float32"}, "4 bytes an element, the model's own type here"),
        ({"dtype": "bfloat16"}, "2 bytes an element, the model's own type here"),
        ({"kv_cache_dtype": "float16"}, "float16"),
    ],
)
def test_a_plans_text_says_which_elements_it_bills(tmp_path, options, billed):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    text = engine.plan(str(tmp_path), **GIVEN, **options).describe()
    assert f"\nkeys and values: {billed}; --dtype and --kv-cache-dtype change it\n" in text


def test_a_plan_of_a_download_that_is_not_whole_says_what_is_missing(tmp_path):
    write_weights(tmp_path, tiny_config("llama"))
    assert "not here" not in str(engine.plan(str(tmp_path)))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00003.safetensors")
    line = "planned from config.json: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors are not here"
    plan = engine.plan(str(tmp_path))
    assert line in str(plan).splitlines()
    assert line in plan_html(plan)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    assert "planned from config.json: model.safetensors is not here" in str(engine.plan(str(tmp_path))).splitlines()


def test_a_bad_fraction_of_a_plan_is_called_what_the_user_wrote(tmp_path):
    with pytest.raises(ConfigError, match=r"^fraction=nan: must be \(0, 1\]"):
        engine.plan(str(tmp_path), fraction=float("nan"), **GIVEN)
    with pytest.raises(ConfigError, match=r"^--memory-fraction 2.0: must be \(0, 1\]"):
        engine.plan(str(tmp_path), memory_fraction=2, **GIVEN)


def test_plans_stand_side_by_side_for_lists_of_settings(tmp_path):
    case = SEED_CASES["qwen3.6-27b"]
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    table = engine.plan_table(
        str(tmp_path), device_memory=["32GB", "51.54GB"], max_model_len=["32K", "128K"], fraction=0.75,
        dtype="bfloat16", model_memory="26.19GB", overhead="1.16GB",
    )  # fmt: skip
    assert [tuple(row.settings.values()) for row in table.rows] == [
        ("32GB", "32K"), ("32GB", "128K"), ("51.54GB", "32K"), ("51.54GB", "128K"),
    ]  # fmt: skip
    assert [row.fits for row in table.rows] == [False, False, True, True]
    assert table.rows[2].plan == seed_plan_of(case, tmp_path)
    assert table.rows[0].error.short_by == 26.19e9 + 1.16e9 + 32768 * case.per_token + case.state - 24e9
    assert "no, 5.65GB short" in str(table)


def test_a_table_over_configurations_plans_each(tmp_path):
    base = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 99}
    base |= {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 256}
    given = []
    for heads in (4, 2):
        given.append(str(tmp_path / f"{heads}.json"))
        Path(given[-1]).write_text(json.dumps(base | {"num_key_value_heads": heads}))
    (tmp_path / "config.json").write_text(json.dumps(base))
    table = engine.plan_table(str(tmp_path), hf_config_path=given, overhead=0, device_memory=1e9)
    four, two = (row.plan.per_block_bytes for row in table.rows)
    assert four == 2 * two


def test_a_table_of_too_many_plans_or_of_a_bad_value_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    with pytest.raises(ConfigError, match="400 plans"):
        engine.plan_table(str(tmp_path), max_num_seqs=list(range(1, 21)), max_model_len=list(range(100, 120)))
    with pytest.raises(ConfigError, match="max-model-len"):
        engine.plan_table(str(tmp_path), max_model_len=["1K", "many"])


@pytest.mark.parametrize("size", ["1.2.3GB", "1e999GB", math.nan, math.inf, 10**400, -1, True, [1]])
def test_a_size_that_is_none_is_refused_in_a_line(tmp_path, size):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    with pytest.raises(ConfigError, match=r"^--device-memory [^\n]{1,45}: must be a size such as 51.54GB or 48GiB$"):
        engine.plan(tmp_path, device_memory=size)
