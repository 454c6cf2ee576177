"""``/tokenizer_info``: what evaluation programs ask a server for that tokenizes for them."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from engine import LLM
from engine.models.local import ResolvedModel
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, Serve, http_client


def test_tokenizer_info_needs_its_flag_and_the_key(serve: Serve) -> None:
    with http_client(serve()) as http:
        message = strict.error(http.get("/tokenizer_info"), 404, "NotFoundError")
        assert message.endswith("serve with --enable-tokenizer-info-endpoint.")
    with http_client(serve(enable_tokenizer_info_endpoint=True)) as http:
        assert http.get("/tokenizer_info").json()["eos_token"] is None  # a bare tokenizer: no file names one
        del http.headers["Authorization"]
        strict.error(http.get("/tokenizer_info"), 401, "Unauthorized")


@pytest.fixture
def folder(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose files name tokens in all the ways that files do."""
    for file in tiny_model_dir("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|im_end|>", "lstrip": False, "special": True, "__type": "AddedToken"}
    config["added_tokens_decoder"] = {"2": {"content": "<|im_end|>", "special": True}}
    config["pad_token"] = "<|endoftext|>"
    config["name_or_path"] = "/somewhere/model"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "other"}))
    return tmp_path


def test_the_tokenizers_configuration_comes_as_vllm_gives_it(folder: Path) -> None:
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    with LLM(str(folder), max_model_len=256, chat_template=own) as llm:
        handle = llm.serve(api_key=KEY, enable_tokenizer_info_endpoint=True)
        with http_client(handle) as http:
            info = http.get("/tokenizer_info").json()
            assert (info["eos_token"], info["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
            assert info["added_tokens_decoder"] == {"2": "<|im_end|>"}
            assert info["chat_template"] == own
            assert "tokenizer_class" in info
            assert "name_or_path" not in info
            assert _id_of(http, info["eos_token"]) == 2


def _id_of(http: httpx.Client, text: str) -> int:
    """As a client finds an end token's id: from its text."""
    tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert isinstance(tokens, list)
    return int(tokens[0])


def test_a_gguf_files_special_tokens_are_told(smollm2: ResolvedModel) -> None:
    options = {"api_key": KEY, "enable_tokenizer_info_endpoint": True}
    with LLM(str(smollm2.path), max_model_len=256) as llm, http_client(llm.serve(**options)) as http:
        info = http.get("/tokenizer_info").json()
        assert {name: info[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")} == {
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        }  # fmt: skip
        assert "<|im_start|>" in info["chat_template"]
