"""What the attention kernels accept, and how they divide their work. Nothing is launched."""

from typing import Any

import mlx.core as mx
import pytest

from engine.runner.kernels import paged_attention as module
from engine.runner.kernels.dialect import compact, kernel_text
from engine.runner.kernels.paged_attention import attention_geometry, collect, number_of_splits, paged_attention


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize(
    "dims", [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)]
)
def test_work_is_divided_without_a_rest(dims: tuple[int, int], group: int, size: int) -> None:
    geometry = attention_geometry(*dims, group, size)
    vector = 16 // size
    assert all(dim % (geometry.lanes * vector) == 0 for dim in dims)
    assert 32 % geometry.lanes == 0
    assert geometry.threads <= 1024
    assert geometry.shared_bytes <= 32 << 10
    geometry.check(16)


def test_the_geometry_is_that_which_was_measured() -> None:
    def short(*given: int) -> tuple[int, int, int, int]:
        one = attention_geometry(*given)
        return one.lanes, one.heads, one.warps, one.tokens

    assert short(128, 128, 4, 2) == (8, 4, 4, 4)
    assert short(128, 128, 8, 2) == (16, 4, 2, 4)
    assert short(256, 256, 8, 2) == (32, 4, 2, 4)


def test_one_wave_of_blocks_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "blocks_at_once", lambda: 264)
    assert number_of_splits(1, 8, 1 << 20, 64) == 33
    assert number_of_splits(8, 8, 8192, 64) == 4
    assert number_of_splits(64, 8, 512, 64) == 1
    assert number_of_splits(1, 1, 1 << 20, 64) == 256
    assert number_of_splits(1, 8, 130, 64) == 3, "no split is shorter than a pass"


def call(**changes: Any) -> dict[str, Any]:
    given = {
        "queries": mx.zeros((2, 4, 1, 64)), "new_keys": mx.zeros((2, 2, 1, 64)), "new_values": mx.zeros((2, 2, 1, 64)),
        "key_pages": mx.zeros((1, 2, 64, 64)), "value_pages": mx.zeros((1, 2, 64, 64)),
        "block_tables": mx.zeros((2, 4), mx.int32), "positions": mx.zeros((2,), mx.int32),
        "scale": 0.1, "block_size": 16,
    }  # fmt: skip
    return given | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queries": mx.zeros((2, 4, 1, 64), mx.float16)}, "queries is mlx.core.float16"),
        ({"key_pages": mx.zeros((1, 2, 64, 64), mx.uint32)}, "key_pages is mlx.core.uint32"),
        ({"queries": mx.zeros((2, 5, 1, 64))}, "queries of shape (2, 5, 1, 64)"),
        ({"queries": mx.zeros((2, 4, 2, 64))}, "queries of shape"),
        ({"new_keys": mx.zeros((2, 2, 1, 32))}, "new keys of shape"),
        ({"value_pages": mx.zeros((1, 2, 48, 64))}, "do not belong together"),
        ({"positions": mx.zeros((1,), mx.int32)}, "2 rows, but"),
        ({"positions": mx.zeros((2,), mx.int64)}, "positions is mlx.core.int64"),
        ({"block_tables": mx.zeros((3, 4), mx.int32)}, "2 rows, but"),
        ({"sinks": mx.zeros((2,))}, "sinks of shape (2,) for 4 heads"),
        ({"block_size": 5}, "a block size of 5"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ],
)
def test_what_the_kernel_does_not_know_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        paged_attention(**call(**changes))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"new_keys": mx.zeros((2, 2, 3, 64))},
        {"span": mx.zeros((2,), mx.int32)},
        {"span": mx.zeros((4,))},
        {"block_table": mx.zeros((1, 4), mx.int32)},
        {"length": 2},
        {"new_values": mx.zeros((1, 2, 3, 64), mx.bfloat16)},
    ],
    ids=str,
)
def test_collect_refuses_what_is_not_one_chunk(changes: dict[str, Any]) -> None:
    given = {
        "new_keys": mx.zeros((1, 2, 3, 64)), "new_values": mx.zeros((1, 2, 3, 64)),
        "key_pages": mx.zeros((1, 2, 64, 64)), "value_pages": mx.zeros((1, 2, 64, 64)),
        "block_table": mx.zeros((4,), mx.int32), "span": mx.zeros((4,), mx.int32), "block_size": 16, "length": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"collect takes one sequence|is mlx.core"):
        collect(**(given | changes))


def test_metals_built_ins_are_named_where_mlx_looks_for_them() -> None:
    body, _ = kernel_text("out[TID] = BLK_X + LANES;  // of LANE", "", cuda=False)
    assert body == "// threadgroup_position_in_grid thread_index_in_threadgroup\nout[TID] = BLK_X + LANES;\n"
    assert compact("  a;  // why\n\n  b;") == "a;\nb;\n"
