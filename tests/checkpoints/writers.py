"""Writers of tiny model folders, as the tools that quantize models write them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tests.checkpoints import packing
from tests.checkpoints.stored import Tensors, write_folder
from tests.engine.parity.tiny_architectures import build, config_of
from tests.sweep.configurations import tiny_config

Writer = Callable[[Path], None]
Pack = Callable[[str, mx.array], Tensors]


_LINEAR = ("_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
         "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:4.0.0"]}}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None,
         "dynamic": False, "observer": "minmax"}  # fmt: skip
NVFP4 = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}
WIDE = {"hidden_size": 128, "intermediate_size": 192}
"""More than one block of 128 in some matrices."""
MLA = {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 64, "v_head_dim": 64}


SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
NUMBERED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Names of an expert's projections."""


def compressed(form: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """llm-compressor's ``quantization_config``."""
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", **more,
    }  # fmt: skip


def model_config(name: str, **changes: Any) -> dict[str, Any]:
    """A tiny architecture of two layers in float32, with a head of its own."""
    return {
        **config_of(name),
        "num_hidden_layers": 2,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        **changes,
    }


def weights_of(config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Seeded weights, by the names that mlx-lm's model has for them."""
    return dict(tree_flatten(build(dict(config)).parameters()))


def packed_by(pack: Pack, weights: Mapping[str, mx.array], only: str = "", rest: mx.Dtype = mx.bfloat16) -> Tensors:
    """``weights`` with the linear layers (those whose path holds ``only``) packed; the head is left, as ``rest``."""
    tensors: Tensors = {}
    for name, value in weights.items():
        path, _, key = name.rpartition(".")
        if key == "weight" and value.ndim == 2 and path.endswith(_LINEAR) and only in path:
            tensors |= pack(path, value)
        else:
            tensors[name] = value.astype(rest)
    return tensors


def of_tool(settings: Mapping[str, Any], pack: Pack, name: str = "llama", **changes: Any) -> Writer:
    """A writer of an architecture whose linear layers ``pack`` packs, with ``quantization_config``."""

    def write(folder: Path) -> None:
        dtype = "float16" if settings.get("quant_method") == "awq" else "bfloat16"
        config = model_config(name, torch_dtype=dtype, **changes)
        tensors = packed_by(pack, weights_of(config), rest=getattr(mx, dtype))
        write_folder(folder, {**config, "quantization_config": dict(settings)}, tensors)

    return write


def of_types(matrices: mx.Dtype, vectors: mx.Dtype | None = None) -> Writer:
    """A writer of plain weights; ``torch_dtype`` in the config is wrong, as it often is."""

    def write(folder: Path) -> None:
        config = model_config("llama", torch_dtype="float64")
        types = {True: matrices, False: vectors or matrices}
        weights: Tensors = {name: value.astype(types[value.ndim > 1]) for name, value in weights_of(config).items()}
        write_folder(folder, config, weights)

    return write


def by_mlx(name: str = "llama", entry: Mapping[str, Any] | None = None, **how: Any) -> Writer:
    """A writer as ``mlx_lm.convert -q`` writes; ``entry`` replaces the entries ``quantization`` in the config."""
    predicate = how.pop("predicate", None)
    changes = how.pop("changes", {})

    def write(folder: Path) -> None:
        from mlx_lm.utils import quantize_model

        config = model_config(name, **changes)
        model, packed = quantize_model(
            build(dict(config)), config, how.get("group_size"), how.get("bits"), mode=how.get("mode", "affine"),
            global_scale=how.get("global_scale", False), quant_predicate=predicate,
        )  # fmt: skip
        told = packed["quantization"] if entry is None else {**packed["quantization"], **entry}
        more = {"quantization": told, "quantization_config": told, **how.get("more", {})}
        write_folder(folder, {**packed, **more}, dict(tree_flatten(model.parameters())))

    return write


def mixed_bits(path: str, module: nn.Module) -> bool | dict[str, Any]:
    if path == "lm_head":
        return {"bits": 8, "group_size": 64}
    if path.endswith("v_proj"):
        return False
    return {"bits": 6, "group_size": 32, "mode": "affine"} if path.endswith("down_proj") else True


def experts_apart(
    weights: Mapping[str, mx.array], block: str, names: Mapping[str, str], stored: str = ""
) -> dict[str, mx.array]:
    """Weights with every expert's tensors apart, under its block's name (or ``stored``) and ``names``."""
    apart: dict[str, mx.array] = {}
    for name, value in weights.items():
        prefix, found, rest = name.partition(f".{block}.switch_mlp.")
        if not found:
            apart[name] = value
            continue
        projection, _, key = rest.partition(".")
        for number, one in enumerate(value):
            apart[f"{prefix}.{stored or block}.experts.{number}.{names[projection]}.{key}"] = one
    return apart


def joined_kv(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Weights of latent attention with keys' and values' matrices in one, as DeepSeek's files have them."""
    joined: dict[str, mx.array] = {}
    for name, value in weights.items():
        path, found, _ = name.partition(".embed_q.weight")
        if found:
            both = mx.concatenate([value.swapaxes(-1, -2), weights[f"{path}.unembed_out.weight"]], axis=1)
            joined[f"{path}.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
        elif ".unembed_out." not in name:
            joined[name] = value
    return joined


def deepseek(settings: Mapping[str, Any], pack: Pack, only: str = "", **changes: Any) -> Writer:
    """A writer of DeepSeek-V3's layout (also Kimi K2's, with its ``model_type``)."""

    def write(folder: Path) -> None:
        config = model_config("deepseek_v3", torch_dtype="bfloat16", **{**WIDE, **MLA, **changes})
        weights = joined_kv(weights_of({**config, "model_type": "deepseek_v3"}))
        tensors = packed_by(pack, experts_apart(weights, "mlp", SAME), only)
        write_folder(folder, {**config, "quantization_config": dict(settings)}, tensors)

    return write


def mistral4(scale: str | None) -> Writer:
    """A writer of Mistral's FP8: one scale for a tensor."""

    def write(folder: Path) -> None:
        more = {**MLA, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
                "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
                "rope_parameters": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096,
                                    "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}}  # fmt: skip
        config = {**model_config("llama", **more), "model_type": "mistral4", "head_dim": 72, "torch_dtype": "bfloat16"}
        weights = experts_apart(joined_kv(weights_of(config)), "mlp", SAME)
        tensors = packed_by(lambda name, value: packing.fp8_tensor(name, value, scale), weights)
        settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
        write_folder(folder, {**config, "quantization_config": settings}, tensors)

    return write


def experts(
    name: str,
    settings: Mapping[str, Any],
    pack: Pack,
    *,
    only: str = "",
    mlp: str = "mlp",
    stored: str = "",
    names: Mapping[str, str] = SAME,
    **more: Any,
) -> Writer:
    """A writer of an architecture of mixed experts: every expert's tensors lie apart, under ``names``.

    ``mlp`` is the block's name in mlx-lm, ``stored`` that in the files.
    """

    def write(folder: Path) -> None:
        config = tiny_config(name)
        inner = config.get("text_config")
        config = {**config, "text_config": {**inner, **more}} if isinstance(inner, dict) else {**config, **more}
        weights = experts_apart(weights_of(config), mlp, names, stored)
        write_folder(folder, {**config, "quantization_config": dict(settings)}, packed_by(pack, weights, only))

    return write


def write_muse_spark(folder: Path) -> None:
    """ModelOpt's NVFP4 of experts, of which gates and values are one; its settings lie in a file of their own."""
    config = tiny_config("muse_spark")
    tensors: Tensors = {}
    weights = weights_of(config)
    for name, value in weights.items():
        layer, _, key = name.rpartition(".")
        if name.endswith(("_beta", "up_proj.weight")):
            continue
        if name.endswith("_alpha"):
            kind = "post_attention" if "attn" in key else "post_feedforward"
            tensors[f"{layer}.{kind}_residual_gate.gate"] = mx.zeros(value.shape)
        elif ".experts.gate_proj." in name:
            both = mx.concatenate([value, weights[name.replace("gate_proj", "up_proj")]], axis=1)
            tensors |= packing.nvfp4_experts(layer.replace("gate_proj", "gate_up_proj"), both, scales=2)
        elif ".experts.down_proj." in name:
            tensors |= packing.nvfp4_experts(layer, value, scales=1)
        else:
            tensors[name] = value.astype(mx.bfloat16)
    details: dict[str, Any] = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    details["exclude_modules"] = ["lm_head", "*self_attn*", "*pre_expert_proj", "*post_expert_proj", "*mlp.gate"]
    own = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": details}
    write_folder(folder, config, tensors, hf_quant_config=own)


def write_gpt_oss(folder: Path) -> None:
    """gpt-oss: experts in MXFP4, gates and values by turns, the rest plain."""
    config = model_config("gpt_oss", torch_dtype="bfloat16", layer_types=["sliding_attention", "full_attention"])
    tensors: Tensors = {}
    weights = weights_of(config)
    for name, value in weights.items():
        path, found, key = name.rpartition(".experts.gate_proj.")
        if not found and ".experts." not in name:
            tensors[name] = value.astype(mx.bfloat16)
        elif found:
            both = mx.stack([value, weights[f"{path}.experts.up_proj.{key}"]], axis=2 if key == "weight" else -1)
            both = both.reshape(value.shape[0], -1, value.shape[-1]) if key == "weight" else both.flatten(1)
            tensors |= _mxfp4_experts(f"{path}.experts.gate_up_proj", both)
        elif ".down_proj." in name:
            tensors |= _mxfp4_experts(name.rpartition(".")[0], value)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}  # fmt: skip
    write_folder(folder, {**config, "quantization_config": settings}, tensors)


def _mxfp4_experts(name: str, value: mx.array) -> Tensors:
    if value.ndim == 2:
        return {f"{name}_bias": value.astype(mx.bfloat16)}
    words, *scales = mx.quantize(value, 32, 4, mode="mxfp4")
    blocks = words.view(mx.uint8).reshape(*scales[0].shape, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales[0]}


def bitnet(model_type: str, linear_class: str, *, packed: bool) -> Writer:
    """A writer of BitNet's ternary weights, packed or as llama's plain ones."""

    def write(folder: Path) -> None:
        llama = model_config("llama", torch_dtype="bfloat16", hidden_act="relu2")
        weights = {name: value for name, value in weights_of(llama).items() if not name.startswith("lm_head")}
        if model_type == "bitnet":
            for number in range(2):
                weights[f"model.layers.{number}.self_attn.attn_sub_norm.weight"] = mx.ones((64,))
                weights[f"model.layers.{number}.mlp.ffn_sub_norm.weight"] = mx.ones((96,))
        stored = mx.array([0.25 if linear_class == "autobitlinear" else 4.0], mx.bfloat16)  # other classes divide by it

        def pack(name: str, value: mx.array) -> Tensors:
            rounded = mx.clip(mx.round(value * 5), -1, 1)
            if not packed:
                return {f"{name}.weight": rounded * 0.25}
            return {**packing.ternary(name, rounded), f"{name}.weight_scale": stored}

        settings: dict[str, Any] = {"quant_method": "bitnet", "linear_class": linear_class}
        settings["quantization_mode"] = "offline"
        if model_type != "bitnet":
            settings["modules_to_not_convert"] = None
        config = {**llama, "model_type": model_type, "tie_word_embeddings": True}
        more = {"quantization_config": settings} if packed else {}
        write_folder(folder, {**config, **more}, packed_by(pack, weights))

    return write


def unread(method: str, dtype: mx.Dtype, suffix: str, **settings: Any) -> Writer:
    """A writer of a method that mlx-lm does not know: weights are integers, something lies beside them."""

    def pack(name: str, value: mx.array) -> Tensors:
        return {f"{name}.{suffix}": mx.zeros((value.size // 2, 1), dtype), f"{name}.{suffix}.absmax": mx.ones((8,))}

    return of_tool({"quant_method": method, **settings}, pack)


def plain_type(dtype: str) -> Writer:
    """A writer of linear layers in an element type, of which nothing is said."""

    def write(folder: Path) -> None:
        config = model_config("llama")

        def pack(name: str, value: mx.array) -> Tensors:
            return {f"{name}.weight": packing.of_type(value, dtype)}

        write_folder(folder, config, packed_by(pack, weights_of(config)))

    return write


def modelopt(algorithm: str, *, own_file: bool, pack: Pack) -> Writer:
    """A writer of ModelOpt's exports, whose settings lie in a file of their own or, newer ones, in the config."""

    def write(folder: Path) -> None:
        config = model_config("llama")
        tensors = packed_by(pack, weights_of(config))
        details = {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head"],
        }
        producer = {"name": "modelopt", "version": "0.29.0"}
        if own_file:
            write_folder(folder, config, tensors, hf_quant_config={"producer": producer, "quantization": details})
        else:
            group = {"weights": NVFP4, "input_activations": NVFP4, "targets": ["Linear"]}
            settings = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"],
                        "config_groups": {"group_0": group}, "producer": producer}  # fmt: skip
            write_folder(folder, {**config, "quantization_config": settings}, tensors)

    return write
