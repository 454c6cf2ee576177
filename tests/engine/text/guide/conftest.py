"""A real tokenizer, without a model."""

from pathlib import Path

import pytest
import tokenizers

from engine.text.tokens.tokenizer import Tokenizer
from tests import tiny_models


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(folder, smollm2_gguf)
    return Tokenizer(
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), named_tokens={"eos_token": "<|im_end|>"}
    )
