"""The element types and quantizations of model folders: how each is written, and what becomes of it here."""

import functools
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from tests.checkpoints import packing
from tests.checkpoints.stored import Tensors
from tests.checkpoints.writers import (
    AWQ,
    FP8,
    GPTQ,
    INT4,
    NUMBERED,
    NVFP4,
    Writer,
    bitnet,
    by_mlx,
    compressed,
    deepseek,
    experts,
    mistral4,
    mixed_bits,
    modelopt,
    of_tool,
    of_types,
    plain_type,
    unread,
    write_gpt_oss,
    write_muse_spark,
)


@dataclass(frozen=True)
class Checkpoint:
    """A kind of folder. ``refused``: words of the refusal, None where it loads.

    ``plain`` writes the same values unpacked, where mlx-lm fails over an entry that we understand. Where not ``runs``,
    mlx-lm's model of the architecture needs Metal.
    """

    write: Writer
    refused: str | None = None
    plain: Writer | None = None
    runs: bool = True


def _awq(name: str, weight: mx.array) -> Tensors:
    return packing.awq(name, weight, 32, zeros=True)


def _awq_symmetric(name: str, weight: mx.array) -> Tensors:
    return packing.awq(name, weight, 32, zeros=False)


_gptq = functools.partial(packing.gptq, group_size=32, g_idx=True)
_modelopt = functools.partial(packing.nvfp4, tool="modelopt")
_llm_compressor = functools.partial(packing.nvfp4, tool="compressed-tensors")
_BUT_EXPERTS = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
_KIMI = compressed("pack-quantized", INT4, ignore=_BUT_EXPERTS)
_KIMI_K3 = compressed(
    "mxfp4-pack-quantized",
    {**NVFP4, "group_size": 32},
    ignore=[*_BUT_EXPERTS, "re:.*res_proj", "re:.*routed_expert_.*"],
)
_EXPERTS = ".mlp.experts."


def _one_scale(name: str, weight: mx.array) -> Tensors:
    return packing.fp8_tensor(name, weight, "weight_scale")


def _no_scale(name: str, weight: mx.array) -> Tensors:
    return packing.fp8_tensor(name, weight, None)


def _activations(mode: str) -> Writer:
    return by_mlx(mode=mode, more={"quantize_activations": True})


