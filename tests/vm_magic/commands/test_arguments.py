"""The words of the magics: flags, free text, settings."""

from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError, RequestError, UnsupportedOptionError
from engine.params.engine_args import ENGINE_FLAGS, EngineArgs
from vm_magic.commands.parser import pick, split_text, split_words
from vm_magic.commands.serve import SERVER_OPTIONS
from vm_magic.commands.table import COMMANDS, command, command_parser
from vm_magic.show.errors import HelpShown
from vm_magic.state.settings_text import SETTABLE, read_settings

ENGINE_OPTIONS = [flag.field for flag in ENGINE_FLAGS]


def options(line: str) -> dict[str, Any]:
    return pick(command_parser("serve").read(split_words(line)), ENGINE_OPTIONS)


def test_only_flags_that_were_given_are_passed_on() -> None:
    assert options("smollm2") == {}
    assert options("smollm2 --max-model-len 32K --no-enable-prefix-caching") == {
        "max_model_len": "32K",
        "enable_prefix_caching": False,
    }


def test_underscores_and_equals_signs_are_allowed() -> None:
    assert options("m --max_model_len=1K --kv_cache_dtype auto") == {"max_model_len": "1K", "kv_cache_dtype": "auto"}


@pytest.mark.parametrize("command", ["load", "serve", "plan"])
def test_an_attention_backend_is_read_or_refused_in_one_line_by_every_command_with_engine_flags(command: str) -> None:
    parser = command_parser(command)
    assert parser.read(["m", "--attention_backend=Reference"]).attention_backend == "reference"
    with pytest.raises(UsageError, match=r"argument --attention-backend: FLASHINFER: .*take paged") as refused:
        parser.read(["m", "--attention-backend", "FLASHINFER"])
    assert "\n" not in str(refused.value)


def test_json_in_quotes_arrives_whole() -> None:
    given = options("""m --override-generation-config '{"temperature": 0.2, "top_k": 3}'""")
    assert EngineArgs.from_options("m", given, {}).override_generation_config == {"temperature": 0.2, "top_k": 3}


def test_dotted_flags_are_json_as_in_vllm() -> None:
    given = options("m --override-generation-config.top_p 0.5 --override_generation_config.temperature=0 --seed 1")
    assert EngineArgs.from_options("m", given, {}).override_generation_config == {"top_p": 0.5, "temperature": 0}
    assert given["seed"] == "1"
    with pytest.raises(UsageError, match="expected a value"):
        options("m --override-generation-config.top_p")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--tensor-parallel-size 2", "one device"),
        ("--tensor_parallel_size=2", "--tensor-parallel-size"),
        ("--enforce-eager", "leave the flag out"),
        ("--no-enable-chunked-prefill", "--no-enable-chunked-prefill is not supported: prefill is always chunked"),
        ("--max-log-len 100", "the log holds no prompts"),
        ("--stream-interval=4", "every token is sent at once"),
        ("--enable-per-request-metrics", "explain tells a request's times"),
        ("--mamba-cache-mode align", "--enable-prefix-caching"),
        ("--uds /tmp/s", "use --host and --port"),
        ("--swap-space 4", "recomputed"),
        ("--quantization awq", "how it is quantized"),
        ("--load-format gguf", "the files say what they are"),
        ("--distributed-executor-backend ray", "one device"),
        ("--compilation-config '{}'", "leave the flag out"),
        ("--hf-overrides '{}'", "--hf-config-path"),
        ("--max-model-le 3", "did you mean --max-model-len?"),
        ("--attention-config '{}'", "--attention-backend auto, paged or reference"),
        ("--frobnicate", "not a flag of serve"),
    ],
)
def test_a_flag_that_is_not_ours_is_refused_by_name(flag: str, words: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=words.replace("?", r"\?")):
        options(f"m {flag}")


def test_vllms_flags_that_say_what_is_so_here_anyway_are_taken() -> None:
    said = (
        "--tensor-parallel-size 1 --pipeline_parallel_size=1 --no-enforce-eager --swap-space 0 --async-scheduling "
        "--enable-prompt-tokens-details --enable-chunked-prefill --load-format auto --stream-interval 1 --seed 3 "
        "--distributed-executor-backend uni"
    )
    assert options(f"m {said}") == {"seed": "3"}
    assert EngineArgs.from_options("m", {"tensor_parallel_size": 1, "enforce_eager": False}, {}) == EngineArgs("m")
    for wrong in ({"tensor_parallel_size": 2}, {"enforce_eager": True}, {"max_log_len": 5}):
        with pytest.raises(UnsupportedOptionError, match="is not supported: "):
            EngineArgs.from_options("m", wrong, {})
    with pytest.raises(UnsupportedOptionError, match="not a flag of bench"):
        command_parser("bench").read(["--tensor-parallel-size", "1"])


