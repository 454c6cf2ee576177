"""Tells a message from broken code, for cells that are not Python. In doubt it is code.

What counts: in code, two words hardly ever stand beside each other without a sign or a keyword between them. Such pairs
speak for a text; how a line begins, and signs that texts rarely have, speak for code. Names of no human language are
known here but a few English words, for lines that begin with a word that is Python's too.
"""

import itertools
import keyword
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

Defined = Callable[[str], bool]
"""Whether a name means something in the notebook."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FUNCTION_WORDS = _set(
    "a about again an are at can did do does have he her his how i it its me more my of on our please she should so "
    "that the their them there these they this those to us was we what when where which who why will would you your"
)
_ASKING = _set(
    "calculate compare compute could create define describe explain find fix generate give how make please refactor "
    "rewrite show solve summarise summarize tell translate what when where which who why would write"
)
_STARTS_NOTHING = frozenset(("in", "is", "and", "or", "as"))
"""Keywords with which no statement begins."""
_STAND_ALONE = frozenset(("try", "else", "finally", "pass", "break", "continue"))
"""Keywords that no word follows."""
_NAMES_FOLLOW = frozenset(("import", "from", "del", "global", "nonlocal"))
_NEVER_TEXT = frozenset(("def", "elif", "async", "lambda"))
_KEYWORDS = frozenset(keyword.kwlist) | {"print", "exec"}
_LOWER_KEYWORDS = {word.lower() for word in _KEYWORDS}
_SLIPS = {"".join(sorted(word)) for word in _KEYWORDS if len(word) > 2}
_LONG_KEYWORDS = {word for word in _KEYWORDS if len(word) > 4} | {"from"}
_SHORT_SLIPS = {word[:i] + word[i + 1 :] for word in _LONG_KEYWORDS for i in range(len(word))} - _set(
    "asset beak fro lass pint rise sync wait wile"
)
"""Keywords in which a letter is missing, without those that are words."""

_BULLET = re.compile(r"^(?:\d+[.)]|[-*•–])\s+(?=[^\W\d_])")
_ASSIGNMENT = re.compile(
    r"^\*?[\w.]+(?:\[[^\]]*\])?(?:\s*,\s*\*?[\w.]+)*\s*(?::\s*[\w\[\], .|]+)?\s*(?:[-+*/%&|^@]|//|\*\*|<<|>>|:)?=(?!=)"
)
_CALL = re.compile(r"^(?:await\s+)?[\w.]+[(\[]")
_OTHER_CODE = re.compile(r"""^(?:[rbfu]{0,2}(?:\"{3}|'{3}|\"{2}\w|'{2}\w)|\.\w+[(\s]|[)\]}]|[@;\\])""", re.IGNORECASE)
_DECLARATION = re.compile(r"^[\w<>\[\]*&]+ \w+\s*(?:=(?!=)|;|\{)")
_SIGNS = re.compile(r"\w[(\[]|[=<>{}\\@^|&~*+]|_|;\s*$")
"""What texts rarely have outside of quotes."""
_WORD = re.compile(r"[^\W\d_]\w*(?:['’][^\W\d_]+)*|\d[\d.,]*")
_QUOTED = re.compile(r"\"[^\"\n]*\"|(?<!\w)'[^'\n]*'(?!\w)|`[^`\n]*`|\{\{.*?\}\}")
_LINK = re.compile(r"https?://\S+")
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)]*$")
_QUESTION = re.compile(r"[?？]!?[\"'”’»)]*$")
_CALLING_OUT = re.compile(r"^[^\W\d_]{2}[\w'’ ,.;-]*!+$")
_FULL_STOP = re.compile(r"[。！？]$")


