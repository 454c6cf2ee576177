"""The arithmetic of step times, floors and pictures, on made-up numbers."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmarks.gpu.plot import plot_file, step_times
from tests.benchmarks.gpu.steps import Call, Machine, Step, full_gaps, full_steps, gaps
from tests.benchmarks.gpu.suite import describe_result
from tests.benchmarks.harness import Case, Result, as_json, take_turns
from tests.benchmarks.machine import describe


def test_gaps_are_milliseconds_between_neighbours() -> None:
    assert gaps([1.0, 1.5, 1.75]) == [500.0, 250.0]
    assert gaps([1.0]) == []


def test_only_steps_in_which_all_rows_get_a_token_count() -> None:
    steps = [Step(1, 0.5, 1), Step(3, 1.0, 2), Step(5, 2.0, 2), Step(5, 9.0, 1), Step(9, 4.0, 2)]
    assert full_steps(steps, 2, ramp=0) == [1000.0, 2000.0, 4000.0]
    assert full_steps(steps, 2, ramp=2) == [4000.0]
    assert full_steps(steps, 3, ramp=0) == []


def test_calls_with_prompts_or_fewer_rows_are_no_steps() -> None:
    calls = [Call(0, 0, 2), Call(1, 1, 1), Call(3, 2, 0), Call(4, 2, 0), Call(6, 2, 0), Call(7, 1, 0), Call(9, 2, 0)]
    assert full_gaps(calls, 2, ramp=0) == [1000.0, 2000.0]
    assert full_gaps(calls, 2, ramp=1) == [2000.0]


def test_a_floor_is_bytes_over_bandwidth_and_products_over_their_rate() -> None:
    machine = Machine(bytes_per_second=4e12, flops_per_second=5e14, how="by hand")
    assert machine.step_floor(8_000_000_000, 0) == 2.0
    assert machine.step_floor(8_000_000_000, 4_000_000_000) == 3.0
    # 8 GB of bfloat16 are 4e9 weights: 8 GFLOP for each token, and 2 * 2 * 1000 * 1000² / 2 pairs in each layer.
    assert machine.prompt_floor(8_000_000_000, 1000, 1000, 10) == pytest.approx(1000 * (8e12 + 2e10) / 5e14)


def test_variants_that_give_several_samples_take_turns() -> None:
    order: list[str] = []

    def variant(name: str, values: list[float]) -> list[float]:
        order.append(name)
        return values

    found = take_turns({"A": lambda: variant("A", [1.0, 2.0]), "B": lambda: variant("B", [3.0])}, 2)
    assert "".join(order) == "ABAB"
    assert found == {"A": [1.0, 2.0, 1.0, 2.0], "B": [3.0, 3.0]}
    with pytest.raises(RuntimeError, match="C: nothing was measured"):
        take_turns({"C": list}, 1)


def decode_case(rows: int, ours: float, theirs: float, bits: int = 16) -> Result:
    settings = {"kind": "decode", "bits": bits, "rows": rows}
    case = Case(f"decode {rows}", "ms", "lower", {}, settings, 2.0, floor=1.75)
    return Result(case, {"LLM": [ours], "mlx-lm BatchGenerator": [theirs], "mlx-lm generate_step": [9.0]})


@pytest.mark.parametrize(("theirs", "said"), [(6.0, "target 2.00 reached"), (5.9, "target 2.00 NOT REACHED")])
def test_a_result_says_its_floor_and_whether_the_target_is_reached(theirs: float, said: str) -> None:
    text = describe_result(decode_case(1, 3.0, theirs))
    assert "floor 1.750 ms" in text
    assert said in text


def test_a_run_is_drawn_as_bars_as_high_as_its_steps_are_long(tmp_path: Path) -> None:
    results = [decode_case(8, 4.0, 10.0), decode_case(1, 3.0, 7.0), decode_case(1, 1.0, 1.0, bits=4)]
    settings = {"sizes": {"shape": "tiny", "context": 512}}
    run = json.loads(as_json(results, describe(), settings))
    assert [group.rows for group in step_times(run["cases"])] == [1, 8]
    (tmp_path / "run.json").write_text(json.dumps(run))
    plot_file(tmp_path / "run.json", tmp_path / "run.svg")
    drawn = ElementTree.parse(tmp_path / "run.svg").getroot()
    heights = {
        bar[0].text: float(bar.get("height", "0")) for bar in drawn.iter("{http://www.w3.org/2000/svg}rect") if len(bar)
    }
    assert len(heights) == 5  # the floor is the same twice
    assert heights["LLM: 4.00 ms"] / heights["mlx-lm BatchGenerator: 10.00 ms"] == pytest.approx(0.4, abs=0.01)
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1 row", "8 rows", "floor", "1.75"} <= set(texts)


def test_a_run_without_steps_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(as_json([], describe(), {"sizes": {"shape": "tiny", "context": 512}}))
    with pytest.raises(ValueError, match="no decode steps"):
        plot_file(tmp_path / "run.json", tmp_path / "run.svg")
