"""Build a ``tokenizers.Tokenizer`` from the vocabulary in a GGUF file: byte-level BPE and SentencePiece BPE."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import ModelLoadError

_KEY = "tokenizer.ggml."
_NAMES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # so the format spells it
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _CASED_TAIL
_GPT4O = _CASED.replace("{0}", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_TAIL

PreTokenizer = Callable[[], Any]


def _byte_level(*patterns: str, use_regex: bool = False, digits: bool = False) -> Any:
    """Splits by ``patterns`` one after another, then bytes; ``use_regex`` adds GPT-2's own split."""
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
"""llama.cpp's splits for files that name no pre-tokenizer."""

_PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": partial(_byte_level, *_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), partial(_byte_level, use_regex=True)),
    **dict.fromkeys(
        ("smollm", "refact", "command-r", "starcoder", "codeshell", "exaone", "minerva-7b"),
        partial(_byte_level, use_regex=True, digits=True),
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), partial(_byte_level, _QWEN2)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), partial(_byte_level, _LLAMA3)
    ),
    "qwen35": partial(_byte_level, _QWEN35),
    "tekken": partial(_byte_level, _TEKKEN),
    **dict.fromkeys(("gpt-4o", "llama4"), partial(_byte_level, _GPT4O)),
}
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")
_NFC = ("qwen2", "deepseek-r1-qwen", "qwen35")


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. Raises :class:`ModelLoadError` naming a vocabulary kind that is not known."""
    kind = metadata.get(_KEY + "model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata)
    else:
        raise ModelLoadError(f"the file's tokenizer is of kind {kind!r}; give --tokenizer with a folder or hub id")
    _add_special_tokens(tokenizer, metadata)
    _add_bos(tokenizer, metadata)
    if tokenizer.get_vocab_size() != len(metadata[_KEY + "tokens"]):
        raise ModelLoadError("the file's vocabulary names a token twice; give --tokenizer with a folder or hub id")
    return tokenizer


def special_token(metadata: Mapping[str, Any], name: str) -> str | None:
    """The text of the file's ``bos``, ``eos``, ``unknown`` … token."""
    index = metadata.get(f"{_KEY}{name}_token_id")
    return None if index is None else str(metadata[_KEY + "tokens"][index])


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The file's special tokens by the names that a ``tokenizer_config.json`` has for them."""
    found = {name: special_token(metadata, ours) for name, ours in _NAMES.items()}
    return {f"{name}_token": text for name, text in found.items() if text is not None}


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    pre = str(metadata.get(_KEY + "pre", "default"))
    if pre not in _PRE_TOKENIZERS:
        raise ModelLoadError(f"the file's pre-tokenizer {pre!r} is not known; give --tokenizer with a folder or hub id")
    vocab = {token: index for index, token in enumerate(metadata[_KEY + "tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[_KEY + "merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _IGNORE_MERGES))
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = _sentencepiece_tokens(metadata)
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, metadata[_KEY + "token_type"], metadata[_KEY + "scores"])
    unknown = metadata.get(_KEY + "unknown_token_id", 0)
    bpe = models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(_KEY + "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _sentencepiece_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The vocabulary, with user-defined runs of spaces written as SentencePiece has them (llama.cpp: plain)."""
    types = metadata[_KEY + "token_type"]
    return [
        token.replace(" ", _SPACE) if types[index] == _USER_DEFINED and token and not token.strip(" ") else token
        for index, token in enumerate(metadata[_KEY + "tokens"])
    ]


def _merges_from_scores(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """BPE merges, best first: every way to put a piece together from two others, by the piece's score."""
    merges = []
    for piece, index in vocab.items():
        if types[index] not in (_NORMAL, _USER_DEFINED):
            continue
        # llama.cpp writes -1000 for user-defined pieces; SentencePiece gives them 0, the best score.
        score = 0.0 if types[index] == _USER_DEFINED else scores[index]
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, left, right) for left, right in halves]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Make control tokens special and user-defined ones whole, under the ids that the file gives them."""
    types = metadata[_KEY + "token_type"]
    tokens = _sentencepiece_tokens(metadata) if metadata[_KEY + "model"] == "llama" else metadata[_KEY + "tokens"]
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        special = kind == _CONTROL
        add([AddedToken(tokens[i], normalized=False, special=special) for i, t in enumerate(types) if t == kind])


def _add_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Begin (and end) texts with the tokens that the file asks for."""
    kind, pre = metadata[_KEY + "model"], metadata.get(_KEY + "pre")
    begins = metadata.get(_KEY + "add_bos_token", kind == "llama" or pre in _BOS_BY_DEFAULT)
    bos = special_token(metadata, "bos") if begins else None
    eos = special_token(metadata, "eos") if metadata.get(_KEY + "add_eos_token", False) else None
    if bos is None and eos is None:
        return
    added = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    words = [word for word in (bos, "$A", eos) if word]
    pair = [word for word in (bos, "$A", eos, bos, "$B:1", eos) if word]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(words), pair=" ".join(pair), special_tokens=list(dict(added).items())
    )
