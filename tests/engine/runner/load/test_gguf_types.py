"""Every tensor type of the format: what becomes of it, number for number against gguf's own dequantization."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from engine.errors import ModelLoadError
from engine.models.gguf_file import dequantized, open_gguf
from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs

mx = pytest.importorskip("mlx.core")

from engine.runner.load.gguf_blocks import PACKINGS, leaves_groups_whole, pack, take_columns  # noqa: E402
from engine.runner.load.loader import load_model  # noqa: E402
from tests.checkpoints.gguf import ANSWERS, CASES, write  # noqa: E402

PLAIN = {
    Type.F64: np.float64, Type.F32: np.float32, Type.F16: np.float16, Type.I8: np.int8, Type.I16: np.int16,
    Type.I32: np.int32, Type.I64: np.int64,
}  # fmt: skip
LOADABLE = [kind for kind in Type if ANSWERS.get(kind.name) not in (None, "refused")]
FLOAT16_AT: dict[Type, tuple[int, ...]] = {
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,), Type.Q1_0: (0,),
    Type.TQ1_0: (52,), Type.TQ2_0: (64,), Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2),
    Type.Q6_K: (208,), Type.IQ4_NL: (0,), Type.IQ4_XS: (0,), Type.IQ1_S: (0,), Type.IQ2_XXS: (0,), Type.IQ2_XS: (0,),
    Type.IQ2_S: (0,), Type.IQ3_XXS: (0,), Type.IQ3_S: (0,),
}  # fmt: skip
"""Where a block holds float16 scales: random bytes would make NaN of them."""


def random_blocks(kind: Type, *lead: int, row: int = 512) -> npt.NDArray[Any]:
    """Rows of random numbers in the file's form."""
    rng = np.random.default_rng(int(kind) + 7)
    if kind in PLAIN:
        return rng.integers(-100, 100, (*lead, row)).astype(PLAIN[kind])
    block, size = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*lead, row // block, size), dtype=np.uint8)
    for at in FLOAT16_AT.get(kind, ()):
        scales = (rng.uniform(-1.5, 1.5, data.shape[:-1]) * 1e-3).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == Type.MXFP4:
        data[..., 0] = rng.integers(110, 130, data.shape[:-1])
    if kind == Type.NVFP4:
        data[..., :4] = rng.integers(0, 0x80, (*data.shape[:-1], 4))
    if kind == Type.IQ1_M:  # whose scale is spread over four bytes
        data[..., 55] = data[..., 55] & 0x0F | 0x10
    if kind == Type.BF16:
        data[..., 1] = 0x3C
    return data.reshape(*lead, -1)


def expected(blocks: npt.NDArray[Any], kind: Type) -> npt.NDArray[np.float32]:
    """gguf's values, or of what it cannot read the format's own words."""
    if kind in PLAIN:
        return blocks.astype(np.float32)
    if kind == Type.Q1_0:  # a scale and 128 bits: one is the scale, zero its negative
        parts = blocks.reshape(-1, 18)
        scales = [np.float32(np.frombuffer(part[:2].tobytes(), np.float16)[0]) for part in parts]
        bits = [[part[2 + at // 8] >> (at % 8) & 1 for at in range(128)] for part in parts]
        values = [[scale if bit else -scale for bit in row] for scale, row in zip(scales, bits, strict=True)]
        return np.array(values, np.float32).reshape(*blocks.shape[:-1], -1)
    return np.asarray(gguf.quants.dequantize(blocks, kind), np.float32)


@pytest.mark.parametrize("kind", Type, ids=lambda kind: kind.name)
def test_every_type_of_the_format_has_an_answer(kind: Type) -> None:
    answer = ANSWERS[kind.name]
    assert (answer == "stays packed") == (kind in PACKINGS)
    if answer == "refused":
        with pytest.raises(ModelLoadError, match=rf"blk\.0\.x: the tensor type {kind.name} is not for weights; use a"):
            dequantized(random_blocks(kind, 2), kind, "blk.0.x")
        return
    blocks = random_blocks(kind, 2, 3)
    np.testing.assert_array_equal(dequantized(blocks, kind, "x"), expected(blocks, kind))


@pytest.mark.parametrize("kind", PACKINGS, ids=lambda kind: kind.name)
def test_packed_matrices_hold_the_files_numbers_bit_for_bit(kind: Type) -> None:
    blocks, packing = random_blocks(kind, 2, 5), PACKINGS[kind]
    packed = {name: mx.array(values) for name, values in pack(blocks, kind).items()}
    scales, biases = packed["scales"], packed.get("biases")
    options = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode, "dtype": mx.float32}
    values = np.array(mx.dequantize(packed["weight"], scales, biases, **options))
    # d * q - 8 d is rounded once more than d * (q - 8): the same number but for the last bit.
    atol = 2e-8 if packing.mode == "affine" else 0
    np.testing.assert_allclose(values, expected(blocks, kind), rtol=0, atol=atol)
    if biases is not None:
        exact = [1.0, 0.5][kind == Type.Q1_0] * np.array(scales)
        np.testing.assert_array_equal(exact.astype(np.float16), exact)
    assert sum(array.nbytes for array in packed.values()) == packing.num_bytes(values.size, 4)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.MXFP4, Type.NVFP4], ids=lambda kind: kind.name)
