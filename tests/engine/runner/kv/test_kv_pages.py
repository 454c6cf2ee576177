"""Pages in every element type: what they take is what the plan says, and what was written comes back."""

import mlx.core as mx
import numpy as np
import pytest

from engine.params.kv_dtype import KV_CACHE_DTYPES, QUANTIZED_BITS
from engine.runner.kv.kv_pages import Pages, packing
from engine.runner.kv.kv_pool import KVPool, StatePool
from engine.runner.kv.kv_spec import LayerShape, flatten, group_leaves, group_spec, probe_caches
from tests.tiny_models import build_model, tiny_config

BLOCK_SIZE = 16
HEADS_OF_64 = {"head_dim": 64}
KINDS = {
    "full": ("llama", HEADS_OF_64),
    "sliding": ("gemma3_text", {"head_dim": 32}),
    "latent": ("deepseek_v3", {
        "kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "state": ("qwen3_next", {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [],
        "shared_expert_intermediate_size": 32, "partial_rotary_factor": 0.25, **HEADS_OF_64}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pools_take_the_bytes_that_are_planned(kind, dtype):
    name, changes = KINDS[kind]
    model = build_model(tiny_config(name, vocab_size=199, **changes))
    groups = group_leaves(flatten(probe_caches(model)))
    specs = [group_spec(leaves, BLOCK_SIZE, 512, dtype) for leaves in groups]
    assert kind in [spec.kind for spec in specs]
    for leaves, spec in zip(groups, specs, strict=True):
        if spec.kind == "state":
            pool = StatePool(leaves)
            planned = spec.state_bytes
        else:
            pool = KVPool([leaf.shape for leaf in leaves], BLOCK_SIZE, dtype)
            planned = BLOCK_SIZE * spec.bytes_per_token
        for num_blocks in (3, 10):
            pool.grow(num_blocks)
            assert pool.nbytes == num_blocks * planned
        pool.release()
        assert pool.nbytes == 0


def test_bytes_of_a_token_by_hand():
    """A head of 64 float32 elements: 64 or 32 bytes of integers, a scale and a bias of four bytes each."""
    shape = LayerShape(3, 64, 64, mx.float32)
    taken = {dtype: sum(vectors.num_bytes(dtype) for vectors in shape.vectors) for dtype in KV_CACHE_DTYPES}
    assert taken == {
        "auto": 3 * 2 * 256, "float32": 3 * 2 * 256, "float16": 3 * 2 * 128, "bfloat16": 3 * 2 * 128,
        "int8": 3 * 2 * (64 + 8), "int4": 3 * 2 * (32 + 8),
    }  # fmt: skip
    halves = LayerShape(1, 128, 96, mx.bfloat16)
    assert sum(vectors.num_bytes("int4") for vectors in halves.vectors) == 64 + 2 * 4 + 48 + 3 * 4


@pytest.mark.parametrize("bits", QUANTIZED_BITS.values())
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_unpacking_is_mlxs(dim, bits, dtype):
    rows = mx.random.normal((2, 3, 5, dim), key=mx.random.key(0)).astype(dtype)
    way = packing(dim, f"int{bits}")
    assert way is not None
    arrays = way.pack(rows)
    expected = mx.dequantize(*arrays, group_size=way.group_size, bits=bits)
    found = way.unpack(arrays)
    assert found.dtype == dtype
    assert float(mx.abs(found - expected).max()) <= (0 if dtype == mx.float32 else 0.02)
    error = float(mx.abs(found - rows).max())
    assert 0 < error < {8: 0.04, 4: 0.5}[bits]


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
def test_rows_survive_growth_and_a_snapshot_outlives_what_is_written_after_it(dtype):
    pages = Pages(2, 64, mx.float32, dtype)
    pages.grow(4)
    row = mx.random.normal((1, 2, 1, 64), key=mx.random.key(1))
    write(pages, 3, row)
    kept = read(pages, 3)
    pages.grow(9)
    assert np.array_equal(read(pages, 3), kept)
    snapshot = pages.snapshot()
    write(pages, 3, -row)
    assert not np.array_equal(read(pages, 3), kept)
    pages.arrays = snapshot
    assert np.array_equal(read(pages, 3), kept)


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
def test_blocks_move_with_all_that_belongs_to_them_when_a_pool_shrinks(dtype):
    pool = KVPool([LayerShape(2, 64, 32, mx.float32)], 4, dtype)
    pool.grow(6)
    key, value = (mx.random.normal((1, 2, 1, dim), key=mx.random.key(dim)) for dim in (64, 32))
    write(pool.keys[0], 5 * 4 + 3, key)
    write(pool.values[0], 5 * 4 + 3, value)
    kept = read(pool.keys[0], 23), read(pool.values[0], 23)
    size = pool.nbytes
    pool.shrink(2, {5: 1})
    assert pool.nbytes == size / 3
    assert np.array_equal(read(pool.keys[0], 7), kept[0])
    assert np.array_equal(read(pool.values[0], 7), kept[1])


def write(pages: Pages, slot: int, row: mx.array) -> None:
    for array, part in zip(pages.arrays, pages.encode(row), strict=True):
        array[:, :, slot : slot + 1] = part


def read(pages: Pages, slot: int) -> np.ndarray:
    return np.array(pages.decode([array[:, :, slot : slot + 1] for array in pages.arrays]).astype(mx.float32))
