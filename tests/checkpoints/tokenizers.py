"""The ids of a folder's tokenizer beside those of transformers: over sentences, random Unicode, special tokens.

``python -m tests.checkpoints.tokenizers FOLDER…`` prints a table of folders with a ``tokenizer.json``, each as the
model types that ``--model-type`` names (default: as its own files say).
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

from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.text.tokens.tokenizer import Tokenizer, load_tokenizer

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


@dataclass(frozen=True)
class Row:
    """How one folder's ids compare: ``equal`` of ``total`` texts, and the first text that differs."""

    name: str
    tokenizer_class: str
    equal: int
    total: int
    differs: str

    def line(self) -> str:
        """As a line of a Markdown table."""
        return f"| {self.name} | {self.tokenizer_class} | {self.equal}/{self.total} | {self.differs or '–'} |"


HEADING = "| tokenizer | class | ids equal transformers' | first difference |\n| --- | --- | --- | --- |"


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
    differing = [text for text in texts if not _same(ours, theirs, text)]
    chosen = ours.sources["class"]
    first = "" if not differing else f"{differing[0]!r:.60}"
    return Row(name, chosen, len(texts) - len(differing), len(texts), first)


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


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model-type", nargs="*", default=[None])
    options = parser.parse_args(arguments)
    print(HEADING)
    for folder in options.folders:
        for model_type in options.model_type:
            with as_model_type(folder, model_type) as copy:
                name = f"{folder.name}{f' as {model_type}' if model_type else ''}"
                print(compare(name, copy).line(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
