"""Build a ``tokenizers.Tokenizer`` from the vocabulary in a GGUF file: byte-pair and SentencePiece vocabularies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from engine.errors import ModelLoadError, error_line
from engine.models.reading import is_fault
from engine.text.tokens.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

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
_WHOLE = (_UNKNOWN, _CONTROL, _USER_DEFINED)
"""Kinds of tokens that are found in a text as they are written, before anything is split."""
_PHI3 = ("<unk>", "<s>", "<|endoftext|>")
"""Phi 3's special tokens that leave the white space behind them alone."""
_UTF8_DECODERS = (decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse())
_KINDS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece BPE",
    "gemma4": "BPE over UTF-8",
}
"""Vocabulary kinds that are read, as ``tokenizer.ggml.model`` names them."""


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises :class:`ModelLoadError` naming a vocabulary kind that is not known, or what is damaged.
    """
    try:
        return _build(metadata)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelLoadError(
            f"the file's vocabulary is damaged ({error_line(error)}); fetch it again, or give --tokenizer with a "
            "folder or hub id"
        ) from error


def _build(metadata: Mapping[str, Any]) -> Tokenizer:
    kind = metadata.get(_KEY + "model")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ModelLoadError(
            f"the file's tokenizer is of kind {kind!r} ({', '.join(_KINDS)} are read); "
            "give --tokenizer with a folder or hub id"
        )
    types = metadata.get(_KEY + "token_type")
    if not metadata.get(_KEY + "tokens") or (types and len(types) != len(metadata[_KEY + "tokens"])):
        raise ModelLoadError("the file has no vocabulary, or half of one; give --tokenizer with a folder or hub id")
    tokens = _tokens(metadata)
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ModelLoadError(
            f"the file's vocabulary names the token {twice!r} twice; give --tokenizer with a folder or hub id"
        )
    tokenizer = _sentencepiece_bpe(metadata, tokens) if kind == "llama" else _bpe(metadata, tokens)
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_bos(tokenizer, metadata)
    return tokenizer


def special_token(metadata: Mapping[str, Any], name: str) -> str | None:
    """The text of the file's ``bos``, ``eos``, ``unknown`` … token; None where its id is no token's."""
    index, tokens = metadata.get(f"{_KEY}{name}_token_id"), metadata.get(_KEY + "tokens") or ()
    return str(tokens[index]) if isinstance(index, int) and 0 <= index < len(tokens) else None


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The file's special tokens by the names that a ``tokenizer_config.json`` has for them."""
    found = {name: special_token(metadata, ours) for name, ours in _NAMES.items()}
    return {f"{name}_token": text for name, text in found.items() if text is not None}


def pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """How the file's byte-pair vocabulary splits. Raises :class:`ModelLoadError` naming an unknown way."""
    gemma4 = metadata[_KEY + "model"] == "gemma4"
    pre = "gemma4" if gemma4 else str(metadata.get(_KEY + "pre", "default"))
    if pre not in PRE_TOKENIZERS:
        raise ModelLoadError(f"the file's pre-tokenizer {pre!r} is not known; give --tokenizer with a folder or hub id")
    return PRE_TOKENIZERS[pre]


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The vocabulary. Tokens without a text get one of their own; user-defined runs of spaces are written as
    SentencePiece has them where spaces are U+2581 (llama.cpp: plain)."""
    tokens = list(metadata[_KEY + "tokens"])
    if not all(tokens):
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    if metadata[_KEY + "model"] == "gpt2" and pre_tokenizer(metadata).byte_level:
        return tokens
    types = _types(metadata)
    return [
        token.replace(" ", _SPACE) if types[index] == _USER_DEFINED and not token.strip(" ") else token
        for index, token in enumerate(tokens)
    ]


def _types(metadata: Mapping[str, Any]) -> Sequence[int]:
    """What each token is; all are ordinary in a file that does not say."""
    types: Sequence[int] = metadata.get(_KEY + "token_type") or [_NORMAL] * len(metadata[_KEY + "tokens"])
    return types


def _bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """Byte pairs by the file's own merges, over bytes or (Gemma 4) over UTF-8 with single bytes to fall back to."""
    pre = pre_tokenizer(metadata)
    if _KEY + "merges" not in metadata:
        raise ModelLoadError("the file's vocabulary has no merges; give --tokenizer with a folder or hub id")
    vocab = {token: index for index, token in enumerate(tokens)}
    texts = metadata[_KEY + "merges"]
    if not all(" " in merge[1:] for merge in texts):
        raise ModelLoadError("the file's vocabulary has merges of one part; give --tokenizer with a folder or hub id")
    merges = [tuple(merge.split(" ", 1)) if merge[0] != " " else _halves(merge) for merge in texts]
    options: dict[str, Any] = {"ignore_merges": pre.ignore_merges}
    if not pre.byte_level:
        options |= {"byte_fallback": True, "fuse_unk": True, "unk_token": special_token(metadata, "unknown")}
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    except Exception:  # noqa: BLE001 - the library raises plain Exception for a merge of what the vocabulary lacks
        known = [(a, b) for a, b in merges if a in vocab and b in vocab and a + b in vocab]
        tokenizer = Tokenizer(models.BPE(vocab, known, **options))
    if (split := pre.build()) is not None:
        tokenizer.pre_tokenizer = split
    if pre.byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Sequence(list(_UTF8_DECODERS))
    if pre.nfc or not pre.byte_level:
        tokenizer.normalizer = normalizers.NFC() if pre.nfc else normalizers.Replace(" ", _SPACE)
    return tokenizer


def _halves(merge: str) -> tuple[str, str]:
    """The two pieces of a merge whose first begins with a space."""
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    if metadata.get(_KEY + "remove_extra_whitespaces") or metadata.get(_KEY + "precompiled_charsmap"):
        raise ModelLoadError(
            "the file's vocabulary rewrites texts (remove_extra_whitespaces, precompiled_charsmap), which is not "
            "known for its kind; give --tokenizer with a folder or hub id"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges_from_scores(vocab, _types(metadata), metadata[_KEY + "scores"])
    unknown = metadata.get(_KEY + "unknown_token_id", 0)
    bpe = models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    back: list[Any] = list(_UTF8_DECODERS)
    if metadata.get(_KEY + "add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
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


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Make control tokens special and user-defined ones whole, under the ids that the file gives them."""
    types = _types(metadata)
    # Phi 3's tokens swallow the white space behind them, which the format has no field for.
    strips = metadata.get("general.architecture") == "phi3" and metadata[_KEY + "model"] == "llama"
    added: dict[bool, list[AddedToken]] = {True: [], False: []}
    for index, kind in enumerate(types):
        if kind in _WHOLE:
            text, special = tokens[index], kind != _USER_DEFINED
            rstrip = strips and text not in _PHI3
            added[special].append(AddedToken(text, normalized=False, special=special, rstrip=rstrip))
    tokenizer.add_special_tokens(added[True])
    tokenizer.add_tokens(added[False])


def _add_bos(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Begin (and end) texts with the tokens that the file asks for."""
    kind = metadata[_KEY + "model"]
    begins = metadata.get(_KEY + "add_bos_token", kind == "llama" or pre_tokenizer(metadata).begins)
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