@dataclass(frozen=True)
class _Line:
    """What of a line was looked at. ``pairs`` are words side by side that are no keywords; ``spaceless`` counts the
    letters of scripts that are written without spaces; quotes, links and templates are left out."""

    text: str
    words: tuple[str, ...]
    pairs: int
    signs: bool
    spaceless: int

    @property
    def first(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def question(self) -> bool:
        return _QUESTION.search(self.text) is not None

    @property
    def ended(self) -> bool:
        return _SENTENCE_END.search(self.text) is not None

    @property
    def has_function_word(self) -> bool:
        return any(word.lower() in _FUNCTION_WORDS for word in self.words)

    @property
    def capital(self) -> bool:
        """Whether it begins as sentences do, Explain, and names of constants do not."""
        return self.first[:1].isupper() and not self.first[1:2].isupper()


def is_prose(source: str, defined: Defined) -> bool:
    """Whether ``source``, which is not Python, is written like a text: its first line that tells decides."""
    verdicts = (_verdict(line, defined) for line in _lines(source))
    return next((verdict for verdict in verdicts if verdict is not None), False)


def is_sentence(line: str) -> bool:
    """Whether a line that begins like a command is a sentence all the same: ``who are you``."""
    seen = _seen(line)
    if seen.signs or re.search(r"(?<!\S)-\w|\S/\S|\w\.\w", line) or len(seen.words) < 3:
        return len(seen.words) > 3 and seen.question and seen.has_function_word
    return seen.ended or any(word in _FUNCTION_WORDS for word in seen.words[1:])


def is_unknown_word(text: str, defined: Defined) -> bool:
    """Whether ``text`` is a word that code is not written in: Python takes 你好 and 用Python写一个函数 for names.

    Latin letters and Greek ones (α, Δ) alone are left to Python, and so is what has an underscore or a digit.
    """
    if not text.isidentifier() or text.isascii() or len(text) < 2 or defined(text):
        return False
    if "_" in text or any(letter.isdigit() for letter in text):
        return False
    codes = sum(unicodedata.name(letter, "").startswith(("LATIN", "GREEK")) for letter in text)
    return codes == 0 or sum(map(_is_spaceless, text)) > 3


def may_be_text(source: str) -> bool:
    """Whether a cell that Python could not read may have been meant as text: for a hint, so that a guess will do."""
    line = next(iter(_lines(source)), None)
    if line is None or _ASSIGNMENT.match(line) or _CALL.match(line):
        return False
    seen = _seen(line)
    return seen.pairs > 0 or seen.spaceless > 1 or (not seen.signs and len(seen.words) > 1)


def _lines(source: str) -> list[str]:
    """Lines that tell something, without marks of lists and accents that stand alone."""
    rows = (row.strip() for row in source.splitlines())
    return [
        _BULLET.sub("", "".join(c for c in row if not unicodedata.category(c).startswith("M")))
        for row in rows
        if row and not row.startswith(("#", "```"))
    ]


def _seen(line: str) -> _Line:
    text = _QUOTED.sub(' "" ', _LINK.sub("link", line))
    if text.replace('""', "").count('"') % 2:  # a quote that is not closed: the rest is a string
        text = text[: text.rindex('"')]
    found = list(_WORD.finditer(text))
    words = tuple(one[0] for one in found)
    pairs = 0
    for left, right in itertools.pairwise(found):
        beside = not text[left.end() : right.start()].strip(" \t") and left.end() < right.start()
        pairs += beside and _is_pair(left[0], right[0], left.start() == found[0].start())
    signs = _SIGNS.search(text.replace('""', "")) is not None
    return _Line(line, words, pairs, signs, sum(map(_is_spaceless, text)))


def _is_pair(left: str, right: str, at_start: bool) -> bool:
    if right in _KEYWORDS or left in _KEYWORDS or (at_start and left.lower() in _LOWER_KEYWORDS):
        return False
    if left[0].isdigit() and right[0].isdigit():
        return False
    return max(len(left), len(right)) > 1


def _is_slip(word: str) -> bool:
    """Whether ``word`` is a keyword with letters that changed places, or with one too few or twice."""
    undoubled = re.sub(r"(.)\1", r"\1", word)
    return (
        "".join(sorted(word)) in _SLIPS or word in _SHORT_SLIPS or (undoubled != word and undoubled in _LONG_KEYWORDS)
    )


def _is_spaceless(letter: str) -> bool:
    if letter.isascii() or not letter.isalpha():
        return False
    return unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


def _verdict(line: str, defined: Defined) -> bool | None:
    """True for a text, False for code, None for a line that may be either."""
    seen = _seen(line)
    if _FULL_STOP.search(line) and seen.spaceless > 1:
        return True
    if _ASSIGNMENT.match(line) or _CALL.match(line) or _OTHER_CODE.match(line) or not seen.words:
        return False
    head = re.match(r"^[\w.]+(?= [(\[])", line)
    if head and defined(head[0].partition(".")[0]):
        return False
    if _CALLING_OUT.match(line):
        return True
    if seen.first.lower() in _LOWER_KEYWORDS or _is_slip(seen.first):
        return _after_keyword(seen)
    if seen.spaceless > 1 and _is_spaceless(line[0]):
        return not seen.signs or seen.spaceless > 2
    if not line[0].isalpha() and line[0] not in "¿¡«“„‘":
        return seen.pairs > 2 or (seen.pairs > 1 and seen.ended)
    return _with_signs(seen, defined) if seen.signs else _without_signs(seen, defined)


def _after_keyword(seen: _Line) -> bool:
    """A line that begins with a word that is Python's too: ``for example, …``, ``import duties rose, why?``"""
    first = seen.first.lower()
    told = seen.has_function_word
    if first in _NEVER_TEXT and not seen.capital:
        return False
    if first in _STARTS_NOTHING:
        return seen.pairs > seen.signs or (seen.question and len(seen.words) > 1)
    if seen.signs:
        return seen.pairs > 3 and told
    if first in _NAMES_FOLLOW:
        return (seen.pairs > 1 and (told or seen.question)) or (
            seen.pairs > 0 and seen.question and len(seen.words) > 3
        )
    if seen.question and len(seen.words) > 2:
        return True
    if first in _STAND_ALONE:
        pairs = seen.pairs + (len(seen.words) > 1 and seen.words[1] not in _KEYWORDS)
        return pairs > 1 or (pairs == 1 and (told or seen.ended))
    if seen.pairs > 2:
        return True
    if seen.pairs == 2:
        return told or seen.ended or seen.capital
    return seen.pairs == 1 and told and seen.capital


def _without_signs(seen: _Line, defined: Defined) -> bool | None:
    """A line of words, numbers and marks of sentences."""
    if seen.pairs == 0:
        if seen.question and len(seen.words) > 1 and not defined(seen.first):
            return True
        return None
    if defined(seen.first):
        return seen.pairs > 1
    if len(seen.words) == 2:
        return all(len(word) > 1 and not word[0].isdigit() for word in seen.words)
    return True


def _with_signs(seen: _Line, defined: Defined) -> bool:
    """A line of words with signs of code or of arithmetic among them: ``Solve 3*x = 6 for x``."""
    if _DECLARATION.match(seen.text) or seen.text.endswith((";", "{")):
        return False
    if defined(seen.first):
        return seen.pairs > 2
    if seen.pairs > 1:
        return True
    follows = re.match(r"^[\w'’]{2,} +[\w\"'`(]", seen.text) is not None
    asked = seen.capital or seen.first.lower() in _ASKING
    return follows and asked and not seen.text.endswith(":") and (seen.question or seen.pairs > 0)
