"""Seams of llguidance, tokenizers, huggingface_hub and tqdm."""

from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.canary.probe import Seam, expect, named, takes

METHODS = (
    *("consume_tokens", "validate_tokens", "deep_copy", "reset", "get_error", "is_error", "is_accepting", "is_stopped"),
    *("unsafe_compute_mask_ptr", "compute_bitmask", "grammar_from_lark", "grammar_from_json_schema"),
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token for each byte, an end and a mark that is no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({char: place for place, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    made.add_tokens([tokenizers.AddedToken("<call>", special=False, normalized=False)])
    return made


def matcher_of(lark: str) -> tuple[Any, Any, tokenizers.Tokenizer]:
    from llguidance import LLMatcher, LLTokenizer

    hf = byte_tokenizer()
    tokens = LLTokenizer(hf.to_str(), n_vocab=320, eos_token=[256])
    return LLMatcher(tokens, LLMatcher.grammar_from_lark(lark), log_level=0), tokens, hf


def masks_and_ends() -> None:
    matcher, _, hf = matcher_of('start: "ab"')
    expect(not matcher.is_error(), f"a grammar is refused: {matcher.get_error()}")
    words = np.zeros(10, np.int32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    a, b = hf.token_to_id("a"), hf.token_to_id("b")
    allowed = [place for place in range(320) if int(words[place // 32]) >> (place % 32) & 1]
    expect(allowed == [a], f"the mask allows {allowed}, and not {a} alone: bits are laid out otherwise")
    expect(matcher.validate_tokens([a, b]) == 2, "validate_tokens does not count")
    copy = matcher.deep_copy()
    expect(matcher.consume_tokens([a, b]), "consume_tokens gives no True")
    expect(matcher.is_accepting() and matcher.is_stopped(), "a grammar at its end neither accepts nor stops")
    expect(not copy.is_accepting(), "a copy goes along")
    matcher.reset()
    expect(matcher.validate_tokens([a]) == 1, "reset does not begin anew")


def marks_are_special() -> None:
    matcher, tokens, hf = matcher_of("start: <[257]> /x+/")
    call = hf.token_to_id("<call>")
    expect(
        (call, tokens.is_special_token(call)) == (257, True), "an added token is text now, which Lark names by its id"
    )
    expect(matcher.consume_tokens([257, hf.token_to_id("x")]), "a token by its id is not matched")
    expect(len(tokens.greedy_tokenize("<call>")) == 6, "greedy_tokenize does not spell an added token")


def schema_white_space() -> None:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema({"type": "object"}, defaults={"whitespace_flexible": False})
    expect("whitespace_flexible" in str(grammar), "defaults are not kept in the grammar")


def files_of_a_tokenizer() -> None:
    hf = byte_tokenizer()
    again = tokenizers.Tokenizer.from_str(hf.to_str())
    expect(
        again.encode("ab<call>", add_special_tokens=False).ids == hf.encode("ab<call>").ids, "to_str loses something"
    )
    added = again.get_added_tokens_decoder()
    expect({token.content for token in added.values()} == {"<end>", "<call>"}, "added tokens are told otherwise")
    expect(not added[257].special, "an added token is special now")
    again.encode_special_tokens = True
    expect(len(again.encode("<end>", add_special_tokens=False).ids) == 5, "encode_special_tokens does nothing")


TEXT = (
    Seam(
        "llguidance",
        "LLMatcher's methods",
        "engine/text/guide/grammar.py",
        named("llguidance", *(f"LLMatcher.{m}" for m in METHODS)),
    ),
    Seam("llguidance", "masks and ends", "engine/text/guide/grammar.py", masks_and_ends),
    Seam("llguidance", "added tokens", "engine/text/guide/grammar.py", marks_are_special),
    Seam("llguidance", "defaults of a schema", "engine/text/guide/grammar.py", schema_white_space),
    Seam("llguidance", "GBNF", "engine/text/guide/grammar.py", named("llguidance.gbnf_to_lark", "any_to_lark")),
    Seam("tokenizers", "to_str and added tokens", "engine/text/tokens/tokenizer.py", files_of_a_tokenizer),
    Seam(
        "huggingface-hub",
        "snapshot_download",
        "engine/models/download.py",
        takes(
            "huggingface_hub",
            "snapshot_download",
            "repo_id",
            keywords=("revision", "cache_dir", "allow_patterns", "tqdm_class"),
        ),
    ),
    Seam(
        "huggingface-hub",
        "its errors",
        "engine/models/download.py",
        named(
            "huggingface_hub.errors",
            *("GatedRepoError", "HfHubHTTPError", "RepositoryNotFoundError", "RevisionNotFoundError"),
        ),
    ),
    Seam(
        "huggingface-hub",
        "HfApi.model_info",
        "engine/models/download.py",
        takes("huggingface_hub", "HfApi.model_info", "repo_id", keywords=("revision",)),
    ),
    Seam(
        "tqdm",
        "bars",
        "vm_magic/show/progress.py",
        takes("tqdm", "tqdm.__init__", keywords=("total", "unit", "unit_scale", "desc", "bar_format")),
    ),
    Seam("tqdm", "tqdm.auto", "engine/batch/map.py", named("tqdm.auto", "tqdm")),
)
