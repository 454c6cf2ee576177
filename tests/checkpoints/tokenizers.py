"""The ids of a folder's tokenizer beside those of transformers: over sentences, random Unicode, special tokens.

``python -m tests.checkpoints.tokenizers`` prints the table for the packages of :mod:`tokenizer_packages` (fetching
needs ``VM_MAGIC_TEST_DOWNLOADS=1``), ``… FOLDER`` for folders. Tiny tokenizers are made here too.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.text.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints.tokenizer_packages import FOLDERS, package_folder

SENTENCES = (
    "",
    "Hello, world!",
    "I'll don't WE'RE they'd O'Brien's",
    "  two  spaces\n\n\nand lines\t\tand tabs   \n ",
    "12345 + 6 = 12351; 3.14, 1,000,000 and ١٢٣ Ⅷ ½",
    "é漢字🙂ก็ مرحبا бъг ᚠᛇᚻ 한국어 かな カナ",
    "e\u0301 a\u0300\u0301 \u0958 ﬁ ㎏ Å",
    "def f(x):\n    return x ** 2  # ok\r\n",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \u200b\ufeff\u00a0\u3000 end",
    "<|im_start|>user\nhi<|im_end|>\n<s> [INST] hi [/INST] </s><unk><bos><pad>",
    "HTTPServer camelCase SCREAMING_CASE ÀÉÎ ǅ",
    "\x00\x01\x1f\x7f\x85 \u2028\u2029",
    "▁under ▁▁two Ġnot Ċ",
)
_ALPHABETS = (
    "abcdefgXYZ'-_ ",
    "0123456789.,+ ",
    " \t\n\r\u00a0\u3000",
    "漢字中文日本語かなカナ。、！",
    "مرحبا بالعالم ١٢٣ ",
    "नमस्ते दुनिया กำลัง ",
    "🙂👩👧\u200d\ufe0f🏽🏳🌈🇩🇪",
    "aeo\u0300\u0301\u0323\u0308ßſıǅ",
    "\x00\x07\x1b\x7f\x85\ufeff\u200b\u2028",
    "{}[]()<>|/\\#@!?;:\"'`~^$%&*=+",
    "𝒜𝓑𐍈𒀀ⅧⅨ½²㋿ﬁ㎏",
)
_CORPUS = [*SENTENCES * 3, *["the hello world 1111 22 get"] * 9]
CLASSES = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizerFast", "Qwen2Tokenizer"),
    *("Qwen3_5Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "GPTNeoXTokenizer", "CohereTokenizerFast"),
    *("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "NoSuchTokenizer", None),
)
"""Classes that folders of causal models name, None: no file names one."""
MODEL_TYPES = (
    *(None, "llama", "mistral", "qwen2", "qwen3", "qwen3_5", "gemma3_text", "gpt_neox", "olmo2", "cohere2"),
    *("phi3", "phi", "granite", "minimax_m2", "no_such_model"),
)


@dataclass(frozen=True)
class Row:
    """How one folder's ids compare: ``equal`` of ``total`` texts, and the first text that differs.

    Left out are ``beyond`` texts in which transformers finds a special token that it added behind the vocabulary.
    """

    name: str
    tokenizer_class: str
    equal: int
    total: int
    beyond: int
    differs: str

    def line(self) -> str:
        """As a line of a Markdown table."""
        equal = f"{self.equal}/{self.total}"
        return f"| {self.name} | {self.tokenizer_class} | {equal} | {self.beyond} | {self.differs or '–'} |"


HEADING = "| tokenizer | class | ids equal transformers' | beyond | first difference |\n| --- | --- | --- | --- | --- |"


def random_texts(count: int, special: Sequence[str] = (), seed: int = 0) -> list[str]:
    """``count`` texts of mixed scripts, spaces, marks, controls and ``special`` tokens' texts, the same for a seed."""
    rng = random.Random(seed)
    return [_random_text(rng, special) for _ in range(count)]


