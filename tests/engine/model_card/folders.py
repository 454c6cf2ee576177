"""Small model folders without downloads: a vocabulary of 64 words, random weights, every file that a card reads."""

import json
import struct
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

import engine
from engine.model_card.card import ModelCard

VOCAB_SIZE = 64
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}{% for message in messages %}{{ message.content }}"
    "{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
WEIGHTS = "model.safetensors"


def write_folder(folder: Path, *, leave_out: tuple[str, ...] = (), **config: Any) -> Path:
    """A whole model; ``config`` replaces entries of ``config.json``, and None takes them out."""
    folder.mkdir(parents=True)
    entries = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
    write_json(folder / "config.json", entries)
    write_json(folder / "generation_config.json", {"temperature": 0.6, "top_k": 20, "eos_token_id": [2, 3]})
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE},
    )
    write_tokenizer(folder / "tokenizer.json")
    write_weights(folder / WEIGHTS)
    for name in leave_out:
        (folder / name).unlink()
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def changed(path: Path, **entries: Any) -> None:
    """Replace entries of a JSON file."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})


def write_tokenizer(path: Path, size: int = VOCAB_SIZE) -> None:
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a"]
    vocab = {word: index for index, word in enumerate([*words, *(f"w{i}" for i in range(size - len(words)))])}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(word, special=True) for word in words[1:4]])
    made.save(str(path))


def write_weights(path: Path, tensors: dict[str, tuple[str, list[int]]] | None = None) -> None:
    """A safetensors file of zeros: element types and shapes by name; the whole model where none are given."""
    sizes = {"BF16": 2, "F32": 4, "U32": 4, "F8_E4M3": 1}
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in (tensors or _tensors()).items():
        begin, count = end, 1
        for one in shape:
            count *= one
        end += count * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def _tensors() -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [VOCAB_SIZE, 32])}
    layer = {
        "self_attn.q_proj": [32, 32], "self_attn.k_proj": [16, 32], "self_attn.v_proj": [16, 32],
        "self_attn.o_proj": [32, 32], "self_attn.q_norm": [16], "self_attn.k_norm": [16],
        "mlp.gate_proj": [64, 32], "mlp.up_proj": [64, 32], "mlp.down_proj": [32, 64],
        "input_layernorm": [32], "post_attention_layernorm": [32],
    }  # fmt: skip
    for number in range(2):
        found |= {f"model.layers.{number}.{name}.weight": ("BF16", shape) for name, shape in layer.items()}
    return {**found, "model.norm.weight": ("BF16", [32])}


def card(folder: Path, **options: Any) -> ModelCard:
    return engine.inspect(str(folder), **options)


def facts(found: ModelCard, section: str) -> dict[str, tuple[str, str]]:
    return {name: (fact.text, fact.source) for name, fact in found.section(section).items()}


def only(lines: tuple[str, ...], words: str) -> str:
    """The one line that has ``words``."""
    found = [line for line in lines if words in line]
    assert len(found) == 1, lines
    return found[0]
