"""The GPU suite in its tiny form, on whatever device this is: that every kind of case runs and what it writes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.llm import LLM
from tests.benchmarks.gpu import ours, replica_cases, warm
from tests.benchmarks.gpu.cases import gpu_cases
from tests.benchmarks.gpu.shapes import first_layers, weight_bytes, write_model
from tests.benchmarks.gpu.sizes import FULL, TINY
from tests.benchmarks.gpu.suite import run_gpu
from tests.benchmarks.machine import ROOT


def run_tiny(folder: Path, *only: str) -> dict[str, Any]:
    assert run_gpu(only, folder, tiny=True, commit="abc") == 0
    (path,) = folder.glob("gpu-*.json")
    run: dict[str, Any] = json.loads(path.read_text())
    assert run["machine"]["commit"] == "abc"
    assert not run["settings"]["failed"]
    return run


def test_steps_are_measured_of_ours_with_and_without_kernels_and_of_mlx_lm(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "decode, context 24, batch 3", "long, 2 rows")
    decode, slow, long = run["cases"]
    assert set(decode["samples"]) == {"LLM", "mlx-lm BatchGenerator"}
    assert set(slow["samples"]) == {"LLM", "LLM, reference attention"}
    assert len(decode["samples"]["LLM"]) >= TINY.steps
    assert len(decode["samples"]["mlx-lm BatchGenerator"]) >= TINY.steps
    assert decode["floor"] > 0
    assert long["settings"]["kind"] == "long"


def test_a_short_request_behind_a_long_prompt_is_measured_in_chunks(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "behind", "shared prefix", "sampled", "prefill")
    by_kind = {case["settings"]["kind"]: case for case in run["cases"]}
    assert {"first token", "longest gap", "shared", "shared first", "sampled", "prefill"} == by_kind.keys()
    facts = by_kind["first token"]["settings"]
    assert by_kind["first token"]["samples"]["LLM"] == [facts["short_ms"][0] / facts["middle_chunk_ms"]]
    assert len(facts["chunks_ms"]) >= TINY.long_prompt // TINY.chunk - 2
    assert {len(samples) for samples in by_kind["shared first"]["samples"].values()} == {TINY.long_repeats}


def test_a_load_is_timed_in_processes_of_their_own_and_packed_weights_are_decoded(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "load", "4bit")
    empty, filled, packed = run["cases"]
    for case in (empty, filled):
        (parts,) = case["settings"]["parts"]["ours"]
        assert case["samples"]["LLM, until its first token"] == [parts["load"] + parts["first token"]]
        assert len(case["samples"]["mlx-lm, until its first token"]) == 1
    assert packed["settings"]["bits"] == 4


def test_the_port_is_measured_beside_its_own_process_and_mlx_lms_server(tmp_path: Path) -> None:
    cases = [case for case in run_tiny(tmp_path, "http")["cases"] if "transformers" not in case["settings"]["beside"]]
    assert [list(case["samples"]) for case in cases] == [
        ["LLM.serve", "mlx_lm.server"],
        ["LLM.serve", "LLM in its process"],
    ]
    assert [case["target"] for case in cases] == [3.0, 0.95]
    assert all(min(rates) > 0 for case in cases for rates in case["samples"].values())


def test_a_model_and_its_replica_are_measured_beside_the_model_alone(tmp_path: Path) -> None:
    (case,) = run_tiny(tmp_path, "replicas")["cases"]
    assert set(case["samples"]) == {"LLM", "LLM and a replica"}
    assert case["target"] == 1.9
    assert len(case["settings"]["devices"]) == 2
    shares = case["settings"]["shares"]
    assert [name for name, _, _ in shares] == case["settings"]["devices"]
    assert sum(num_prompts for _, num_prompts, _ in shares) == TINY.replica_rows
    assert all(seconds > 0 for _, num_prompts, seconds in shares if num_prompts)
    assert all(min(rates) > 0 for rates in case["samples"].values())


def test_where_there_is_one_gpu_two_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(replica_cases, "two_devices", lambda: None)
    assert run_tiny(tmp_path, "replicas")["cases"] == []
    assert "one GPU here: left out" in capsys.readouterr().out


def test_a_case_that_fails_is_said_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> float:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(ours, "first_token", fail)
    assert run_gpu(["prefill", "sampled"], tmp_path, tiny=True) == 1
    (path,) = tmp_path.glob("gpu-*.json")
    run = json.loads(path.read_text())
    assert [case["settings"]["kind"] for case in run["cases"]] == ["sampled"]
    assert list(run["settings"]["failed"]) == ["prefill of 160 tokens"]
    assert "out of memory, say" in capsys.readouterr().out


def test_a_row_that_ends_too_early_is_an_error_and_no_figure(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny")
    with LLM(str(tmp_path), max_model_len=256, gpu_memory_utilization=0.1, max_num_seqs=4) as llm:

        def short_first(row: int, num_tokens: int) -> Any:
            return ours.greedy(row, 2 if row == 0 else num_tokens)

        with pytest.raises(RuntimeError, match="ended before"):
            ours.decode_steps(llm, [[1, 2, 3], [4, 5, 6]], 8, short_first)


def test_the_models_are_the_same_every_time_and_packed_ones_smaller(tmp_path: Path) -> None:
    sizes = [write_model(tmp_path / name, "tiny", packed=name == "packed") for name in ("one", "two", "packed")]
    assert sizes[0] == weight_bytes(tmp_path / "one")
    assert (tmp_path / "one/model-00001.safetensors").read_bytes() == (
        tmp_path / "two/model-00001.safetensors"
    ).read_bytes()
    assert sizes[2] < sizes[0] / 3


def test_every_figure_of_the_full_suite_has_its_case() -> None:
    names = {case.name for case in gpu_cases(FULL)}
    decode = {f"decode, context 512, batch {rows}" for rows in (1, 8, 32, 64)}
    packed = {f"4bit decode, context 512, batch {rows}" for rows in (1, 8, 32)}
    assert decode | packed | {"long, 8 rows of 8192", "long, 32 rows of 4096", "prefill of 8192 tokens", "load"} < names


_WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
sys.argv = ["bench", "--gpu", "--tiny", "--only", "prefill", "--out", {folder!r}]
import runpy
runpy.run_module("tests.benchmarks", run_name="__main__")
"""


