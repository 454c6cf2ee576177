#!/usr/bin/env bash
# transformers 5's LlamaTokenizer and the tokenizer.json it is given cut a text that begins with a space differently.
#
# transformers 5.24.0, tokenizers 0.23.3, Python 3.11 or newer, Linux x86-64.
# One would guess: a class that is named in tokenizer_config.json reads tokenizer.json, and gives the ids that this gives.
# Seen: the class builds a tokenizer of its own around the file's vocabulary. Its prefix for a text's first word is left
# out where the text begins with a space; the file's normalizer (and SentencePiece) puts it there in any case. So " a" is
# one token for the class and two for the file. For model type mistral the same folder is read as the file says.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0' 'tokenizers==0.23.3'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

SPACE = "\u2581"
vocab = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", SPACE, "a", SPACE + "a"])}
made = tokenizers.Tokenizer(models.BPE(vocab, [(SPACE, "a")], unk_token="<unk>"))
made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
made.add_special_tokens(["<unk>", "<s>", "</s>"])


def tokens(model_type):
    folder = Path(sys.argv[1], model_type)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return tokenizer.tokenize(" a")


from_file = made.encode(" a", add_special_tokens=False).tokens
found = {model_type: tokens(model_type) for model_type in ("llama", "mistral")}
print("the file:", from_file, "by model type:", found)

assert from_file == [SPACE, SPACE + "a"]
assert found == {"llama": [SPACE + "a"], "mistral": [SPACE, SPACE + "a"]}
PYTHON
