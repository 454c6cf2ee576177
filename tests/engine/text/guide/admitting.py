"""Whether a grammar admits a text."""

from engine.text.guide.grammar import GrammarCompiler
from engine.text.tokens.tokenizer import Tokenizer


def admits(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether ``grammar`` takes ``text`` token by token and may end behind it."""
    matcher = compiler.compile(grammar)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if not matcher.accepts(token) or not matcher.consume(token):
            return False
    return matcher.complete or matcher.accepts(min(tokenizer.eos_token_ids))
