"""The vocabularies of GGUF files: each way to split, kinds, special tokens, and llama.cpp's own test vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from engine.errors import ModelLoadError
from engine.models.gguf_file import open_gguf
from engine.text.tokens.gguf_pre_tokenizers import PRE_TOKENIZERS
from engine.text.tokens.gguf_tokenizer import build_tokenizer
from engine.text.tokens.tokenizer import _from_metadata
from tests.checkpoints.tokenizer_packages import FOLDERS, LLAMA_CPP, package_folder
from tests.checkpoints.tokenizers import (
    SENTENCES,
    as_model_type,
    byte_level_tokenizer,
    gguf_metadata,
    our_tokenizer,
    random_texts,
    sentencepiece_tokenizer,
)

KEY = "tokenizer.ggml."


def byte_metadata(pre: str, **more: Any) -> dict[str, Any]:
    """All bytes and no merges, so a piece of text is never longer than a character's bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    values = {"model": "gpt2", "pre": pre, "tokens": alphabet, "merges": [], "add_bos_token": False, **more}
    return {f"{KEY}{name}": value for name, value in values.items()}


@pytest.mark.parametrize("pre", [name for name, way in PRE_TOKENIZERS.items() if way.byte_level])
def test_every_pre_tokenizer_gives_the_text_back(pre: str) -> None:
    hf = build_tokenizer(byte_metadata(pre))
    composed = ("", "Hello, world!", "I'll  12345 \n\n x\t", "é漢字🙂ก็ مرحبا ٣٤٥", "def f(x):\r\n    return x**2", "  ")
    for text in composed:
        assert hf.decode(hf.encode(text).ids) == text