def test_columns_move_in_packed_matrices_where_groups_stay_whole(kind: Type) -> None:
    blocks, size = random_blocks(kind, 4), PACKINGS[kind].group_size
    columns = np.arange(512).reshape(4, 2, 64).swapaxes(0, 1).reshape(-1)
    assert leaves_groups_whole(columns, size)
    assert not leaves_groups_whole(np.arange(512).reshape(-1, 2)[:, ::-1].reshape(-1), size)
    assert not leaves_groups_whole(np.roll(np.arange(512), 8), size)
    packing = PACKINGS[kind]
    moved = {name: mx.array(values) for name, values in take_columns(pack(blocks, kind), columns, size).items()}
    options = {"group_size": size, "bits": packing.bits, "mode": packing.mode, "dtype": mx.float32}
    values = np.array(mx.dequantize(moved["weight"], moved["scales"], moved.get("biases"), **options))
    np.testing.assert_allclose(values, expected(blocks, kind)[..., columns], rtol=0, atol=2e-8)


@pytest.mark.parametrize("kind", LOADABLE, ids=lambda kind: kind.name)
def test_a_file_of_any_type_loads_as_its_own_numbers(tmp_path: Path, kind: Type) -> None:
    blocks = random_blocks(kind, 64, row=512)
    path = file_with(tmp_path / "m.gguf", kind, blocks)
    model = load_model(ResolvedModel("m", path, "gguf"), EngineArgs("m", dtype="float32")).model
    np.testing.assert_array_equal(np.array(model.model.layers[1].mlp.down_proj.weight), expected(blocks, kind))


@pytest.mark.parametrize("kind", [Type.Q8_1, Type.Q8_K], ids=lambda kind: kind.name)
def test_a_type_that_is_not_for_weights_is_refused_with_the_tensors_name(tmp_path: Path, kind: Type) -> None:
    path = file_with(tmp_path / "m.gguf", kind, random_blocks(kind, 64, row=512))
    with pytest.raises(ModelLoadError, match=rf"m\.gguf: blk\.1\.ffn_down\.weight: the tensor type {kind.name} is not"):
        load_model(ResolvedModel("m", path, "gguf"), EngineArgs("m", dtype="float32"))


def test_an_unknown_type_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    path = file_with(tmp_path / "m.gguf", Type.Q4_0, random_blocks(Type.Q4_0, 64, row=512))
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.1.ffn_down.weight") + len("blk.1.ffn_down.weight") + 4 + 2 * 8
    assert data[at : at + 4] == int(Type.Q4_0).to_bytes(4, "little")
    data[at] = 99
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"tensor blk\.1\.ffn_down\.weight has an unknown GGUF type 99"):
        open_gguf(path)


def test_a_scale_of_a_whole_tensor_is_multiplied_in(tmp_path: Path) -> None:
    blocks = random_blocks(Type.NVFP4, 64, row=512)
    scale = {"blk.1.ffn_down.scale": np.array([0.25], np.float32), "blk.1.ffn_down.input_scale": np.ones(1, np.float32)}
    path = file_with(tmp_path / "m.gguf", Type.NVFP4, blocks, scale)
    model = load_model(ResolvedModel("m", path, "gguf"), EngineArgs("m", dtype="float32")).model
    weight = np.array(model.model.layers[1].mlp.down_proj.weight)
    np.testing.assert_array_equal(weight, expected(blocks, Type.NVFP4) * np.float32(0.25))


def file_with(
    path: Path, kind: Type, blocks: npt.NDArray[Any], more: dict[str, npt.NDArray[np.float32]] | None = None
) -> Path:
    """A tiny qwen3 whose second layer's down projection is ``blocks`` of a type."""
    case = dataclasses.replace(CASES["qwen3"], changes={"intermediate_size": 512, "num_hidden_layers": 2})
    write(path, dataclasses.replace(case, stored=(lambda own, _: {**own, **(more or {})},)))
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "qwen3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            writer.add_tensor(tensor.name, blocks, raw_dtype=None if kind in PLAIN else kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix(".new").rename(path)
