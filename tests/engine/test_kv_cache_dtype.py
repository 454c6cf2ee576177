"""``--kv-cache-dtype`` at the doors: its names, what is refused and how, and an engine that runs on quantized pages."""

import pytest

import engine
from engine.errors import ConfigError, UnsupportedOptionError
from engine.llm import LLM
from engine.memory.cache_spec import FullAttentionSpec
from engine.params.engine_args import EngineArgs
from engine.params.kv_dtype import kv_cache_dtype, unquantized_note
from engine.params.sampling_params import SamplingParams
from tests.memory_plans import make_plan
from vm_magic.commands.export import Served, serve_command
from vm_magic.commands.table import command_parser

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize(
    ("given", "known"),
    [("auto", "auto"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"),
     ("int8", "int8"), ("int4", "int4"), ("int8_per_token_head", "int8"), ("int4_per_token_head", "int4")],
)  # fmt: skip
def test_names_of_vllm_and_mlx_are_known(given, known):
    assert EngineArgs.from_options("m", {"kv_cache_dtype": given}, {}).kv_cache_dtype == known
    assert command_parser("load").read(["m", "--kv-cache-dtype", given]).kv_cache_dtype == known


@pytest.mark.parametrize(
    ("given", "instead"),
    [("fp8", "int8"), ("fp8_e4m3", "int8"), ("fp8_e5m2", "int8"), ("fp8_per_token_head", "int8"), ("nvfp4", "int4"),
     ("turboquant_4bit_nc", "int4")],
)  # fmt: skip
def test_other_values_of_vllm_are_refused_with_what_to_use(given, instead):
    for refusing in (
        lambda: EngineArgs.from_options("m", {"kv_cache_dtype": given}, {}),
        lambda: EngineArgs("m", kv_cache_dtype=given),
    ):
        with pytest.raises(UnsupportedOptionError, match=f"^--kv-cache-dtype {given} is not .*use {instead}$"):
            refusing()
    with pytest.raises(Exception, match=f"kv-cache-dtype: {given} is not supported.*use {instead}"):
        command_parser("load").read(["m", "--kv-cache-dtype", given])


def test_unknown_names_are_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"^--kv-cache-dtype int3: must be one of auto, .*int8, int4$"):
        kv_cache_dtype("int3")


def test_contiguous_caches_are_not_kept_in_another_type():
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype int8 .*VLLM_METAL_USE_PAGED_ATTENTION=0"):
        EngineArgs.from_options("m", {"kv_cache_dtype": "int8"}, {"VLLM_METAL_USE_PAGED_ATTENTION": "0"})


def test_an_architecture_that_falls_back_to_contiguous_caches_refuses_the_flag():
    contiguous = FullAttentionSpec((0, 1), bytes_per_token=256)
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype float16: .*contiguous caches.*leave the flag out"):
        make_plan(groups=[contiguous], kv_cache_dtype="float16")


def test_heads_that_cannot_be_quantized_are_refused_or_named():
    with pytest.raises(ConfigError, match="--kv-cache-dtype int4: head dimension 80 is not a multiple of 32; use auto"):
        unquantized_note("int4", [80, 80])
    assert unquantized_note("int4", [64, 128]) is unquantized_note("float16", [80]) is None
    assert "head dimension 16 is not a multiple of 32: such keys or values keep" in str(
        unquantized_note("int8", [512, 16])
    )
    assert "states stay as they are" in str(unquantized_note("int8", []))


def test_a_model_whose_heads_are_too_small_is_refused_in_the_plan_and_at_load(tiny_model_dir):
    folder = str(tiny_model_dir("llama"))
    for door in (engine.plan, LLM):
        with pytest.raises(ConfigError, match="--kv-cache-dtype int8: head dimension 16 is not a multiple of 32"):
            door(folder, kv_cache_dtype="int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_an_engine_on_small_pages_plans_them_and_answers_the_same_twice(tiny_model_dir, dtype):
    folder = str(tiny_model_dir("llama", head_dim=64))
    planned = engine.plan(folder, kv_cache_dtype=dtype)
    wide = engine.plan(folder)
    assert planned.per_block_bytes == wide.per_block_bytes * {"bfloat16": 128, "int8": 72, "int4": 40}[dtype] / 256
    with LLM(folder, kv_cache_dtype=dtype, max_model_len=512, gpu_memory_utilization=0.2) as llm:
        assert llm.plan.per_block_bytes == planned.per_block_bytes
        prompts = [list(range(10, 10 + length)) for length in (5, 60, 100)]
        first = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
        again = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in again] == first
        assert [output.num_cached_tokens for output in again] == [0, 48, 96]
        pools = llm._thread.call(
            lambda engine: [(pool.num_blocks, pool.nbytes) for pool in engine.runner.backend.pools]
        )
    assert [size for _, size in pools] == [blocks * planned.per_block_bytes for blocks, _ in pools]


def test_latent_vectors_are_quantized_and_short_rotary_keys_stay(tiny_model_dir):
    """A row of DeepSeek: a latent vector of 64 elements (72 bytes in int8) and a rotary key of 8 (32 bytes)."""
    latent = {"kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
               "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
    folder = str(tiny_model_dir("deepseek_v3", **latent, **experts))
    with LLM(folder, kv_cache_dtype="int8", max_model_len=512, gpu_memory_utilization=0.2) as llm:
        assert any("head dimension 8 is not a multiple of 32" in note for note in llm.notes)
        assert llm.plan.per_block_bytes == 16 * 4 * (72 + 32)
        assert len(llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids) == 6


def test_the_exported_command_has_vllms_name():
    text = serve_command(Served(EngineArgs("org/m", kv_cache_dtype="int8")))
    assert "--kv-cache-dtype int8_per_token_head" in text
