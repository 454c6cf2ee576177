"""By what a model's files show in which format it writes."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A format that chat templates show.

    ``templates`` are alternatives: texts that stand in a template together. ``vocab`` are tokens that together
    show the format where no template does.
    """

    templates: tuple[tuple[str, ...], ...] = ()
    vocab: frozenset[str] = frozenset()

    def in_template(self, template: str) -> bool:
        """Whether a chat template shows the format."""
        return any(all(text in template for text in texts) for texts in self.templates)

    def in_vocab(self, vocab: Collection[str]) -> bool:
        """Whether a model's added tokens show the format."""
        return bool(self.vocab) and self.vocab.issubset(vocab)
