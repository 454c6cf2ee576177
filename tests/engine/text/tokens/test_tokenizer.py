import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from engine.errors import ModelLoadError, RequestError
from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.text.tokens.gguf_tokenizer import build_tokenizer
from engine.text.tokens.tokenizer import Tokenizer, _from_metadata, load_tokenizer

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\nand lines\t",
    "12345 + 6 = 12351",
    "I'll don't WE'RE",
    "é漢字🙂ก็ مرحبا",
    "def f(x):\n    return x ** 2  # ok",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: ResolvedModel) -> Tokenizer:
    return load_tokenizer(smollm2, EngineArgs("smollm2"))


def folder_tokenizer(folder: Path, **options: Any) -> Tokenizer:
    return load_tokenizer(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny", **options))


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of single letters."""
    vocab = {letter: index for index, letter in enumerate("abcdefgh")}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    hf.add_special_tokens(["<s>", "</s>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize("text", TEXTS)
def test_the_file_and_a_folder_made_from_it_agree_and_text_comes_back(
    smollm2_tokenizer: Tokenizer, tiny_model_dir: Any, text: str
) -> None:
    folder = folder_tokenizer(tiny_model_dir("llama"))
    ids = smollm2_tokenizer.encode(text)
    assert ids == folder.encode(text)
    assert smollm2_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_same_ids_from_the_folder(smollm2_tokenizer: Tokenizer, tiny_model_dir: Any) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tiny_model_dir("llama")))
    assert [theirs.encode(text) for text in TEXTS] == [smollm2_tokenizer.encode(text) for text in TEXTS]


def test_smollm2_splits_digits_and_knows_its_special_tokens(smollm2_tokenizer: Tokenizer) -> None:
    assert len(smollm2_tokenizer.encode("123")) == 3
    assert smollm2_tokenizer.encode("<|im_start|>") == [1]
    assert {0, 1, 2} <= smollm2_tokenizer.special_ids
    assert smollm2_tokenizer.eos_token_ids == {0, 2}
    assert smollm2_tokenizer.named_tokens["bos_token"] == "<|im_start|>"
    assert smollm2_tokenizer.eos_token == smollm2_tokenizer.named_tokens["eos_token"] == "<|im_end|>"
    assert smollm2_tokenizer.vocab_size == 49152
    assert "im_start" in smollm2_tokenizer.named_templates["default"]
    assert smollm2_tokenizer.decode([1, 2]) == ""
    assert smollm2_tokenizer.token_text(2) == "<|im_end|>"


def test_a_stream_shows_whole_characters_only_and_adds_up_to_the_text(smollm2_tokenizer: Tokenizer) -> None:
    text = "Ünïcödé 漢字 🙂!"
    stream = smollm2_tokenizer.decode_stream()
    pieces = [stream.step(token) for token in smollm2_tokenizer.encode(text)]
    assert "" in pieces
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_of_a_surrogate_pair_is_the_requests_mistake(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        smollm2_tokenizer.encode("hi \ud800")


def test_several_threads_encode_and_decode_at_once(smollm2_tokenizer: Tokenizer) -> None:
    expected = [smollm2_tokenizer.encode(text) for text in TEXTS]

    def work(_: int) -> bool:
        ids = [smollm2_tokenizer.encode(text) for text in TEXTS]
        return ids == expected and [smollm2_tokenizer.decode(i, skip_special_tokens=False) for i in ids] == TEXTS

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_the_usual_path_imports_neither_transformers_nor_mlx(plain_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.models.resolve import ResolvedModel;"
        "from engine.params.engine_args import EngineArgs;"
        "from engine.text.tokens.tokenizer import load_tokenizer;"
        f"load_tokenizer(ResolvedModel('t', Path({str(plain_folder)!r}), 'folder'), EngineArgs('t'));"
        "assert not {'transformers', 'mlx', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_end_tokens_are_those_of_all_files_together(plain_folder: Path) -> None:
    write(plain_folder, "config.json", {"eos_token_id": 3, "text_config": {"eos_token_id": [4]}})
    write(plain_folder, "generation_config.json", {"eos_token_id": [5, 6]})
    write(plain_folder, "tokenizer_config.json", {"eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    tokenizer = folder_tokenizer(plain_folder)
    assert tokenizer.eos_token_ids == {3, 4, 5, 6, 9}
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", {"default": "plain"}),
        ({"rag": "one", "default": "usual"}, {"rag": "one", "default": "usual"}),
        (None, {}),
    ],
)
def test_all_templates_of_a_model_are_known_by_name(plain_folder: Path, template: Any, expected: Any) -> None:
    write(plain_folder, "tokenizer_config.json", {"chat_template": template})
    assert folder_tokenizer(plain_folder).named_templates == expected


def test_a_template_file_goes_before_the_config(plain_folder: Path) -> None:
    write(plain_folder, "tokenizer_config.json", {"chat_template": "config"})
    write(plain_folder, "chat_template.json", {"chat_template": "json"})
    assert folder_tokenizer(plain_folder).named_templates == {"default": "json"}
    (plain_folder / "chat_template.jinja").write_text("jinja")
    assert folder_tokenizer(plain_folder).named_templates == {"default": "jinja"}


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]


def test_templates_keep_their_names_and_files_go_before_the_config(plain_folder: Path) -> None:
    write(plain_folder, "tokenizer_config.json", {"chat_template": NAMED})
    assert folder_tokenizer(plain_folder).named_templates == {"tool_use": "tools", "default": "usual"}
    (plain_folder / "chat_template.jinja").write_text("by file")
    assert folder_tokenizer(plain_folder).named_templates == {"default": "by file"}
    more = plain_folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("documents")
    tokenizer = folder_tokenizer(plain_folder)
    assert tokenizer.named_templates == {"default": "by file", "rag": "documents"}


CONFIGS = [
    {"eos_token": "ab"},
    {"eos_token": {"__type": "AddedToken", "content": "ab", "lstrip": True}},
    {"additional_special_tokens": ["ab", "cd"]},
    {"extra_special_tokens": {"image_token": "cd"}},
    {"added_tokens_decoder": {"8": {"content": "ab", "special": True}}},
    {"added_tokens_decoder": {"8": {"content": "ab", "special": False}, "10": {"content": "<new>", "special": True}}},
    {"added_tokens_decoder": {"10": {"content": "<s>", "special": False}}},
    {"bos_token": "<s>", "pad_token": "ab", "tool_call_token": "cd"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_tokens_that_only_the_config_calls_special_are_so_as_in_transformers(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    from transformers import PreTrainedTokenizerFast

    vocab = {text: index for index, text in enumerate([*"abcd efg", "ab", "cd"])}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))  # "ab" is in the vocabulary, and no merge makes it
    hf.decoder = tokenizers.decoders.Fuse()
    hf.add_special_tokens(["<s>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(str(tmp_path)), folder_tokenizer(tmp_path)
    for text in ("gab cd", "<s>ab<new>", "a b c d"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_name_that_the_vocabulary_lacks_adds_no_token(plain_folder: Path) -> None:
    write(plain_folder, "tokenizer_config.json", {"eos_token": "<|nothing|>"})
    tokenizer = folder_tokenizer(plain_folder)
    assert tokenizer.vocab_size == 10
    assert tokenizer.eos_token_ids == frozenset()


def test_tokens_that_only_the_config_knows_are_added(plain_folder: Path) -> None:
    write(plain_folder, "tokenizer_config.json", {"added_tokens_decoder": {"10": {"content": "<x>", "special": True}}})
    tokenizer = folder_tokenizer(plain_folder)
    assert tokenizer.encode("a<x>b") == [0, 10, 1]
    assert 10 in tokenizer.special_ids


def test_truncation_and_padding_saved_in_the_file_are_ignored(plain_folder: Path) -> None:
    hf = tokenizers.Tokenizer.from_file(str(plain_folder / "tokenizer.json"))
    hf.enable_truncation(2)
    hf.enable_padding(length=8)
    hf.save(str(plain_folder / "tokenizer.json"))
    assert folder_tokenizer(plain_folder).encode("abcd") == [0, 1, 2, 3]


def test_another_tokenizer_may_be_given_and_the_models_end_tokens_still_end(
    plain_folder: Path, tiny_model_dir: Any
) -> None:
    tokenizer = folder_tokenizer(tiny_model_dir("llama"), tokenizer=str(plain_folder))
    assert tokenizer.encode("ab") == [0, 1]
    assert tokenizer.eos_token_ids == {2}


def test_a_damaged_file_is_one_line(plain_folder: Path) -> None:
    (plain_folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelLoadError, match="not a tokenizer") as caught:
        folder_tokenizer(plain_folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_any_tokenizer_says_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json.*--tokenizer") as caught:
        folder_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def byte_level_metadata(pre: str | None, **more: Any) -> dict[str, Any]:
    """A vocabulary of all bytes and a few merges, with two control tokens in front."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, "he", "ll", "hell", "11", "111", "1111", "hello"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *([1] * (len(tokens) - 2))],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "1 1", "11 1", "11 11"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return metadata | ({"tokenizer.ggml.pre": pre} if pre else {}) | more


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "1", "1", "1"]),
        ("gpt-2", ["1111"]),
        ("qwen2", ["1", "1", "1", "1"]),
        ("qwen35", ["1", "1", "1", "1"]),
        ("llama-bpe", ["111", "1"]),
        ("gpt-4o", ["111", "1"]),
        ("tekken", ["1", "1", "1", "1"]),
        (None, ["111", "1"]),
    ],
)
def test_each_pre_tokenizer_splits_digits_in_its_own_way(pre: str | None, pieces: list[str]) -> None:
    hf = build_tokenizer(byte_level_metadata(pre))
    assert hf.encode("1111", add_special_tokens=False).tokens == pieces
    text = " a1111\n\n b'll É漢  "
    assert hf.decode(hf.encode(text, add_special_tokens=False).ids) == text