def _random_text(rng: random.Random, special: Sequence[str]) -> str:
    pieces = []
    for _ in range(rng.randint(1, 12)):
        if special and rng.random() < 0.15:
            pieces.append(rng.choice(special))
        elif rng.random() < 0.1:
            pieces.append(chr(rng.choice((rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x2FA20)))))
        else:
            pieces.append("".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randint(1, 9))))
        pieces.append(rng.choice(("", " ", "", "\n", "  ")))
    return "".join(pieces)


def our_tokenizer(folder: Path) -> Tokenizer:
    """As the engine loads it."""
    return load_tokenizer(ResolvedModel("compared", folder, "folder"), EngineArgs("compared"))


def their_tokenizer(folder: Path) -> Any:
    """As transformers loads it, without executing anything of the folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def compare(name: str, folder: Path, random_count: int = 300, seed: int = 0) -> Row:
    """The ids of both, with and without special tokens added, and the texts that come back."""
    ours, theirs = our_tokenizer(folder), their_tokenizer(folder)
    special = sorted(ours.special_tokens)[:40]
    texts = [*SENTENCES, *(f"a {token} b{token}c" for token in special), *random_texts(random_count, special, seed)]
    vocabulary = set(ours.hf.get_vocab(with_added_tokens=True).values())
    known = [text for text in texts if vocabulary.issuperset(theirs.encode(text))]
    differing = [text for text in known if not _same(ours, theirs, text)]
    chosen = ours.sources["class"]
    first = "" if not differing else f"{differing[0]!r:.60}"
    beyond = len(texts) - len(known)
    return Row(name, chosen, len(known) - len(differing), len(known), beyond, first)


def _same(ours: Tokenizer, theirs: Any, text: str) -> bool:
    ids = ours.encode(text)
    if ids != theirs.encode(text):
        return False
    if ours.encode(text, add_special_tokens=False) != theirs.encode(text, add_special_tokens=False):
        return False
    return all(ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip) for skip in (False, True))


@contextmanager
def as_model_type(folder: Path, model_type: str | None, **tokenizer: Any) -> Iterator[Path]:
    """A copy of the tokenizer's files with a ``config.json`` of ``model_type``, and more in its own config."""
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made)
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model"):
                shutil.copy(file, copy)
        if model_type is not None:
            (copy / "config.json").write_text(json.dumps({"model_type": model_type}))
        if tokenizer:
            path = copy / "tokenizer_config.json"
            config = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(config | tokenizer))
        yield copy


def byte_level_tokenizer(ignore_merges: bool = False, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """GPT-2's kind: 500 tokens, all bytes and what the sentences have most."""
    hf = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<unk>"],
        show_progress=False,
    )
    hf.train_from_iterator(_CORPUS, trainer)
    return hf


