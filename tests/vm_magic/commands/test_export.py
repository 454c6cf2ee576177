"""``export``: a command that, pasted back, asks for the same engine and port; and what clients need."""

import ast
import json
import tomllib
from typing import Any

import pytest

from engine.params.engine_args import ENGINE_FLAGS, EngineArgs
from vm_magic.commands.export import Served, serve_command
from vm_magic.commands.parser import pick
from vm_magic.commands.serve import SERVER_OPTIONS
from vm_magic.commands.shell_text import read_shell_text
from vm_magic.commands.table import command_parser
from vm_magic.show.cards import CodeText
from vm_magic.state.clients import CLIENTS, Endpoint, model_id, snippets

HUB = "org/Tiny 0.1B"


def pasted_back(text: str) -> tuple[EngineArgs, dict[str, Any]]:
    """The engine arguments and server options that ``%%vllm_metal serve`` reads from ``text``."""
    pasted = read_shell_text(text, {})
    parsed = command_parser("serve").read(pasted.arguments)
    given = pick(parsed, [flag.field for flag in ENGINE_FLAGS])
    args = EngineArgs.from_options(parsed.model, given, pasted.environment)
    return args, pick(parsed, SERVER_OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_model_len": "32K", "max_num_seqs": 4, "max_num_batched_tokens": "1k", "block_size": 32},
        {"max_model_len": "auto", "gpu_memory_utilization": 0.65, "enable_prefix_caching": False},
        {"kv_cache_dtype": "bfloat16", "dtype": "float16", "seed": 0, "trust_remote_code": True},
        {"served_model_name": ["a", "b c"], "revision": "main", "tokenizer": "~/tok", "hf_config_path": "x"},
        {"generation_config": "vllm", "override_generation_config": {"temperature": 0.1, "max_new_tokens": 9}},
        {"chat_template": "{{ messages[0]['content'] }}\n'quoted' \"twice\" $HOME", "limit_mm_per_prompt": "image=0"},
        {"default_chat_template_kwargs": {"enable_thinking": True, "text": "it's"}, "reasoning_parser": "qwen3"},
        {"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
        {"attention_backend": "reference", "kv_cache_dtype": "int8"},
    ],
)
def test_the_command_pasted_back_asks_for_the_same_engine(options: dict[str, Any]) -> None:
    args = EngineArgs.from_options(HUB, options, {})
    assert pasted_back(serve_command(Served(args)))[0] == args