CHECKPOINTS: dict[str, Checkpoint] = {
    "float32": Checkpoint(of_types(mx.float32)),
    "float16": Checkpoint(of_types(mx.float16)),
    "bfloat16": Checkpoint(of_types(mx.bfloat16)),
    "bfloat16, norms float32": Checkpoint(of_types(mx.bfloat16, mx.float32)),
    "float64": Checkpoint(plain_type("F64"), "F64 tensors"),
    "int8 without scales": Checkpoint(plain_type("I8"), "is stored as I8"),
    "uint8 without scales": Checkpoint(plain_type("U8"), "is stored as U8"),
    **{f"MLX {bits}-bit": Checkpoint(by_mlx(bits=bits, group_size=32)) for bits in (1, 2, 3, 4, 5, 6, 8)},
    "MLX 4-bit, groups of 64": Checkpoint(by_mlx(bits=4, group_size=64)),
    "MLX 7-bit": Checkpoint(by_mlx(bits=4, group_size=32, entry={"bits": 7}), "bits 7"),
    "MLX, groups of 16": Checkpoint(by_mlx(bits=4, group_size=32, entry={"group_size": 16}), "group_size 16"),
    "MLX, mixed bits": Checkpoint(by_mlx(bits=3, group_size=32, predicate=mixed_bits)),
    "MLX 4-bit, experts": Checkpoint(by_mlx("qwen3_moe", bits=4, group_size=32)),
    "MLX mxfp4": Checkpoint(by_mlx(mode="mxfp4")),
    "MLX nvfp4": Checkpoint(by_mlx(mode="nvfp4")),
    "MLX mxfp8": Checkpoint(by_mlx(mode="mxfp8")),
    "MLX mxfp4, experts": Checkpoint(by_mlx("qwen3_moe", mode="mxfp4")),
    "MLX nvfp4, experts": Checkpoint(by_mlx("qwen3_moe", mode="nvfp4")),
    "MLX nvfp4, global scales": Checkpoint(by_mlx("qwen3_moe", mode="nvfp4", global_scale=True)),
    "MLX nvfp4, activations": Checkpoint(_activations("nvfp4")),
    "MLX mxfp8, activations": Checkpoint(_activations("mxfp8")),
    "MLX 4-bit, activations": Checkpoint(
        by_mlx(bits=4, group_size=32, more={"quantize_activations": True}), "quantize_activations"
    ),
    "MLX, unknown mode": Checkpoint(by_mlx(bits=4, group_size=32, entry={"mode": "nf4"}), "mode 'nf4'"),
    "AWQ gemm": Checkpoint(of_tool(AWQ, _awq)),
    "AWQ gemm, symmetric": Checkpoint(of_tool({**AWQ, "zero_point": False}, _awq_symmetric)),
    "AWQ gemv": Checkpoint(of_tool({**AWQ, "version": "gemv"}, _awq), "'gemv'"),
    "AWQ 8-bit": Checkpoint(of_tool({**AWQ, "bits": 8}, _awq), "AWQ weights of 8 bits"),
    "GPTQ": Checkpoint(of_tool(GPTQ, _gptq), "GPTQ weights with g_idx"),
    "GPTQ without g_idx": Checkpoint(of_tool(GPTQ, functools.partial(_gptq, g_idx=False)), "GPTQ weights are not"),
    "compressed-tensors pack-quantized, Kimi": Checkpoint(
        deepseek(_KIMI, packing.pack_quantized, _EXPERTS, model_type="kimi_k2", moe_intermediate_size=64)
    ),
    "compressed-tensors pack-quantized, 8 bits": Checkpoint(
        deepseek(
            compressed("pack-quantized", {**INT4, "num_bits": 8}),
            functools.partial(packing.pack_quantized, bits=8),
            _EXPERTS,
            moe_intermediate_size=64,
        ),
        "num_bits 8",
    ),
    "compressed-tensors pack-quantized, no groups": Checkpoint(
        deepseek({**_KIMI, "config_groups": {}}, packing.pack_quantized, _EXPERTS, moe_intermediate_size=64),
        "num_bits None",
    ),
    "compressed-tensors pack-quantized": Checkpoint(
        of_tool(compressed("pack-quantized", INT4), packing.pack_quantized),
        "compressed-tensors pack-quantized weights are not read by mlx-lm's llama",
    ),
    "compressed-tensors nvfp4-pack-quantized": Checkpoint(
        of_tool(compressed("nvfp4-pack-quantized", NVFP4), _llm_compressor),
        "compressed-tensors nvfp4-pack-quantized weights are not read by mlx-lm's llama",
    ),
    "compressed-tensors mxfp4-pack-quantized": Checkpoint(
        of_tool(compressed("mxfp4-pack-quantized", {**NVFP4, "group_size": 32}), packing.mxfp4_packed),
        "compressed-tensors mxfp4-pack-quantized weights are not read by mlx-lm's llama",
    ),
    "compressed-tensors mxfp4-pack-quantized, Kimi": Checkpoint(
        experts(
            "kimi_k3",
            _KIMI_K3,
            packing.mxfp4_packed,
            only=".experts.",
            stored="block_sparse_moe",
            names=NUMBERED,
        ),
    ),
    "compressed-tensors float-quantized": Checkpoint(
        of_tool(compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}), _one_scale),
        "compressed-tensors float-quantized weights are not read",
    ),
    "compressed-tensors int-quantized": Checkpoint(
        of_tool(compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}), packing.int8),
        "compressed-tensors int-quantized weights are not read",
    ),
    "ModelOpt NVFP4, own file": Checkpoint(
        modelopt("NVFP4", own_file=True, pack=_modelopt), "ModelOpt NVFP4 weights are not read by mlx-lm's llama"
    ),
    "ModelOpt NVFP4, config": Checkpoint(
        modelopt("NVFP4", own_file=False, pack=_modelopt), "ModelOpt NVFP4 weights are not read by mlx-lm's llama"
    ),
    "ModelOpt NVFP4, Muse Spark": Checkpoint(write_muse_spark, runs=False),
    "ModelOpt FP8": Checkpoint(modelopt("FP8", own_file=True, pack=_one_scale), "ModelOpt FP8 weights are not read"),
    "FP8 blocks, DeepSeek": Checkpoint(deepseek(FP8, packing.fp8_blocks)),
    "FP8 blocks, DeepSeek V3.2": Checkpoint(experts("deepseek_v32", FP8, packing.fp8_blocks)),
    "FP8 blocks, GLM": Checkpoint(experts("glm_moe_dsa", FP8, packing.fp8_blocks)),
    "FP8 blocks, MiniMax": Checkpoint(
        experts("minimax", FP8, packing.fp8_blocks, mlp="block_sparse_moe", names=NUMBERED, hidden_size=256)
    ),
    "FP8 blocks, MiMo": Checkpoint(experts("mimo_v2_flash", FP8, packing.fp8_blocks)),
    "FP8 blocks of 32, MiniMax M3": Checkpoint(
        experts(
            "minimax_m3_vl",
            {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
            packing.mxfp8,
            mlp="block_sparse_moe",
            names=NUMBERED,
        ),
    ),
    "FP8 blocks, powers of two": Checkpoint(
        deepseek({**FP8, "scale_fmt": "ue8m0"}, functools.partial(packing.fp8_blocks, scale_type="F8_E8M0")),
        "is F8_E8M0, not a float",
    ),
    "FP8 blocks, Qwen3": Checkpoint(
        of_tool(FP8, packing.fp8_blocks, "qwen3", hidden_size=128), "FP8 weights are not read by mlx-lm's qwen3"
    ),
    "FP8 one scale, Mistral 4": Checkpoint(mistral4("weight_scale_inv")),
    "FP8 one scale, Ministral 3": Checkpoint(
        of_tool(
            {"quant_method": "fp8", "activation_scheme": "static"},
            functools.partial(packing.fp8_tensor, scale="weight_scale_inv"),
            "ministral3",
            layer_types=None,
        ),
        "FP8 weights are not dequantized by mlx-lm's ministral3",
    ),
    "FP8 one scale, DeepSeek": Checkpoint(
        deepseek(FP8, functools.partial(packing.fp8_tensor, scale="weight_scale_inv")),
        "FP8 weights are not read by mlx-lm's deepseek_v3",
    ),
    "FP8 without scales": Checkpoint(of_tool({}, _no_scale), "F8_E4M3 weights, of which config.json says nothing"),
    "FP8 without scales, DeepSeek": Checkpoint(deepseek({}, _no_scale), "is FP8 without a scale"),
    "FP8 E5M2": Checkpoint(plain_type("F8_E5M2"), "F8_E5M2 tensors"),
    "gpt-oss MXFP4": Checkpoint(write_gpt_oss),
    "BitNet": Checkpoint(bitnet("bitnet", "autobitlinear", packed=True)),
    "BitNet, llama": Checkpoint(
        bitnet("llama", "bitlinear", packed=True), plain=bitnet("llama", "bitlinear", packed=False)
    ),
    "bitsandbytes 4-bit": Checkpoint(
        unread("bitsandbytes", mx.uint8, "weight", load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes weights"
    ),
    "HQQ": Checkpoint(unread("hqq", mx.uint8, "W_q", quant_config={"nbits": 4}), "HQQ weights"),
    "Quanto": Checkpoint(unread("quanto", mx.uint8, "weight._data", weights="int4"), "Quanto weights"),
    "EXL2": Checkpoint(unread("exl2", mx.int32, "q_weight", bits=4.0, version="0.2.4"), "EXL2 weights"),
    "EXL3": Checkpoint(unread("exl3", mx.int16, "trellis", bits=3.0), "EXL3 weights"),
    "TorchAO": Checkpoint(unread("torchao", mx.int8, "weight_qdata", quant_type={}), "TorchAO weights"),
    "FBGEMM FP8": Checkpoint(of_tool({"quant_method": "fbgemm_fp8"}, _one_scale), "FBGEMM FP8 weights"),
    "AutoRound": Checkpoint(of_tool({**GPTQ, "quant_method": "auto-round"}, _gptq), "AutoRound weights"),
    "AQLM": Checkpoint(unread("aqlm", mx.int8, "codes", nbits_per_codebook=16), "AQLM weights"),
    "a method of tomorrow": Checkpoint(unread("q-next", mx.uint8, "packed"), "q-next weights"),
    "packed, nothing said": Checkpoint(of_tool({}, _awq), "AWQ or GPTQ weights, of which config.json says nothing"),
    "no method named": Checkpoint(of_tool({"bits": 4, "group_size": 32}, _awq), "names no quant_method"),
}
"""Kinds of folders by their names."""


def write_checkpoint(name: str, folder: Path) -> Path:
    """The folder of a kind."""
    CHECKPOINTS[name].write(folder)
    return folder
