"""The text that is compiled for CUDA, and the integers that a launch passes beside its arrays."""

import pytest

mx = pytest.importorskip("mlx.core")

from engine.runner.kernels.cuda_source import (  # noqa: E402
    KernelText,
    Signature,
    UnsupportedKernelError,
    cuda_source,
    shape_arguments,
)

TEXT = KernelText(
    "add", ("keys", "tables"), ("out", "sums"), "out[0] = T(keys_shape[1] * SIZE); // keys", "#define HEADER 1\n"
)


def signature(*dims: int, template: tuple = ()) -> Signature:
    inputs = [mx.zeros((2,) * ndim, dtype) for ndim, dtype in zip(dims, (mx.bfloat16, mx.int32), strict=True)]
    return Signature.of(inputs, [mx.float16, mx.float32], template)


def test_a_text_names_arrays_shapes_and_constants_in_the_order_in_which_they_are_passed() -> None:
    source = cuda_source(TEXT, signature(3, 2, template=(("T", mx.float32), ("SIZE", -4), ("ON", True))))
    head, body = source.split('extern "C" __global__ void ')
    assert head.endswith("#define HEADER 1\n\n")
    assert body == (
        "vm_magic_add(\n"
        "    const __nv_bfloat16* keys,\n"
        "    const int32_t* tables,\n"
        "    __half* out,\n"
        "    float* sums,\n"
        "    const int keys_shape_0,\n"
        "    const int keys_shape_1,\n"
        "    const int keys_shape_2) {\n"
        "  const int keys_shape[3] = {keys_shape_0, keys_shape_1, keys_shape_2};\n"
        "  using T = float;\n"
        "  constexpr int SIZE = -4;\n"
        "  constexpr bool ON = true;\n"
        "out[0] = T(keys_shape[1] * SIZE); // keys\n"
        "}\n"
    )


def test_shapes_are_passed_only_of_inputs_whose_shapes_the_body_reads() -> None:
    arrays = [mx.zeros((2, 5, 7)), mx.zeros((3, 4))]
    assert shape_arguments(TEXT, arrays) == [2, 5, 7]
    both = KernelText("k", ("keys", "tables"), ("out",), "out[0] = tables_shape[1] + keys_shape[0];")
    assert shape_arguments(both, arrays) == [2, 5, 7, 3, 4]
    assert cuda_source(both, Signature.of(arrays, [mx.float32], None)).count("const int keys_shape_") == 3


def test_an_array_without_dimensions_has_no_shape() -> None:
    source = cuda_source(TEXT, signature(0, 2))
    assert "keys_shape_0" not in source
    assert shape_arguments(TEXT, [mx.array(1.0), mx.zeros((3, 4))]) == []


def test_the_number_of_dimensions_is_a_constant() -> None:
    text = KernelText("k", ("x",), ("y",), "y[0] = x_ndim;")
    assert "constexpr int x_ndim = 4;" in cuda_source(text, Signature.of([mx.zeros((1, 1, 1, 1))], [mx.int32], None))


@pytest.mark.parametrize(
    ("source", "dtype"), [("y[0] = x_strides[0];", mx.float32), ("y[0] = x[0];", mx.complex64)], ids=["strides", "type"]
)
def test_what_cannot_be_passed_is_left_to_mlx(source: str, dtype) -> None:
    with pytest.raises(UnsupportedKernelError):
        cuda_source(KernelText("k", ("x",), ("y",), source), Signature.of([mx.zeros((2,), dtype)], [dtype], None))


def test_a_signature_tells_apart_what_gives_another_text() -> None:
    same = signature(3, 2, template=(("SIZE", 1),))
    others = [
        signature(3, 2, template=(("SIZE", 2),)),
        signature(2, 2, template=(("SIZE", 1),)),
        signature(3, 2, template=(("SIZE", mx.float16),)),
    ]
    assert signature(3, 2, template=(("SIZE", 1),)) == same
    assert len({same, *others}) == 4
