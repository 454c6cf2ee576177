"""A model with several chat templates, and end tokens that a flag names: as transformers and vLLM choose."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from tests.conftest import TinyModelDir
from tests.engine.openai import strict

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HERMES = '{% for tool in tools %}{{ tool | tojson }}{% endfor %}Calls: <tool_call>{"name": …}</tool_call>\n' + TURNS
TEMPLATES = {"default": TURNS, "tool_use": HERMES, "rag": "{{ (documents or []) | length }} documents\n" + TURNS}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module", params=["list", "files"])
def llm(request: pytest.FixtureRequest, tiny_model_dir: TinyModelDir, tmp_path_factory: Any) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("named")
    for path in tiny_model_dir("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if request.param == "list":
        config["chat_template"] = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATES["default"])
        (folder / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(TEMPLATES[name])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with LLM(str(folder), max_model_len=512, gpu_memory_utilization=0.2, served_model_name="named") as made:
        yield made


def test_tools_reach_the_prompt_through_the_template_for_them(llm: LLM) -> None:
    assert "weather" not in llm.render_chat(HELLO)
    assert llm.render_chat(HELLO, tools=TOOLS).startswith(json.dumps(TOOLS[0]))
    assert llm.tool_call_parser == "hermes"
    assert llm.takes_tools


def test_a_request_may_name_one_of_the_models_templates(llm: LLM) -> None:
    documents = [{"title": "one", "text": "two"}]
    assert llm.render_chat(HELLO, chat_template="rag", documents=documents).startswith("1 documents\n")
    assert llm.render_chat(HELLO, chat_template="default", tools=TOOLS) == llm.render_chat(HELLO)
    server = llm.serve(api_key="sk-test")
    try:
        address, key = server.base_url.removesuffix("/v1"), {"Authorization": "Bearer sk-test"}
        with httpx.Client(base_url=address, headers=key, trust_env=False) as http:
            body = {"messages": HELLO, "documents": documents, "chat_template": "rag"}
            shown = http.post("/v1/chat/completions/render", json=body).json()
            assert llm.tokenizer.decode(shown["token_ids"]).startswith("1 documents\n")
            with_tools = http.post("/v1/chat/completions/render", json={"messages": HELLO, "tools": TOOLS}).json()
            assert "weather" in llm.tokenizer.decode(with_tools["token_ids"])
            foreign = http.post("/v1/chat/completions", json={**body, "chat_template": TURNS, "max_tokens": 1})
            assert "--trust-request-chat-template" in strict.error(foreign, 400, "BadRequestError", "chat_template")
    finally:
        server.stop()


def test_the_flag_may_name_one_too_and_then_it_is_the_one(llm: LLM) -> None:
    options: dict[str, Any] = {"max_model_len": 512, "gpu_memory_utilization": 0.2}
    with LLM(llm.args.model, chat_template="rag", **options) as named:
        assert named.render_chat(HELLO, tools=TOOLS).startswith("0 documents\n")


def test_end_tokens_of_the_override_take_the_place_of_the_models(tiny_model_dir: TinyModelDir) -> None:
    folder = Path(tiny_model_dir("llama"))
    options: dict[str, Any] = {"max_model_len": 256, "gpu_memory_utilization": 0.2}
    params = SamplingParams(temperature=0, max_tokens=20)
    with LLM(str(folder), **options) as llm:
        free = llm.generate([[5, 6, 7]], params.replace(ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids
        own = llm.tokenize(llm.tokenizer.eos_token or "", add_special_tokens=False)
    end = free[6]
    with LLM(str(folder), override_generation_config={"eos_token_id": [end]}, **options) as llm:
        output = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == (free[: free.index(end) + 1], "stop")
        assert llm._requests.eos_token_ids == {end, *own}
        assert "<|im_end|>" not in output.text


@pytest.mark.parametrize("wrong", ["</s>", -1, [1, "x"], True, 10**9])
def test_end_tokens_that_are_none_are_refused(tiny_model_dir: TinyModelDir, wrong: object) -> None:
    with pytest.raises(ConfigError, match="--override-generation-config: eos_token_id"):
        LLM(str(tiny_model_dir("llama")), max_model_len=256, override_generation_config={"eos_token_id": wrong})