def sentencepiece_tokenizer() -> tokenizers.Tokenizer:
    """Llama's kind: 500 tokens with bytes to fall back to, and the space prefix in the normalizer."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    corpus = [text for text in _CORPUS if "\x00" not in text]
    trainer = trainers.BpeTrainer(
        vocab_size=500, min_frequency=1, limit_alphabet=200, special_tokens=pieces, show_progress=False
    )
    hf.train_from_iterator(corpus, trainer)
    made = json.loads(hf.to_str())
    made["added_tokens"] = made["added_tokens"][: len(special)]
    made["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    hf = tokenizers.Tokenizer.from_str(json.dumps(made))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hf.decoder = decoders.Sequence(steps)
    return hf


def random_folder(folder: Path, seed: int) -> None:
    """Write tokenizer files whose classes, flags and special tokens are drawn at random, each as real files have it."""
    rng = random.Random(seed)
    byte_level = rng.random() < 0.5
    hf = byte_level_tokenizer(rng.random() < 0.5, rng.random() < 0.3) if byte_level else sentencepiece_tokenizer()
    added = [*rng.sample(("<|endoftext|>", "<bos>", "<BOS_TOKEN>", "<|im_start|>", "<x>"), k=3), "<s>", "</s>"]
    for text in added:
        hf.add_tokens([tokenizers.AddedToken(text, special=rng.random() < 0.6, **_flags(rng))])
    bos = hf.token_to_id("<s>")
    if rng.random() < 0.5:
        hf.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", bos)])
    hf.save(str(folder / "tokenizer.json"))
    config = _random_config(rng, hf, [*added, "the"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if (model_type := rng.choice(MODEL_TYPES)) is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if rng.random() < 0.3:
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": _random_token(rng, added)}))
    if rng.random() < 0.2:
        (folder / "added_tokens.json").write_text(json.dumps({"<extra>": hf.get_vocab_size()}))


def _random_config(rng: random.Random, hf: tokenizers.Tokenizer, texts: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if (name := rng.choice(CLASSES)) is not None:
        config["tokenizer_class"] = name
    for key in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"):
        if rng.random() < 0.6:
            config[key] = _random_token(rng, texts) if rng.random() < 0.8 else None
    if rng.random() < 0.3:
        config["additional_special_tokens"] = [_random_token(rng, texts) for _ in range(2)]
    if rng.random() < 0.2:
        config["extra_special_tokens"] = {"image_token": rng.choice(texts)}
    if rng.random() < 0.5:
        config["added_tokens_decoder"] = {
            str(index): {"content": token.content, "special": rng.random() < 0.6, **_flags(rng)}
            for index, token in hf.get_added_tokens_decoder().items()
        }
    for key in ("legacy", "add_prefix_space"):
        if rng.random() < 0.3:
            config[key] = rng.choice((True, False, None))
    for key in ("add_bos_token", "add_eos_token", "split_special_tokens", "clean_up_tokenization_spaces"):
        if rng.random() < 0.2:
            config[key] = rng.random() < 0.5
    return config


def _random_token(rng: random.Random, texts: Sequence[str]) -> str | dict[str, Any]:
    text = rng.choice(texts)
    return text if rng.random() < 0.6 else {"__type": "AddedToken", "content": text, "special": True, **_flags(rng)}


def _flags(rng: random.Random) -> dict[str, bool]:
    return {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "normalized", "single_word")}


def gguf_metadata(folder: Path, kind: str, pre: str) -> dict[str, Any]:
    """What llama.cpp's converter would write for ``folder``'s byte-pair tokenizer."""
    ours = our_tokenizer(folder)
    saved = json.loads(ours.hf.to_str())
    texts = {index: text for text, index in ours.hf.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: 3 if token["special"] else 4 for token in saved["added_tokens"]}
    types = [added.get(index, 1 if index in texts else 5) for index in range(max(texts) + 1)]
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(len(types))]
    tokens = [token.replace("\u2581", " ") if kind == 4 else token for token, kind in zip(tokens, types, strict=True)]
    prefix = "tokenizer.ggml."
    metadata = {
        f"{prefix}model": kind,
        f"{prefix}pre": pre,
        f"{prefix}tokens": tokens,
        f"{prefix}token_type": types,
        f"{prefix}merges": [" ".join(merge) for merge in saved["model"]["merges"]],
        f"{prefix}add_bos_token": bool(ours.begins_with),
    }
    if ours.begins_with:
        metadata[f"{prefix}bos_token_id"] = ours.begins_with[0]
    if (unknown := saved["model"]["unk_token"]) is not None:
        metadata[f"{prefix}unknown_token_id"] = ours.hf.token_to_id(unknown)
    return metadata


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    print(HEADING)
    for folder in options.folders:
        print(compare(folder.name, folder).line(), flush=True)
    for package in () if options.folders else FOLDERS:
        for model_type in package.model_types:
            with as_model_type(package_folder(package), model_type) as copy:
                name = f"{package.requirement}{f' as {model_type}' if model_type else ''}"
                print(compare(name, copy).line(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