def test_the_gpu_suite_needs_neither_notebook_nor_test_packages(tmp_path: Path) -> None:
    names = {"IPython", "jupyter_client", "traitlets", "pytest", "matplotlib", "openai", "pandas", "vm_magic"}
    code = _WITHOUT.format(names=names, folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert len(list(tmp_path.glob("gpu-*.json"))) == 1


def test_shapes_with_experts_states_and_windows_are_measured_beside_mlx_lm(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "in 4 bits", "tokens as", "int8 pages")
    kinds = [(case["settings"]["kind"], case["settings"].get("shape")) for case in run["cases"]]
    for shape in TINY.wide:
        assert {(kind, shape) for kind in ("wide equal", "wide decode", "wide prefill")} <= set(kinds)
    steps = next(case for case in run["cases"] if case["settings"]["kind"] == "wide decode")
    assert steps["samples"].keys() == {"LLM", "mlx-lm BatchGenerator"}
    assert steps["floor"] > 0
    assert ("int8", None) in kinds


def test_what_mlx_lm_compiles_is_compiled_side_by_side_beforehand(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(warm._SIZES, "tiny", replace(TINY, wide=TINY.wide[:1]))
    assert warm.main(["--models", str(tmp_path), "--sizes", "tiny", "--gpus", "2"]) == 0
    said = capfd.readouterr().out
    assert all(f"{TINY.wide[0]}, {what}\n" in said for what in (*TINY.packed_batches, "prompt"))
    (tmp_path / f"{TINY.wide[0]}-{first_layers(TINY.wide[0])}-layers" / "config.json").write_text("{}")
    assert warm.main(["--models", str(tmp_path), "--sizes", "tiny"]) == 1
    assert "prompt: FAILED, 1" in capfd.readouterr().out


def test_packed_shapes_keep_the_widths_that_mlx_lm_keeps_for_routers(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny-hybrid", packed=True)
    packing = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert packing["bits"] == 4
    assert packing["language_model.model.layers.0.mlp.gate"]["bits"] == 8
