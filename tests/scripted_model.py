"""A model that says what a test wrote, through the real loader, scheduler, pages, sampler, detokenizer and port.

``write_scripted_model(folder, gguf, [text, …])`` makes a model folder of type ``scripted`` with SmolLM2's tokenizer;
``install()`` (idempotent, also called by the fixture) teaches mlx-lm that type in this process, so that
``LLM(str(folder))``, ``%vllm_metal load FOLDER`` and ``resolve`` treat it as any other. In a kernel of its own, run
``from tests.scripted_model import install; install()`` first. Fixture: ``scripted_llm(text, …, **engine options)``.

* The script is the text after ``<|im_start|>assistant\\n``, as a real model would write it from there, ``<think>``
  included; then the end token ``<|im_end|>``. A prompt must end in ``prompt_suffix`` (any chat through the default
  template does; a raw prompt is ``"anything" + SUFFIX``).
* **Anchors**: a token that stands exactly once in a script (``anchors``: ``<think>``, ``</think>`` and what else a test
  names; all are single tokens of this tokenizer) puts the model behind that place of its script whenever it is the
  latest in the context. So a template that opens the thought in the prompt, one that closes it (thinking off), and an
  end marker that a thinking budget injects are all followed as by a real model.
* **Several scripts** (up to 8): the latest ``<|script_N|>`` in the prompt (in any message) chooses; 0 without one.
* **Masks win**: the scripted token has logit 40, the end token 20, what closes JSON 10, all others a fixed number
  below 1. A forbidden token costs one place of the script (the model counts tokens, as it must: it has no other state).
* Everything lives in the KV cache: prefix hits, preemption, forks, chunks, both backends behave as for other models.
  Keep ``kv_cache_dtype`` and ``dtype`` float32 (on a CPU they are).
* ``step_seconds`` makes each step take that long, for tests that act while a reply is under way.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import re
import struct
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import tokenizers

from tests import tiny_models

SUFFIX = "<|im_start|>assistant\n"
THINK_START, THINK_END = "<think>", "</think>"
MARKERS = (THINK_START, THINK_END, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MAX_SCRIPTS = 8
_MODULE = "mlx_lm.models.scripted"
_FILE = Path(__file__).with_name("scripted_model_mlx.py")
_CLOSERS = ('"', "}", "]", '"}', '"]', "}}", "]}", '"}}')


class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``mlx_lm.models.scripted`` when a config names that model type."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(fullname, _FILE) if fullname == _MODULE else None


def install() -> None:
    """Teach mlx-lm the model type ``scripted`` in this process. Imports neither mlx nor mlx-lm."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def write_scripted_model(
    folder: Path,
    gguf: Path,
    scripts: str | Sequence[str],
    *,
    prompt_suffix: str = SUFFIX,
    anchors: Sequence[str] = (THINK_START, THINK_END),
    extra_tokens: Sequence[str] = (),
    special_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    step_seconds: float = 0.0,
    context_length: int = tiny_models.CONTEXT_LENGTH,
    selectors: Sequence[str] = (),
) -> Path:
    """A whole model folder that says ``scripts``.

    ``extra_tokens`` and ``special_tokens`` become single tokens beside ``MARKERS`` (special ones are those that
    ``skip_special_tokens`` leaves out); ``chat_template`` replaces SmolLM2's ChatML. ``selectors`` choose scripts in
    place of ``<|script_N|>``: ordinary text, which a script writes in pieces, so that it chooses once a client sends it
    back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny_models.write_tokenizer(folder, gguf)
    plain = tuple(text for text in (*MARKERS, *extra_tokens) if text not in special_tokens)
    chosen = tuple(selectors) or tuple(f"<|script_{number}|>" for number in range(MAX_SCRIPTS))
    special = (*special_tokens, *(text for text in chosen if text not in selectors))
    tokenizer, writer, saved = _tokenizers(gguf, plain, special, tuple(selectors))
    (folder / "tokenizer.json").write_text(saved, encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    texts = [scripts] if isinstance(scripts, str) else list(scripts)
    assert 1 <= len(texts) <= MAX_SCRIPTS, f"1 to {MAX_SCRIPTS} scripts"
    config = {
        "model_type": "scripted",
        "architectures": ["ScriptedForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": context_length,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_hidden_layers": 1,
        "scripts": [_encode(writer, text, anchors) for text in texts],
        "anchors": [_anchors(writer, text, prompt_suffix, anchors) for text in texts],
        "selectors": [tokenizer.token_to_id(text) for text in chosen],
        "closers": [tokenizer.token_to_id(text) for text in _CLOSERS if tokenizer.token_to_id(text) is not None],
        "step_seconds": step_seconds,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_weights(folder / "model.safetensors")
    return folder


@cache
def _tokenizers(
    gguf: Path, plain: tuple[str, ...], special: tuple[str, ...], selectors: tuple[str, ...]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, str]:
    """The model's tokenizer, that which writes its scripts, and the first as a file's text; read, never changed."""
    tokenizer = tokenizers.Tokenizer.from_str(tiny_models.tokenizer_files(gguf)["tokenizer.json"])
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in plain])
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in special])
    writer = tokenizers.Tokenizer.from_str(tokenizer.to_str()) if selectors else tokenizer
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False, special=False) for text in selectors])
    return tokenizer, writer, tokenizer.to_str(pretty=True)


def _encode(tokenizer: tokenizers.Tokenizer, script: str, anchors: Sequence[str]) -> list[int]:
    """Token ids, white space behind an anchor for itself: where a prompt ends there, its tokens are the same."""
    marks = "|".join(map(re.escape, anchors)) or "(?!)"
    pieces = re.split(rf"((?:{marks})\s+)", script)
    return [token for piece in pieces if piece for token in tokenizer.encode(piece, add_special_tokens=False).ids]


def _anchors(tokenizer: tokenizers.Tokenizer, script: str, suffix: str, texts: Sequence[str]) -> list[tuple[int, int]]:
    """(token, place in the script behind it) of each anchor, the first token of the prompt's suffix first."""
    ids = _encode(tokenizer, script, texts)
    start = tokenizer.encode(suffix, add_special_tokens=False).ids
    found = [(start[0], 1 - len(start))]
    for text in texts:
        token = tokenizer.token_to_id(text)
        assert token is not None, f"{text!r} is not a token: give it as extra_tokens"
        if ids.count(token) == 1 and token not in start[:1]:
            found.append((token, ids.index(token) + 1))
    return found


def _write_weights(path: Path) -> None:
    """One weight: a loader wants a file, and its element type."""
    header = json.dumps({"unit": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.0))
