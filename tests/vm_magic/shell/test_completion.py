"""Tab completion, asked of a real shell."""

from typing import Any

import pytest

from tests.vm_magic.helpers import line


def completions(shell: Any, code: str, position: int | None = None) -> list[str]:
    from IPython.core.completer import provisionalcompleter

    with provisionalcompleter():
        return [c.text for c in shell.Completer.completions(code, len(code) if position is None else position)]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("%vllm_metal lo", {"load", "logs"}),
        ("x = %vllm_metal his", {"history"}),
        ("%vllm_metal load sm", {"smollm2"}),
        ("%vllm_metal load org/T", {"org/Tiny-0.1B"}),
        (
            "%vllm_metal serve --max-n",
            {f"--max-num-{x}" for x in ("seqs", "batched-tokens", "queued-reqs", "queued-tokens")},
        ),
        ("%vllm_metal load smollm2 --dtype b", {"bfloat16"}),
        ("%vllm_metal load smollm2 --attention-b", {"--attention-backend"}),
        ("%vllm_metal serve smollm2 --attention-backend ", {"auto", "paged", "reference"}),
        ("%vllm_metal plan smollm2 --attention_backend p", {"paged"}),
        ("%vllm_metal set temp", {"temperature="}),
        ("%vllm_metal set temperature=0.2 top", {"top_p=", "top_k="}),
        ("%%chat --te", {"--temperature"}),
        ("%%chat --ce", {"--cells"}),
        ("%%chat --cells ", {"1", "3", "5"}),
        ("%%chat --er", {"--error"}),
        ("%%chat --compare temp", {"temperature="}),
        ("%%chat --compare think=", {"think=on,off"}),
        ("%%chat --compare mod", {"model="}),
        ("%%chat -f c", {"code"}),
        ("%%chat -c si", {"side"}),
        ("%vllm_metal history si", {"side"}),
        ("%%vllm_metal co", {"complete"}),
        ("%vllm_metal sc", {"score"}),
        ("%%vllm_metal sc", {"score"}),
        ("%%vllm_metal score --l", {"--logprobs"}),
        ("%vllm_metal history --l", {"--list"}),
        ("%%chat -c new --fork si", {"side"}),
        ("%%chat --to", {"--to-cell", "--tools", "--tool-choice", "--top-p", "--top-k"}),
        ("%vllm_metal talk o", {"off"}),
        ("%vllm_metal talk --conv", {"--conversation"}),
        ("%vllm_metal talk -c si", {"side"}),
        ("%chat -c si", {"side"}),
        ("%%chat --tools my_f", {"my_function"}),
        ("%%chat --tools one,my_f", {"one,my_function"}),
        ("%%chat --tools ", {"my_function", "isqrt"}),
        ("%%chat --tools my_function,", {"my_function,isqrt"}),
        ("%%chat -c ", {"default", "side"}),
        ("%vllm_metal reset ", {"default", "side"}),
        ("%vllm_metal load x --max_mo", {"--max_model_len"}),
        ("%%chat --max_t", {"--max_tokens", "--max_tool_rounds"}),
        ("%%chat --tools my_function --tool-choice m", {"my_function"}),
        ("%%chat --tool-choice re", {"required"}),
        ("%%vllm_metal chat --no-s", {"--no-stream"}),
    ],
)
def test_commands_flags_values_models_and_conversations(shell: Any, code: str, found: set[str]) -> None:
    line(shell, "reset side")
    shell.run_cell("from math import isqrt, pi\ndef my_function(): ...").raise_error()
    assert set(completions(shell, code)) == found


def test_a_cells_first_line_is_completed_while_its_body_is_there(shell: Any) -> None:
    assert completions(shell, "%%chat --te\nhello", 11) == ["--temperature"]


def test_the_body_of_a_cell_and_plain_code_are_left_to_ipython(shell: Any) -> None:
    assert "--temperature" not in completions(shell, "%%chat\n--te")
    assert "import" in completions(shell, "impor")
    assert completions(shell, "%vllm_metal load smollm2 --seed 1") == []


def test_all_commands_are_offered_after_a_space(shell: Any) -> None:
    assert {"load", "serve", "status", "unload"} <= set(completions(shell, "%vllm_metal "))


def test_the_chat_line_is_completed_where_that_name_is_ours(shell: Any) -> None:
    assert completions(shell, "x = %chat --te") == ["--temperature"]
    shell.extension_manager.unload_extension("vm_magic")
    shell.register_magic_function(print, "line", "chat")
    shell.extension_manager.load_extension("vm_magic")
    assert "--temperature" not in completions(shell, "%chat --te")
    assert completions(shell, "%%chat --te") == ["--temperature"]