def test_variables_come_back_as_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    environment = {"VLLM_METAL_MEMORY_FRACTION": "0.65", "VLLM_METAL_USE_PAGED_ATTENTION": "0"}
    args = EngineArgs.from_options(HUB, {}, environment)
    text = serve_command(Served(args, environment={"HF_HOME": "/my models"}))
    assert read_shell_text(text, {}).environment == {**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": "/my models"}
    assert "--gpu-memory-utilization" not in text
    assert pasted_back(text)[0] == args


def test_an_attention_backend_is_written_as_a_variable_since_vllms_flag_has_other_values() -> None:
    text = serve_command(Served(EngineArgs(HUB, attention_backend="paged")))
    assert read_shell_text(text, {}).environment == {"VLLM_METAL_ATTENTION_BACKEND": "paged"}
    assert "--attention-backend" not in text
    assert "ATTENTION_BACKEND" not in serve_command(Served(EngineArgs(HUB)))


def test_server_options_come_back_too() -> None:
    options = {
        "host": "0.0.0.0",
        "port": 8123,
        "api_key": ["secret"],
        "allowed_origins": ["https://a.example", "*"],
        "root_path": "/a b",
        "trust_request_chat_template": True,
        "enable_log_requests": True,
    }
    text = serve_command(Served(EngineArgs(HUB), options))
    assert pasted_back(text)[1] == {name: value for name, value in options.items() if name != "api_key"}
    assert "secret" not in text


def test_the_key_is_written_out_only_when_asked_for() -> None:
    assert "--show-key" in serve_command(Served(EngineArgs(HUB)))
    shown = serve_command(Served(EngineArgs(HUB), api_key="it's"))
    assert read_shell_text(shown, {}).environment == {"VLLM_API_KEY": "it's"}
    assert "VLLM_API_KEY" not in serve_command(Served(EngineArgs(HUB), {"no_api_key": True}))


def test_live_settings_become_a_servers_defaults_where_vllm_has_them() -> None:
    args = EngineArgs(HUB, override_generation_config={"temperature": 0.9, "top_k": 5})
    settings = {"temperature": 0.2, "max_tokens": 100, "presence_penalty": 1.5}
    text = serve_command(Served(args, settings=settings))
    back = pasted_back(text)[0].override_generation_config
    assert back == {"temperature": 0.2, "top_k": 5, "max_new_tokens": 100}
    assert "# vLLM takes these with each request only: presence_penalty=1.5" in text


def test_parsers_chosen_at_load_are_named_since_vllm_chooses_none() -> None:
    chosen = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    args = pasted_back(serve_command(Served(EngineArgs(HUB), parsers=chosen)))[0]
    assert (args.reasoning_parser, args.tool_call_parser, args.enable_auto_tool_choice) == ("qwen3", "hermes", True)
    named = EngineArgs(HUB, reasoning_parser="gemma4")
    assert pasted_back(serve_command(Served(named, parsers=chosen)))[0].reasoning_parser == "gemma4"


def test_our_own_short_name_and_flags_are_translated_and_said() -> None:
    text = serve_command(Served(EngineArgs("smollm2"), {"no_api_key": True, "allowed_hosts": ["x"]}))
    args, options = pasted_back(text)
    assert (args.model, args.names) == ("HuggingFaceTB/SmolLM2-135M-Instruct", ("smollm2",))
    assert options == {}
    assert "# vLLM has no --no-api-key" in text
    assert "# vLLM has no --allowed-hosts" in text


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("api_key", [None, "sk-'1"])
@pytest.mark.parametrize("needs_key", [True, False])
def test_each_client_gets_address_and_model_and_the_key_only_if_given(
    name: str, api_key: str | None, needs_key: bool
) -> None:
    port = Endpoint("http://127.0.0.1:8000/v1", "org/tiny", needs_key, api_key if needs_key else None)
    code = CLIENTS[name](port)
    if code.language == "python":
        ast.parse(code.text)
    elif code.language == "toml":
        assert tomllib.loads(code.text)["model_providers"]["vm-magic"]["base_url"] == port.base_url
    assert model_id(port.model) in code.text
    if name == "llm":  # which reads address and key from the file that %vllm_metal llm writes
        assert "%vllm_metal llm writes the entry and the key" in code.note
        assert not any(word in code.text for word in ("VLLM_API_KEY", "127.0.0.1:8000", "sk-"))
    else:
        assert "127.0.0.1:8000" in code.text
        assert ("VLLM_API_KEY" in code.text + code.note) == (needs_key and (api_key is None or name == "codex"))


def test_codex_is_told_to_offer_no_web_search_and_how_long_the_context_is() -> None:
    config = tomllib.loads(snippets(Endpoint("http://h:1/v1", "m", needs_key=False, max_model_len=8192))["codex"].text)
    assert (config["web_search"], config["model_context_window"]) == ("disabled", 8192)
    assert "context" not in snippets(Endpoint("http://h:1/v1", "m", needs_key=False))["codex"].text


def test_the_anthropic_sdk_gets_the_address_without_v1() -> None:
    assert "base_url='http://h:1'" in snippets(Endpoint("http://h:1/v1", "m", needs_key=False))["anthropic"].text


def test_code_is_fenced_in_a_notebook_and_plain_elsewhere() -> None:
    code = CodeText("a\n", "bash", "why")
    assert code._repr_markdown_() == "```bash\na\n```\n\nwhy"
    assert repr(code) == "a\n\nwhy"
    assert str(code) == "a\n"
    assert json.dumps(str(code)) == '"a\\n"'
