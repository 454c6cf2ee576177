"""Weights packed as the tools of each format pack them."""

import mlx.core as mx

from tests.checkpoints.stored import Stored, Tensors, as_stored

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns lies in each nibble of AutoAWQ's words, the lowest first."""


def awq(name: str, weight: mx.array, group_size: int, *, zeros: bool) -> Tensors:
    """AutoAWQ's layout "gemm" of a weight [out, in]: words [in, out / 8], scales and zeros [in / group, out]."""
    out, width = weight.shape
    grouped = weight.reshape(out, width // group_size, group_size)
    low, high = mx.minimum(grouped.min(-1), 0), mx.maximum(grouped.max(-1), 0)
    scale = (high - low) / 15 if zeros else mx.maximum(high, -low) / 7
    scale = scale.astype(mx.float16).astype(mx.float32)
    zero = mx.clip(mx.round(-low / scale), 0, 15) if zeros else mx.full(scale.shape, 8.0)
    values = mx.clip(mx.round(grouped / scale[..., None]) + zero[..., None], 0, 15).reshape(out, width)
    tensors: Tensors = {f"{name}.qweight": _awq_words(values.T), f"{name}.scales": scale.T.astype(mx.float16)}
    if zeros:
        tensors[f"{name}.qzeros"] = _awq_words(zero.T)
    return tensors


def gptq(name: str, weight: mx.array, group_size: int, *, g_idx: bool) -> Tensors:
    """GPTQModel's layout: words [in / 8, out], one's group for every row."""
    out, width = weight.shape
    tensors: Tensors = {
        f"{name}.qweight": mx.zeros((width // 8, out), mx.int32),
        f"{name}.qzeros": mx.zeros((width // group_size, out // 8), mx.int32),
        f"{name}.scales": mx.ones((width // group_size, out), mx.float16),
    }
    if g_idx:
        tensors[f"{name}.g_idx"] = (mx.arange(width) // group_size).astype(mx.int32)
    return tensors


def pack_quantized(name: str, weight: mx.array, group_size: int = 32, bits: int = 4) -> Tensors:
    """compressed-tensors' symmetric integers: words [out, in * bits / 32], the lowest first, scales [out, groups]."""
    out, width = weight.shape
    grouped = weight.reshape(out, width // group_size, group_size)
    half = 1 << (bits - 1)
    scale = (mx.abs(grouped).max(-1) / (half - 0.5)).astype(mx.bfloat16)
    values = mx.clip(mx.round(grouped / scale[..., None].astype(mx.float32)), -half, half - 1) + half
    words = _words(values.reshape(out, -1, 32 // bits), range(0, 32, bits))
    shape = mx.array([out, width], mx.int64)
    return {f"{name}.weight_packed": words, f"{name}.weight_scale": scale, f"{name}.weight_shape": shape}


def nvfp4(name: str, weight: mx.array, tool: str) -> Tensors:
    """NVFP4 of ``modelopt`` or ``compressed-tensors``: bytes of two values, E4M3 scales of 16, a scale of all."""
    largest = mx.max(mx.abs(weight))
    words, *scales = mx.quantize(weight, 16, 4, mode="nvfp4", global_scale=largest)
    scale = as_stored(scales[0], "F8_E4M3")
    if tool == "modelopt":
        return {
            f"{name}.weight": words.view(mx.uint8),
            f"{name}.weight_scale": scale,
            f"{name}.weight_scale_2": largest / 2688,
            f"{name}.input_scale": mx.array(1.0),
        }
    return {
        f"{name}.weight_packed": words.view(mx.uint8),
        f"{name}.weight_scale": scale,
        f"{name}.weight_global_scale": (2688 / largest).reshape(1),
        f"{name}.input_global_scale": mx.array([1.0]),
    }


def nvfp4_experts(name: str, weight: mx.array, *, scales: int) -> Tensors:
    """ModelOpt's NVFP4 of all experts in one tensor [experts, out, in], with ``scales`` of all for each expert."""
    words, *small = mx.quantize(weight, 16, 4, mode="nvfp4")
    return {
        name: words.view(mx.uint8),
        f"{name}_weight_scale": as_stored(small[0], "F8_E4M3"),
        f"{name}_weight_scale_2": mx.ones((weight.shape[0], scales) if scales > 1 else (weight.shape[0],)),
        f"{name}_input_scale": mx.ones((weight.shape[0],)),
    }


def mxfp4_packed(name: str, weight: mx.array) -> Tensors:
    """compressed-tensors' MXFP4: bytes of two values, powers of two for 32."""
    words, *scales = mx.quantize(weight, 32, 4, mode="mxfp4")
    return {f"{name}.weight_packed": words.view(mx.uint8), f"{name}.weight_scale": scales[0]}


def fp8_blocks(name: str, weight: mx.array, *, scale_type: str = "F32", suffix: str = "weight_scale_inv") -> Tensors:
    """FP8 of a weight [out, in] with a scale for each 128 by 128, as DeepSeek writes it."""
    out, width = weight.shape
    rows, columns = -(-out // 128), -(-width // 128)
    padded = mx.pad(weight, [(0, rows * 128 - out), (0, columns * 128 - width)]).reshape(rows, 128, columns, 128)
    scale = mx.abs(padded).max((1, 3)) / 448
    values = mx.to_fp8(padded / scale[:, None, :, None]).reshape(rows * 128, columns * 128)[:out, :width]
    stored = mx.full(scale.shape, 120, mx.uint8) if scale_type == "F8_E8M0" else scale
    return {f"{name}.weight": as_stored(values, "F8_E4M3"), f"{name}.{suffix}": as_stored(stored, scale_type)}


def fp8_tensor(name: str, weight: mx.array, scale: str | None) -> Tensors:
    """FP8 with one scale for the tensor, under the name ``scale``; None: without."""
    factor = mx.abs(weight).max() / 448 if scale else mx.array(1.0)
    tensors: Tensors = {f"{name}.weight": as_stored(mx.to_fp8(weight / factor), "F8_E4M3")}
    if scale:
        tensors[f"{name}.{scale}"] = factor.astype(mx.bfloat16)
    return tensors


def mxfp8(name: str, weight: mx.array) -> Tensors:
    """MXFP8 as MiniMax writes it: FP8, and a power of two for 32 values."""
    words, *scales = mx.quantize(weight, 32, 8, mode="mxfp8")
    return {
        f"{name}.weight": as_stored(words.view(mx.uint8), "F8_E4M3"),
        f"{name}.weight_scale_inv": scales[0],
    }


def int8(name: str, weight: mx.array) -> Tensors:
    """compressed-tensors' 8-bit integers with a scale for each row."""
    scale = mx.abs(weight).max(-1, keepdims=True) / 127
    return {
        f"{name}.weight": mx.round(weight / scale).astype(mx.int8),
        f"{name}.weight_scale": scale.astype(mx.bfloat16),
    }


def ternary(name: str, weight: mx.array) -> Tensors:
    """BitNet's packed weights [out / 4, in] and their scale; ``weight`` holds -1, 0 and 1 times one number."""
    scale = mx.abs(weight).max()
    quarters = mx.split((mx.round(weight / scale) + 1).astype(mx.uint8), 4)
    packed = quarters[0] | (quarters[1] << 2) | (quarters[2] << 4) | (quarters[3] << 6)
    return {f"{name}.weight": packed, f"{name}.weight_scale": scale.reshape(1).astype(mx.bfloat16)}


def of_type(weight: mx.array, dtype: str) -> Stored:
    """A weight whose bytes do not matter, stored as ``dtype``."""
    width = {"F64": 8, "F8_E5M2": 1, "I8": 1, "U8": 1, "F4": 1}[dtype]
    return Stored(dtype, tuple(weight.shape), bytes(weight.size * width))


def _words(values: mx.array, shifts: range | list[int]) -> mx.array:
    """The last axis of ``values`` in one int32, each shifted by its number of bits."""
    parts = values.astype(mx.uint32) << mx.array(list(shifts), mx.uint32)
    return parts.sum(-1).astype(mx.uint32).view(mx.int32)


def _awq_words(values: mx.array) -> mx.array:
    rows, columns = values.shape
    eights = values.reshape(rows, columns // 8, 8)[..., list(_AWQ_ORDER)]
    return _words(eights, range(0, 32, 4))
