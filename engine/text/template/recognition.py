"""Recognising the format in which a model writes, by its chat template and its tokens."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A format that can be recognised.

    ``templates`` are alternatives, each a tuple of texts that all occur in the template. ``vocab`` are added tokens,
    all of which the model has.
    """

    templates: tuple[tuple[str, ...], ...] = ()
    vocab: frozenset[str] = frozenset()

    def in_template(self, template: str) -> bool:
        """Whether a chat template uses the format."""
        return any(all(text in template for text in texts) for texts in self.templates)

    def in_vocab(self, vocab: Collection[str]) -> bool:
        """Whether a model's added tokens include those of the format."""
        return bool(self.vocab) and self.vocab.issubset(vocab)
