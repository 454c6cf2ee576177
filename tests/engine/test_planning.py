"""``engine.plan``: the memory plan from a config alone."""

import json
import shutil

import pytest

import engine
from engine.config import EngineArgs
from engine.hub import resolve
from engine.runner.devices import describe_device
from engine.runner.loader import load_model
from tests.tiny_models import tiny_config

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


def test_on_this_cpu_half_precision_weights_are_planned_as_they_are_loaded(tiny_model_dir, tmp_path):
    mx = pytest.importorskip("mlx.core")
    if describe_device().kind != "cpu":
        pytest.skip("only a CPU makes weights float32")
    folder = tmp_path / "half"
    shutil.copytree(tiny_model_dir("llama"), folder)
    weights = mx.load(str(folder / "model.safetensors"))
    half = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, metadata={"format": "mlx"})
    planned = engine.plan(str(folder)).model_memory
    assert planned == load_model(resolve(str(folder)), EngineArgs(str(folder))).num_bytes


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
SEED_CASES = {
    "gemma-4-26b-a4b": (
        {"model_type": "gemma4", "text_config": {
            "model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
            "num_attention_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_key_value_heads": 8,
            "num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "sliding_window": 1024,
            "sliding_window_pattern": 6, "max_position_embeddings": 262144, "tie_word_embeddings": True,
            "attention_k_eq_v": True, "torch_dtype": "bfloat16"}},
        131072, "21.64GB", "1.08GB", 5 * 2 * 2 * 512 * 2, 0,
    ),
    "qwen3.6-35b-a3b": (
        {"model_type": "qwen3_5_moe", "text_config": {
            "model_type": "qwen3_5_moe_text", **_HYBRID, "hidden_size": 2048, "num_hidden_layers": 40,
            "intermediate_size": 512, "num_key_value_heads": 2, "linear_num_value_heads": 32, "num_experts": 8,
            "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
            "decoder_sparse_step": 1, "norm_topk_prob": True}},
        32768, "22.75GB", "1.00GB", 10 * 2 * 2 * 256 * 2, 30 * (32 * 128 * 128 * 4 + 3 * (2 * 2048 + 4096) * 2),
    ),
    "qwen3.6-27b": (
        {"model_type": "qwen3_5", "text_config": {
            "model_type": "qwen3_5_text", **_HYBRID, "hidden_size": 5120, "num_hidden_layers": 64,
            "intermediate_size": 17408, "num_key_value_heads": 4, "linear_num_value_heads": 48}},
        32768, "26.19GB", "1.16GB", 16 * 2 * 4 * 256 * 2, 48 * (48 * 128 * 128 * 4 + 3 * (2 * 2048 + 6144) * 2),
    ),
}  # fmt: skip
"""config.json, context, weights, overhead (as the seed printed them), then by hand: bytes of a token on the full
layers (keys and values, heads, dimension, two bytes) and of a sequence's recurrent and convolution states."""


@pytest.mark.parametrize("name", SEED_CASES)
def test_the_three_models_that_the_seed_gave_up_fit(name, tmp_path):
    """vllm-metal needs 27.5 GiB for the first, and is short of 1.57 GB and 28.11 GB for the others."""
    config, length, weights, overhead, per_token, state = SEED_CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = engine.plan(
        str(tmp_path), max_model_len=length, fraction=0.75, device_memory="51.54GB", model_memory=weights,
        overhead=overhead, dtype="bfloat16",
    )  # fmt: skip
    assert plan.per_block_bytes == 16 * per_token
    assert plan.kv_budget > 0
    assert plan.max_tokens_cached >= length
    assert plan.kv_bytes_at_max_len < 3.5e9
    assert sum(group.state_bytes for group in plan.groups) == state