def split(pre: str, text: str) -> list[str]:
    """The pieces that merges never cross."""
    hf = build_tokenizer(byte_metadata(pre))
    return [text[start:end] for _, (start, end) in hf.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("deepseek-v3", "12345 漢字ab.x", ["123", "45", " ", "漢字", "ab", ".x"]),
        ("deepseek-llm", "ab 12漢字\n", ["ab", " ", "1", "2", "漢字", "\n"]),
        ("deepseek-coder", "a1\n!", ["a", "1", "\n", "!"]),
        ("kimi-k2", "漢字Ab12345don't", ["漢字", "Ab", "123", "45", "don't"]),
        ("gpt-4o", "HTTPServer don't", ["HTTPServer", " don't"]),
        ("tekken", "don't 12", ["don", "'t", " ", "1", "2"]),
        ("tiny_aya", "1234567 a", ["1", "234", "567", " a"]),
        ("afmoe", "1234567漢", ["1", "234", "567", "漢"]),
        ("superbpe", "a 1234567", ["a ", "1", "234", "567"]),
        ("minicpm5", "12345 a", ["123", "45", " a"]),
        ("seed-coder", "a!\n12", ["a", "!", "\n", "1", "2"]),
        ("ufakzeka", "Ali'nin", ["Ali", "'nin"]),
        ("qwen2", "Ali'S a\u0301", ["Ali", "'S", " a", "\u0301"]),
        ("qwen35", "x\u0331y", ["x\u0331y"]),
        ("glm4", "12345", ["123", "45"]),
        ("bloom", "a.b c", ["a", ".", "b", " c"]),
        ("viking", "a12", ["a", "1", "2"]),
        ("falcon", "ab12345!", ["ab", "123", "45", "!"]),
        ("laguna", "a\nb", ["a", "\n", "b"]),
        ("youtu", "한국ab，c", ["한국", "ab", "，", "c"]),
        ("exaone-moe", "a b!", ["a b", "!"]),
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(pre: str, text: str, pieces: list[str]) -> None:
    found = split(pre, text)
    assert [piece.replace(" ", "Ġ") if pre == "smollm" else piece for piece in found] == pieces


def test_glm_4_takes_whole_words_but_begins_with_nothing() -> None:
    assert PRE_TOKENIZERS["glm4"].ignore_merges
    assert not PRE_TOKENIZERS["glm4"].begins
    assert not PRE_TOKENIZERS["chatglm-bpe"].ignore_merges


@pytest.mark.parametrize(
    ("pre", "tokenizer_class"), [("qwen2", "Qwen2Tokenizer"), ("qwen35", "Qwen3_5Tokenizer"), ("command-r", "Cohere")]
)
def test_a_file_and_a_folder_of_the_same_model_agree(tmp_path: Path, pre: str, tokenizer_class: str) -> None:
    hf = byte_level_tokenizer()
    hf.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    hf.add_tokens(["<think>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    name = tokenizer_class if tokenizer_class.endswith("Tokenizer") else f"{tokenizer_class}Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    folder, file = our_tokenizer(tmp_path), _from_metadata(gguf_metadata(tmp_path, "gpt2", pre))
    for text in [*SENTENCES, *random_texts(100, ["<think>", "<|im_start|>"])]:
        assert file.encode(text) == folder.encode(text)
        assert file.decode(file.encode(text)) == folder.decode(folder.encode(text))


def gemma_folder(folder: Path) -> Path:
    hf = sentencepiece_tokenizer()
    hf.add_special_tokens(["<bos>", "<eos>", "<pad>", "<mask>"])
    hf.add_tokens([tokenizers.AddedToken("<|turn>", normalized=False)])
    bos = hf.token_to_id("<bos>")
    hf.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", bos)])
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    return folder


def test_gemma_4s_vocabulary_agrees_with_its_folder(tmp_path: Path) -> None:
    gemma_folder(tmp_path)
    folder, file = our_tokenizer(tmp_path), _from_metadata(gguf_metadata(tmp_path, "gemma4", "gemma4"))
    for text in [*SENTENCES, *random_texts(100, ["<|turn>", "<eos>", "   "])]:
        assert file.encode(text) == folder.encode(text)
        assert file.decode(file.encode(text)) == folder.decode(folder.encode(text))
    assert file.begins_with == folder.begins_with != []


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<|end|>", 3), ("<|user|>", 4)]
    pieces += [*((f"<0x{byte:02X}>", 6) for byte in range(256)), ("\u2581", 1), ("a", 1), ("\u2581a", 1)]
    values = {
        "model": "llama",
        "tokens": [piece for piece, _ in pieces],
        "token_type": [kind for _, kind in pieces],
        "scores": [-float(index) for index in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return {f"{KEY}{name}": value for name, value in values.items()}


def test_phi_3s_special_tokens_swallow_the_space_behind_them() -> None:
    plain, phi3 = sentencepiece_metadata(), {**sentencepiece_metadata(), "general.architecture": "phi3"}
    space, word = 261, 263
    for metadata, ids in ((plain, [3, space]), (phi3, [3, word])):
        assert build_tokenizer(metadata).encode("<|end|> \n a", add_special_tokens=False).ids[:2] == ids
    assert build_tokenizer(phi3).encode("<s> a", add_special_tokens=False).ids == [1, space, word]


def test_the_unknown_token_written_out_is_that_token() -> None:
    hf = build_tokenizer(sentencepiece_metadata())
    assert hf.encode("a<unk>a", add_special_tokens=False).ids.count(0) == 1


def test_tokens_without_a_text_get_one_and_a_token_named_twice_is_named_in_the_error() -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    hf = build_tokenizer(byte_metadata("qwen2", tokens=[*alphabet, "", "", "[PAD258]"]))
    assert hf.get_vocab_size() == 259
    assert hf.id_to_token(257) == "[EMPTY_257]"
    with pytest.raises(ModelLoadError, match=r"'a' twice.*--tokenizer"):
        build_tokenizer(byte_metadata("qwen2", tokens=[*alphabet, "a"]))


def test_merges_of_pieces_that_the_vocabulary_lacks_are_left_out() -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    hf = build_tokenizer(byte_metadata("gpt-2", tokens=[*alphabet, "he"], merges=["h e", "l l", "he ll"]))
    assert hf.encode("hell").tokens == ["he", "l", "l"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_metadata("new-split"), "'new-split' is not known"),
        ({f"{KEY}model": "rwkv"}, r"kind 'rwkv' \(gpt2, llama, gemma4 are read\)"),
        ({f"{KEY}model": "t5"}, "kind 't5'"),
        ({f"{KEY}model": "plamo2"}, "kind 'plamo2'"),
        ({key: value for key, value in byte_metadata("kimi-k2").items() if key != f"{KEY}merges"}, "no merges"),
        (sentencepiece_metadata(remove_extra_whitespaces=True), "remove_extra_whitespaces"),
        (sentencepiece_metadata(precompiled_charsmap=[1, 2]), "precompiled_charsmap"),
    ],
)
def test_what_cannot_be_read_is_named_with_a_way_out(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message + ".*--tokenizer") as caught:
        build_tokenizer(metadata)
    assert "\n" not in str(caught.value)


VECTORS = {
    "command-r": 47,
    "deepseek-coder": 47,
    "deepseek-llm": 47,
    "falcon": 47,
    "gemma-4": 46,
    "gpt-2": 47,
    "llama-bpe": 47,
    "llama-spm": 47,
    "mpt": 47,
    "phi-3": 47,
    "qwen2": 47,
    "qwen35": 48,
    "refact": 47,
    "starcoder": 47,
}
"""Sentences whose ids llama.cpp's files name, by vocabulary. Of Qwen 3.5's 51 three are decomposed: the model's own
tokenizer composes them (NFC), llama.cpp does not."""


@pytest.mark.parametrize("name", VECTORS)
def test_llama_cpps_test_vectors_pass(name: str) -> None:
    file = package_folder(LLAMA_CPP) / f"ggml-vocab-{name}.gguf"
    hf = build_tokenizer(open_gguf(file).metadata)
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(word) for word in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    same = [hf.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(texts, expected, strict=False)]
    assert sum(same) == VECTORS[name]
    assert len(same) - sum(same) == (3 if name == "qwen35" else 0)


SAME_VOCABULARY = (
    ("qwen3", "qwen3", "gpt2", "qwen2"),
    ("llama3_1", "llama", "gpt2", "llama-bpe"),
    ("deepseek_v3", "deepseek_v3", "gpt2", "deepseek-v3"),
    ("gptoss", "gpt_oss", "gpt2", "gpt-4o"),
    ("gemma3", "gemma3", "gemma4", "gemma4"),
)


@pytest.mark.parametrize(("name", "model_type", "kind", "pre"), SAME_VOCABULARY)
def test_a_real_folder_and_what_llama_cpp_makes_of_it_agree(name: str, model_type: str, kind: str, pre: str) -> None:
    (package,) = [package for package in FOLDERS if f"-{name}@" in package.requirement]
    with as_model_type(package_folder(package), model_type) as copy:
        folder, file = our_tokenizer(copy), _from_metadata(gguf_metadata(copy, kind, pre))
    special = sorted(folder.special_tokens)[:40]
    for text in [*SENTENCES, *special, *random_texts(300, special)]:
        assert file.encode(text) == folder.encode(text)


@pytest.mark.parametrize(("vocabulary", "name"), [("qwen2", "qwen3"), ("llama-bpe", "llama3")])
def test_llama_cpps_file_and_the_models_folder_agree(vocabulary: str, name: str) -> None:
    (package,) = [package for package in FOLDERS if f"-{name}@" in package.requirement]
    folder = our_tokenizer(package_folder(package))
    hf = build_tokenizer(open_gguf(package_folder(LLAMA_CPP) / f"ggml-vocab-{vocabulary}.gguf").metadata)
    for text in [*(text for text in SENTENCES if "<" not in text), *random_texts(300)]:
        assert hf.encode(text, add_special_tokens=False).ids == folder.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "damage",
    [
        {"model": []},
        {"tokens": None},
        {"tokens": [1]},
        {"merges": 0},
        {"merges": ["", "a"]},
        {"token_type": True},
        {"tokens": float("inf"), "eos_token_id": 1},
    ],
)
def test_a_damaged_vocabulary_is_refused_in_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match="--tokenizer") as caught:
        _from_metadata({**byte_metadata("default"), **{f"{KEY}{name}": value for name, value in damage.items()}})
    assert "\n" not in str(caught.value)


def test_a_special_token_whose_id_is_none_of_the_vocabulary_has_no_name() -> None:
    named = _from_metadata(byte_metadata("default", eos_token_id=10**9, bos_token_id="a", padding_token_id=3))
    assert list(named.named_tokens) == ["pad_token"]


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"tokenizer\.chat_template is no text"):
        _from_metadata({**byte_metadata("default"), "tokenizer.chat_template": [1]})