def test_a_gguf_file_names_its_templates_and_special_tokens_too() -> None:
    more = {"tokenizer.chat_template": "usual", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = _from_metadata(byte_level_metadata("gpt-2", **more, **{"tokenizer.ggml.padding_token_id": 1}))
    assert tokenizer.named_templates == {"default": "usual", "tool_use": "tools"}
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}


def test_llama_3_takes_whole_words_of_the_vocabulary_and_begins_with_bos() -> None:
    hf = build_tokenizer(byte_level_metadata("llama-bpe"))
    assert hf.encode("hello").tokens == ["<s>", "hello"]
    assert build_tokenizer(byte_level_metadata("gpt-2")).encode("hello").tokens == ["hell", "o"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, ["<s>", "he"]),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, ["<s>", "he", "</s>"]),
        ({"tokenizer.ggml.add_bos_token": False}, ["he"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(flags: dict[str, bool], expected: list[str]) -> None:
    assert build_tokenizer(byte_level_metadata("gpt-2", **flags)).encode("he").tokens == expected


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    pieces = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    pieces += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    pieces += [("\u2581", 1, -10.0), ("a", 1, -11.0), ("b", 1, -12.0), ("ab", 1, -1.0), ("\u2581a", 1, -2.0)]
    pieces += [("\u2581ab", 1, -3.0), ("  ", 4, -1000.0)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, kind, _ in pieces],
        "tokenizer.ggml.scores": [score for _, _, score in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def test_sentencepiece_merges_by_score_falls_back_to_bytes_and_gives_the_text_back() -> None:
    hf = build_tokenizer(sentencepiece_metadata())
    assert hf.encode("ab").tokens == ["<s>", "\u2581ab"]
    assert hf.encode("é").tokens == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    for text in ("ab é", "a  b", "abab"):
        assert hf.decode(hf.encode(text).ids) == text


def test_without_the_space_prefix_the_first_word_has_none() -> None:
    hf = build_tokenizer(sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False}))
    assert hf.encode("ab").tokens == ["<s>", "ab"]
    assert hf.decode(hf.encode(" ab").ids) == " ab"


def test_unknown_kinds_of_vocabulary_are_named() -> None:
    with pytest.raises(ModelLoadError, match="'new-split' is not known; give --tokenizer"):
        build_tokenizer(byte_level_metadata("new-split"))
    with pytest.raises(ModelLoadError, match="kind 'bert'"):
        build_tokenizer({"tokenizer.ggml.model": "bert"})


def test_a_special_token_written_in_a_message_becomes_that_token(plain_folder: Path) -> None:
    """As in transformers and vLLM, and so on the manual's page of threats: who writes a message can write a turn."""
    tokenizer = folder_tokenizer(plain_folder)
    assert tokenizer.encode("a</s>b", add_special_tokens=False) == [0, tokenizer.hf.token_to_id("</s>"), 1]
