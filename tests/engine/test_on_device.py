"""The checks for a machine with a GPU run here in a very small form, and find what they are there to find."""

import dataclasses

import mlx.core as mx
import pytest

from engine.runner.kv.attention_metadata import MAX_VIEWS
from tests import draw_rows_on_device
from tests.engine.parity.bare_engine import BareEngine
from tests.engine.parity.cuda_attention import cuda_attention
from tests.engine.parity.test_long_contexts import pages_of
from tests.engine.runner.kernels.host_draw_rows import HostDrawRows
from tests.engine.runner.kernels.host_kernels import HostKernels
from tests.on_device import __main__ as on_device
from tests.on_device import backends, fused, long
from tests.on_device.small_models import SmallModel
from tests.on_device.ties import WRONG, Oracle, compare

TINY = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


@pytest.fixture
def smallest(monkeypatch):
    """``--small``, smaller."""
    size = dataclasses.replace(
        long.SMALL,
        longest=120,
        through_llm=(SmallModel("qwen3", 64, "float32", TINY),),
        bare=(SmallModel("llama", 64, "float32", TINY),),
    )
    monkeypatch.setattr(long, "SMALL", size)


def test_long_contexts_through_llm_and_the_bare_engine_are_right_here(smallest, capsys):
    assert on_device.main(["long", "--small", "--backend", "reference"]) == 0
    printed = capsys.readouterr().out
    assert " 0 WRONG in " in printed
    assert printed.splitlines()[-1] == "all right"


def test_a_model_for_which_there_is_no_time_is_not_right(smallest, capsys):
    assert on_device.main(["long", "--small", "--seconds", "0"]) == 1
    assert capsys.readouterr().out.count("LEFT OUT") == 2


def test_kernels_are_asked_for_in_vain_here_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(backends, "MODEL", SmallModel("gemma3_text", 64, "float32", {**TINY, "num_hidden_layers": 3}))
    assert on_device.main(["backends", "--small"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("no GPU: MLX computes on the CPU here") == 3
    assert "auto: MLX's own operations (1 layer full, 2 layers sliding: no GPU kernels on a CPU)" in printed
    monkeypatch.setattr(backends, "_loaded", lambda _folder, _backend: True)
    assert on_device.main(["backends"]) == 1, "without a GPU nothing was checked"


def test_a_device_that_fails_is_tried_in_a_process_of_its_own(capsys):
    assert on_device.main(["sticky", "--small"]) == 0
    assert "all were told 'the GPU failed (" in capsys.readouterr().out


def test_slices_that_cuda_misreads_are_found():
    """What the check is for: with attention as CUDA's and rows that read views, tokens are wrong."""
    model = SmallModel("qwen3", 64, "float32", {**TINY, "num_hidden_layers": 2}).build()
    report, bare = long.Report(), long._Bare(model)
    bare.engine = BareEngine(model, max_views=MAX_VIEWS["metal"])
    prompts = [[number * 7 % 256 for number in range(start, start + 290)] for start in (1, 500)]
    with cuda_attention(pages_of(bare.engine)):
        report.case(
            "alone",
            Oracle(model),
            lambda: [pair for prompt in prompts for pair in bare.run([prompt], 6)],
            lambda: bare.num_steps,
        )
    assert report.tokens[WRONG] > 0
    assert not report.end()


def test_a_case_that_raises_is_wrong_and_others_go_on(capsys):
    report = long.Report()

    def fail() -> long.Answered:
        raise RuntimeError("no such luck")

    report.case("alone", Oracle(None), fail, lambda: 0)
    assert not report.end()
    assert "alone: WRONG: RuntimeError: no such luck" in capsys.readouterr().out


def test_a_token_is_equal_a_tie_or_wrong_by_mlx_lms_own_logits():
    import mlx.core as mx

    logits = mx.array([[0.0, 1.0, 0.99, -1.0], [5.0, float("nan"), 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]])

    def model(tokens):
        return logits[None, : tokens.shape[1]]

    oracle = Oracle(model)
    assert oracle.judge([1], [1])[0] == {"equal": 1}
    assert oracle.judge([1], [2])[0] == {"tie": 1}
    assert oracle.judge([1], [3])[0] == {WRONG: 1}
    assert oracle.judge([1], [1, 0, 3])[0] == {"equal": 2, WRONG: 1}, "what is not a number is wrong"
    assert compare(model, [1], [1, 0], [1, 0]) == "equal"
    assert compare(model, [1], [1, 0], [2, 0]) == "tie"
    assert compare(model, [1], [1, 0], [3, 0]).startswith(WRONG)
    assert compare(model, [1], [1, 0], [1]).startswith(WRONG)


def test_fused_layers_are_checked_as_far_as_a_cpu_can(monkeypatch, capsys):
    monkeypatch.setattr(mx, "compile", lambda step: step)  # these kernels compute when they are called
    monkeypatch.setattr(fused, "TOKENS", 32)
    monkeypatch.setattr(fused, "REPEATS", 1)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
    config = {**fused.QWEN3_4B, **small, "num_key_value_heads": 2, "num_hidden_layers": 2}
    assert fused.check_attention(HostKernels()) == []
    assert fused.check_layers(0, "cpu", HostKernels(), config, (2,)) == []
    said = capsys.readouterr().out
    assert "fused layers: 2 of 2" in said
    assert "2 rows of 32 tokens, a layer: mlx-lm" in said
    assert fused.main() == 1, "without a GPU nothing was checked"


def test_sampling_in_one_launch_is_checked_as_far_as_a_cpu_can(monkeypatch, capsys):
    kernel = HostDrawRows()
    monkeypatch.setattr(draw_rows_on_device, "draw_rows", kernel)
    monkeypatch.setattr(draw_rows_on_device, "seconds_of", lambda build: mx.eval(build()) or 1e-6)
    monkeypatch.setattr(draw_rows_on_device, "STEPS", 2)
    for dtype, rows in ((mx.bfloat16, 7), (mx.float32, 1)):
        assert draw_rows_on_device.compared(dtype, 1000, rows, kernel) == []
    draw_rows_on_device.times(3, 500)
    said = capsys.readouterr().out
    assert "0 of 21 tokens are not MLX's; by numpy 0 wrong" in said
    assert "us a step,   3 rows, sampled    : MLX" in said
    off = draw_rows_on_device.compared(mx.float32, 1000, 2, lambda *given: kernel(*given) ^ 1)
    assert off == ["2 rows of 1000 float32"]
    assert draw_rows_on_device.main([]) == 1, "without a GPU nothing was checked"
