"""GGUF's blocks as MLX's packed matrices, number for number: another layout of bits, nothing quantized anew.

MLX's affine value is ``scale * q + bias`` for groups of values, its MXFP4 and NVFP4 are the file's own. To keep another
type packed, add its line to :data:`PACKINGS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Packing:
    """How blocks of one type are packed in MLX.

    ``repack`` takes blocks ``[..., bytes]`` and gives the quants, a byte each, ``[..., values]``, then for each group
    its scale and (of affine packing) its bias, float32 and exact; the scales of the others are bytes.
    """

    bits: int
    group_size: int
    repack: Callable[[Bytes], tuple[Bytes, Numbers, Numbers | None]]
    mode: str = "affine"

    @property
    def parameters(self) -> dict[str, Any]:
        """As ``nn.quantize`` takes them."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def num_bytes(self, num_values: int, scale_bytes: int) -> int:
        """Bytes in MLX, with scales and biases of ``scale_bytes`` (of affine packing)."""
        of_group = 2 * scale_bytes if self.mode == "affine" else 1
        return num_values * self.bits // 8 + num_values // self.group_size * of_group


def pack(blocks: Bytes, kind: Type) -> dict[str, Numbers]:
    """Rows of blocks ``[..., bytes]`` as MLX's ``weight`` (uint32), ``scales`` and, of affine packing, ``biases``."""
    packing = PACKINGS[kind]
    size = GGML_QUANT_SIZES[kind][1]
    quants, scales, biases = packing.repack(blocks.reshape(*blocks.shape[:-1], -1, size))
    lead = blocks.shape[:-1]
    packed = {
        "weight": _words(quants.reshape(*lead, -1), packing.bits),
        "scales": scales.reshape(*lead, -1),
        "biases": None if biases is None else biases.reshape(*lead, -1),
    }
    # MLX keeps the strides of a view, and its CUDA has no product for packed weights with any.
    return {name: np.ascontiguousarray(values) for name, values in packed.items() if values is not None}


def take_columns(packed: Mapping[str, Numbers], columns: npt.NDArray[np.intp], group_size: int) -> dict[str, Numbers]:
    """The same with columns in another order, which leaves groups whole."""
    groups = columns[::group_size] // group_size

    def taken(values: Numbers) -> Numbers:
        by_group = values.reshape(*values.shape[:-1], len(groups), -1)
        return by_group[..., groups, :].reshape(values.shape)

    return {name: taken(values) for name, values in packed.items()}


def leaves_groups_whole(columns: npt.NDArray[np.intp], group_size: int) -> bool:
    """Whether an order of columns moves whole groups."""
    if len(columns) % group_size:
        return False
    groups = columns.reshape(-1, group_size)
    return bool((groups == groups[:, :1] + np.arange(group_size)).all() and (groups[:, 0] % group_size == 0).all())


def _words(quants: Bytes, bits: int) -> npt.NDArray[np.uint32]:
    """Quants one after another, the first in the lowest bits."""
    if bits == 5:
        eights = quants.reshape(*quants.shape[:-1], -1, 8).astype(np.uint64)
        words = (eights << (np.arange(8, dtype=np.uint64) * np.uint64(5))).sum(axis=-1, dtype=np.uint64)
        packed = words[..., None].view(np.uint8)[..., :5]
    else:
        each = 8 // bits
        parts = quants.reshape(*quants.shape[:-1], -1, each)
        packed = parts[..., 0].copy()
        for number in range(1, each):
            packed |= parts[..., number] << np.uint8(number * bits)
    return np.ascontiguousarray(packed.reshape(*quants.shape[:-1], -1)).view(np.uint32)


def _float16(blocks: Bytes, at: int) -> Numbers:
    """The float16 that each block has at a byte, as float32."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Values of a block whose bytes hold number j and number j + half."""
    return np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """32 bits of a block as 16."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[..., at : at + 4]), axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _q4_0(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    scales = _float16(blocks, 0)
    return _nibbles(blocks[..., 2:]), scales, scales * np.float32(-8)


def _q4_1(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    return _nibbles(blocks[..., 4:]), _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    scales = _float16(blocks, 0)
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2), scales, scales * np.float32(-16)


def _q5_1(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    return _nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4), _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    scales = _float16(blocks, 0)
    return blocks[..., 2:] ^ np.uint8(128), scales, scales * np.float32(-128)  # two's complement to offset 128


def _q1_0(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    scales = _float16(blocks, 0)
    bits = np.unpackbits(np.ascontiguousarray(blocks[..., 2:]), axis=-1, bitorder="little")
    return bits, scales * np.float32(2), -scales


def _tq2_0(blocks: Bytes) -> tuple[Bytes, Numbers, Numbers]:
    """Blocks of 256 are two groups; a byte holds numbers j, j + 32, j + 64 and j + 96 of its group."""
    data = blocks[..., :64].reshape(*blocks.shape[:-1], 2, 1, 32)
    quants = (data >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & np.uint8(3)
    scales = np.repeat(_float16(blocks, 64), 2, axis=-1)
    return quants.reshape(*blocks.shape[:-1], 256), scales, -scales


def _mxfp4(blocks: Bytes) -> tuple[Bytes, Numbers, None]:
    return _nibbles(blocks[..., 1:]), blocks[..., :1], None


def _nvfp4(blocks: Bytes) -> tuple[Bytes, Numbers, None]:
    data = blocks[..., 4:].reshape(*blocks.shape[:-1], 4, 8)
    scales = blocks[..., :4]
    return _nibbles(data), np.where(scales == 0x7F, np.uint8(0), scales), None


PACKINGS: Mapping[Type, Packing] = {
    Type.Q4_0: Packing(4, 32, _q4_0),
    Type.Q4_1: Packing(4, 32, _q4_1),
    Type.Q5_0: Packing(5, 32, _q5_0),
    Type.Q5_1: Packing(5, 32, _q5_1),
    Type.Q8_0: Packing(8, 32, _q8_0),
    Type.Q1_0: Packing(2, 128, _q1_0),  # MLX has no kernel for one bit on CUDA
    Type.TQ2_0: Packing(2, 128, _tq2_0),
    Type.MXFP4: Packing(4, 32, _mxfp4, "mxfp4"),
    Type.NVFP4: Packing(4, 16, _nvfp4, "nvfp4"),
}
"""Types that MLX can compute on as they are."""
