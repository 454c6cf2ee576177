"""One tokenizer for everything: encoding, decoding, special tokens and the chat template's source.

From a folder (:mod:`engine.text.tokens.folder_tokenizer`) or a GGUF file through ``tokenizers``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from engine.errors import GenerationError, ModelLoadError
from engine.format.text import REPLACEMENT
from engine.models.local import ResolvedModel
from engine.models.resolve import resolve
from engine.models.weight_format import end_token_ids
from engine.params.engine_args import EngineArgs
from engine.text.tokens.folder_tokenizer import read_folder
from engine.text.tokens.long_texts import LongestToken, byte_alphabet, check_text, decode, encode, longest_token
from engine.text.tokens.text_stream import TextStream

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once: nothing in it changes.

    ``named_tokens`` are special tokens by their names in a config (``bos_token``, ``eos_token`` …). ``named_templates``
    are the model's chat templates, Jinja sources by name; the only one is called ``default``. ``config`` is what its
    files say, as in ``tokenizer_config.json``. ``sources`` says from which file each came and what was made of it:
    ``tokenizer``, ``class``, ``special_tokens``, and ``template NAME`` for each template.
    """

    def __init__(
        self,
        hf: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        named_tokens: Mapping[str, str] = MappingProxyType({}),
        named_templates: Mapping[str, str] = MappingProxyType({}),
        config: Mapping[str, Any] = MappingProxyType({}),
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        hf.no_truncation()
        hf.no_padding()
        self.hf = hf
        self.named_tokens = named_tokens
        self.named_templates = named_templates
        self.config = config
        self.sources = sources
        own = hf.token_to_id(self.eos_token) if self.eos_token else None
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if own is None else {own})
        self._token_texts: dict[int, str] = {}

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a sequence, None where no file names one."""
        return self.named_tokens.get("eos_token")

    @cached_property
    def begins_with(self) -> list[int]:
        """What is put before every text that is encoded with special tokens: BOS, or nothing."""
        return self._around[0]

    @cached_property
    def ends_with(self) -> list[int]:
        """What is put behind every such text."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        bare, whole = self.encode("a", add_special_tokens=False), self.encode("a")
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:start], whole[start + len(bare) :]

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.hf.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that ``skip_special_tokens`` leaves out."""
        return frozenset(i for i, token in self.hf.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts of these tokens."""
        return frozenset(token.content for token in self.hf.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.hf.get_added_tokens_decoder())

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Tokens and their text to decode another behind: decoders strip a leading space from a text's first token."""
        before = self.encode("a", add_special_tokens=False)
        return before, self.decode(before)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it become their ids.

        Raises RequestError for half of a surrogate pair, which JSON can carry and UTF-8 cannot, and where the tokenizer
        fails. A long text lets other threads run, and can be interrupted.
        """
        return encode(self.hf, text, add_special_tokens)

    def check_text(self, text: str, max_tokens: int | None, limit: int) -> None:
        """Raise ContextLengthError, before anything is tokenized, for a text far too long for ``limit`` tokens.

        None is refused that would fit; ``max_tokens`` are only told.
        """
        if len(text) > limit:
            check_text(self._longest_token, text, max_tokens, limit)

    @cached_property
    def _longest_token(self) -> LongestToken | None:
        return longest_token(self.hf)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``. Raises GenerationError where the tokenizer fails."""
        return decode(self.hf, list(token_ids), skip_special_tokens)

    def decode_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one sequence that grows token by token."""
        return TextStream(self, skip_special_tokens=skip_special_tokens, join_special_tokens=not skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text that it does not begin; bytes that are not a whole character show as U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            try:
                text = self._token_text(token_id)
            except GenerationError:  # one of many alternatives that a log-probability names
                text = REPLACEMENT
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, which may be a part of a character's."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        written = self.hf.id_to_token(token_id) or ""
        if _BYTE_TOKEN.fullmatch(written):
            return bytes.fromhex(written[3:5])
        alphabet = byte_alphabet()
        return bytes(alphabet[char] for char in written) if alphabet.keys() >= set(written) else text.encode()

    def _token_text(self, token_id: int) -> str:
        alone = self.decode([token_id], skip_special_tokens=False)
        if token_id in self._added_ids:
            return alone
        before, known = self._anchor
        whole = self.decode([*before, token_id], skip_special_tokens=False)
        return whole.removeprefix(known) if known and whole.startswith(known) else alone


def load_tokenizer(resolved: ResolvedModel, args: EngineArgs) -> Tokenizer:
    """The tokenizer of ``resolved``, or the one that ``--tokenizer`` names. Raises :class:`ModelLoadError`.

    The end tokens are those of the model's own files as well, unless ``--override-generation-config`` names any.
    """
    source = resolved
    if args.tokenizer is not None:
        source = resolve(args.tokenizer, part="tokenizer")
    files = source.format.tokenizer_source(source.path)
    tokenizer = _from_folder(files.folder) if files.metadata is None else _from_metadata(files.metadata)
    named = end_token_ids(args.override_generation_config)
    for model in () if named else {source, resolved}:
        tokenizer.eos_token_ids |= model.format.end_token_ids(model.path)
    return tokenizer


def _from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    from engine.text.tokens.gguf_tokenizer import build_tokenizer, named_tokens

    prefix = "tokenizer.chat_template"
    templates = {key.removeprefix(f"{prefix}."): text for key, text in metadata.items() if key.startswith(f"{prefix}.")}
    if prefix in metadata:
        templates["default"] = metadata[prefix]
    if not all(isinstance(text, str) for text in templates.values()):
        raise ModelLoadError(f"the file's {prefix} is no text; fetch the file again")
    hf, named = build_tokenizer(metadata), named_tokens(metadata)
    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    sources = {
        "tokenizer": "the GGUF file's metadata",
        "class": f"tokenizer.ggml.model {kind}, tokenizer.ggml.pre {pre}",
        "special_tokens": "the GGUF file's metadata",
        **{f"template {name}": "the GGUF file's metadata" for name in templates},
    }
    return Tokenizer(hf, named_tokens=named, named_templates=templates, config=named, sources=sources)


def _from_folder(folder: Path) -> Tokenizer:
    read = read_folder(folder)
    return Tokenizer(
        read.hf,
        named_tokens=read.named_tokens,
        named_templates=read.named_templates,
        config=read.config,
        sources=read.sources,
    )
