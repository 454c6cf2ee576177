"""The CUDA text of a product of one row with packed weights, on this machine by ``cuda_on_host``."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from engine.runner.kernels import fused_rows as others
from engine.runner.kernels import one_row as module
from engine.runner.kernels.fused_rows import fused_rows
from engine.runner.kernels.fused_rows_text import Ending
from engine.runner.kernels.one_row import one_row_geometry, takes_one_row
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host
from tests.engine.runner.kernels.test_fused_rows import LIMIT, error_of, normal, weights

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    return kernels_on_host(monkeypatch, kernel_folder, module, others)


@pytest.mark.parametrize(
    ("width", "k", "dtype", "normed", "ending"),
    [
        (40, 512, mx.bfloat16, True, "silu"),
        (40, 1024, mx.bfloat16, False, "residual"),  # several warps share K
        (42, 640, mx.bfloat16, True, "plain"),  # the last step, and the last tile, are not whole
        (44, 2688, mx.bfloat16, False, "gelu"),  # several steps, of which the last warp has fewer
        (4104, 384, mx.bfloat16, True, "bias"),  # no warps share K
        (4104, 1152, mx.bfloat16, True, "gelu"),
        (12, 128, mx.float16, False, "silu"),
        (64, 2176, mx.float16, False, "residual"),
    ],
)
def test_a_row_by_packed_weights_is_right(
    host_kernels: dict[str, HostKernel], width: int, k: int, dtype: mx.Dtype, normed: bool, ending: Ending
) -> None:
    assert error_of(1, k, dtype, 4, normed, ending, width) < LIMIT[dtype]
    assert list(host_kernels) == [f"one_row{'_normed' if normed else ''}_{ending}"]


def test_rows_far_from_zero_keep_their_digits() -> None:
    """Weights are computed with as 128 + q: what that adds cancels in a float32 sum."""
    assert error_of(1, 1024, mx.bfloat16, 4, False, "plain", shift=8.0) < LIMIT[mx.bfloat16]


def test_what_it_does_not_know_goes_the_usual_way(host_kernels: dict[str, HostKernel]) -> None:
    for k, dtype, bits, group_size in (
        (576, mx.bfloat16, 4, 64), (512, mx.bfloat16, 8, 64), (512, mx.bfloat16, 4, 32), (512, mx.float32, 4, 64),
        (20608, mx.bfloat16, 4, 64),
    ):  # fmt: skip
        assert not takes_one_row(k, dtype, bits, group_size)
    assert takes_one_row(20480, mx.bfloat16, 4, 64)
    weight, _ = weights(576, mx.bfloat16, 4)
    fused_rows(normal(1, 576, dtype=mx.bfloat16), weight, bits=4, group_size=64)
    assert list(host_kernels) == ["fused_rows_quantized_plain"]


@pytest.mark.parametrize("k", [128, 1024, 2560, 9728, 20480])
@pytest.mark.parametrize("columns", [4, 640, 2560, 3584, 4092, 6144, 19456, 151936])
def test_every_cut_fits_a_block(columns: int, k: int) -> None:
    tiles, splits, depth = one_row_geometry(columns, k)
    steps = -(-k // 512)
    assert 1 <= depth <= -(-steps // splits)
    assert tiles * splits * 32 * 83 <= 65536, "the registers of a multiprocessor"
