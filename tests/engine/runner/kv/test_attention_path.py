"""Which way attention takes, said in words and by a loaded model."""

from typing import Any

import pytest

from engine.errors import ConfigError
from engine.llm import LLM
from engine.runner.kv.attention_path import AttentionPath, describe

OPTIONS = {"max_model_len": 256, "gpu_memory_utilization": 0.2}


@pytest.mark.parametrize(
    ("paths", "line"),
    [
        ([AttentionPath("full", tuple(range(36)), "paged")], "pages read in place by kernels (36 layers full)"),
        (
            [AttentionPath("full", (5,), "paged"), AttentionPath("sliding", (0, 1, 2), "paged")],
            "pages read in place by kernels (1 layer full, 3 layers sliding)",
        ),
        (
            [
                AttentionPath("full", (3,), "paged"),
                AttentionPath("sliding", (4,), "reference", "did not compile"),
                AttentionPath("state", (0, 1, 2), "reference", "states are not pages"),
            ],
            "pages read in place by kernels (1 layer full); MLX's own operations (1 layer sliding: did not compile); "
            "MLX's own operations (3 layers state: states are not pages)",
        ),
        ([AttentionPath("full", (0, 1), "contiguous")], "mlx-lm's contiguous caches (2 layers full)"),
        (
            [AttentionPath("full", (0,), "contiguous", "off"), AttentionPath("state", (1,), "contiguous", "off")],
            "off",
        ),
        ([], ""),
    ],
)
def test_paths_are_one_line_in_which_layers_with_the_same_reason_stand_together(
    paths: list[AttentionPath], line: str
) -> None:
    assert describe(paths) == line


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_model_tells_which_way_each_kind_of_its_layers_takes(tiny_model_dir: Any, backend: str) -> None:
    with LLM(str(tiny_model_dir("gemma3_text")), attention_backend=backend, **OPTIONS) as llm:
        groups = llm.plan.groups
        assert [(path.kind, path.layers) for path in llm.attention_paths] == [
            (group.kind, tuple(sorted(group.layers))) for group in groups
        ]
        assert {path.backend for path in llm.attention_paths} == {"reference"}
        assert {path.why for path in llm.attention_paths} == {"no GPU kernels on a CPU"}


def test_a_layer_with_two_caches_of_a_kind_counts_once(tiny_model_dir: Any) -> None:
    with LLM(str(tiny_model_dir("falcon_h1")), **OPTIONS) as llm:
        assert all(len(set(path.layers)) == len(path.layers) for path in llm.attention_paths)
        assert {path.kind for path in llm.attention_paths} == {"full", "state"}


def test_contiguous_caches_say_who_turned_pages_off(tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_METAL_USE_PAGED_ATTENTION", "0")
    with LLM(str(tiny_model_dir("gemma3_text")), **OPTIONS) as llm:
        assert {path.backend for path in llm.attention_paths} == {"contiguous"}
        assert describe(llm.attention_paths).startswith("VLLM_METAL_USE_PAGED_ATTENTION=0: contiguous KV caches")
        assert describe(llm.attention_paths) in llm.notes


def test_kernels_that_serve_no_layer_are_not_promised(tiny_model_dir: Any) -> None:
    import mlx.core as mx

    folder = str(tiny_model_dir("gemma3_text"))
    before = mx.get_active_memory()
    with pytest.raises(
        ConfigError, match=r"^--attention-backend paged .*: no layer's pages .*no GPU kernels on a CPU\);"
    ):
        LLM(folder, attention_backend="paged", **OPTIONS)
    assert mx.get_active_memory() <= before