@pytest.mark.parametrize("command", ["load", "serve", "plan"])
def test_the_model_may_be_a_flag(command: str) -> None:
    read = command_parser(command).read
    for line in ("--model smollm2", "smollm2 --model=smollm2", "smollm2"):
        assert vars(read(split_words(line)))["model"] == "smollm2"
    with pytest.raises(UsageError, match="MODEL is smollm2 and --model says gemma3-270m: give one"):
        read(["smollm2", "--model", "gemma3-270m"])


def test_load_wants_a_model() -> None:
    with pytest.raises(UsageError, match="required: MODEL"):
        command_parser("load").read([])


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("--enable-log-requests --enable-force-include-usage", {"enable_log_requests": True,
                                                                "enable_force_include_usage": True}),
        ("--no-enable-log-requests", {"enable_log_requests": False}),
        ("--disable-log-requests", {"enable_log_requests": False}),
        ("--exclude-tools-when-tool-choice-none", {"exclude_tools_when_tool_choice_none": True}),
    ],
)  # fmt: skip
def test_the_ports_switches_have_both_forms(line: str, given: dict[str, bool]) -> None:
    assert pick(command_parser("serve").read(["m", *line.split()]), SERVER_OPTIONS) == given


def test_abbreviated_flags_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError):
        options("m --dtyp float32")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help_text(name: str) -> None:
    with pytest.raises(HelpShown) as caught:
        command_parser(name).read(["--help"])
    assert f"vllm_metal {name}" in caught.value.text
    assert command(name).help in caught.value.text


@pytest.mark.parametrize(
    ("line", "words", "text"),
    [
        ("What's the capital of France?", [], "What's the capital of France?"),
        ("-t 0.2 What's up -- really --now", ["-t", "0.2"], "What's up -- really --now"),
        ('-s "You are terse." Say hi', ["-s", "You are terse."], "Say hi"),
        ("--no-stream --max_tokens=3 hi  there", ["--no-stream", "--max_tokens=3"], "hi  there"),
        ("--max_tokens 3 hi", ["--max_tokens", "3"], "hi"),
        ("-- -5 + 3", [], "-5 + 3"),
        ("'quoted text'", [], "quoted text"),
        ("'a' or 'b'", [], "'a' or 'b'"),
        ("- a list item", [], "- a list item"),
        ("", [], ""),
    ],
)
def test_flags_come_first_and_the_text_stays_as_typed(line: str, words: list[str], text: str) -> None:
    assert split_text(command_parser("chat"), line) == (words, text)


def test_a_wrong_value_names_the_flag_and_the_help() -> None:
    with pytest.raises(UsageError, match=r"--temperature.*'warm'.*chat --help"):
        command_parser("chat").read(["-t", "warm"])


def test_an_open_quote_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="close the quote"):
        split_words("load 'smollm2")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("temperature=0.2 top_p=0.9", {"temperature": 0.2, "top_p": 0.9}),
        ("temperature = 1 top-k=5", {"temperature": 1, "top_k": 5}),
        ('stop=["a b", "c=d"] seed=7', {"stop": ["a b", "c=d"], "seed": 7}),
        ("stop=['a b'] ignore_eos=True", {"stop": ["a b"], "ignore_eos": True}),
        ("stop='a b'", {"stop": "a b"}),
        ("stop=END", {"stop": "END"}),
        ("temperature= top_p=none", {"temperature": None, "top_p": None}),
        ('logit_bias={"5": -100}', {"logit_bias": {"5": -100}}),
        ("", {}),
    ],
)
def test_settings_are_typed(text: str, values: dict[str, Any]) -> None:
    assert read_settings(text) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperature=warm", "temperature must be a number"),
        ("top_k=1.5", "top_k must be a whole number"),
        ("seed=true", "seed must be a whole number"),
        ("ignore_eos=3", "ignore_eos must be true or false"),
        ("stop=3", "stop must be"),
        ("temprature=1", "temprature is not a setting"),
        ("n=2", "n is not a setting"),
        ("just words", "expected KEY=VALUE"),
        ("memory_fraction=1.5", "gpu-memory-utilization 1.5: must be|memory.fraction"),
        ("max_model_len=long", "max-model-len: 'long' is not a whole number"),
        ("max_num_seqs=0", "max-num-seqs 0: must be"),
        ("max_num_seqs=", "max_num_seqs needs a value"),
    ],
)
def test_a_bad_setting_names_the_fix(text: str, words: str) -> None:
    with pytest.raises((ConfigError, RequestError), match=words):
        read_settings(text)


def test_settable_names_are_vllms() -> None:
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop"} <= set(SETTABLE)
