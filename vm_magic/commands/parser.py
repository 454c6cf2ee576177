"""Reads a command's line: flags, values, and free text that stays as typed."""

import argparse
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

from engine.errors import ConfigError, UnsupportedOptionError
from engine.format.names import did_you_mean
from engine.format.text import is_count, shortened
from vm_magic.commands.json_words import TOKEN, json_word, pieces
from vm_magic.show.errors import HelpShown

_JSON_VALUES = ("JSON", "SCHEMA", "LIST")
"""How ``--help`` calls the values that are JSON: they may stand in a line without quotes."""
_SHOWN = 40


class CommandParser(MagicArgumentParser):  # type: ignore[misc]
    """One command's parser: ``--help`` raises HelpShown, abbreviations are off, underscores allowed."""

    def __init__(self, command: str, description: str, percent: str = "%") -> None:
        super().__init__(
            prog=f"{percent}vllm_metal {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.allow_abbrev = False
        self.command = command
        self.add_argument("-h", "--help", action=_Help, nargs=0, help="show this text")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse ``words``. Raises ConfigError for unknown flags, UsageError for what argparse refuses."""
        words = self._join_dotted([with_dashes(word) for word in words])
        for word in words:
            if word == "--":
                break
            if word.startswith("--") and not self.knows(word.partition("=")[0]):
                raise self.unknown_flag(word.partition("=")[0])
        result: argparse.Namespace = self.parse_args(words)
        return result

    def _join_dotted(self, words: list[str]) -> list[str]:
        """``--flag.key value`` as JSON, as vLLM reads it: ``--flag '{"key": value}'``."""
        result: list[str] = []
        objects: dict[str, dict[str, Any]] = {}
        rest = iter(words)
        for word in rest:
            flag, dot, path = word.partition("=")[0].partition(".")
            if not (word.startswith("--") and dot and self.knows(flag)):
                result.append(word)
                continue
            value = word.partition("=")[2] if "=" in word else next(rest, None)
            if value is None:
                self.error(f"argument {word}: expected a value")
            target = objects.setdefault(flag, {})
            *outer, last = path.split(".")
            for key in outer:
                target = target.setdefault(key, {})
            target[last] = _json_or_text(value)
        return [*result, *(word for flag, value in objects.items() for word in (flag, json.dumps(value)))]

    def knows(self, flag: str) -> bool:
        """Whether ``flag`` is one of the command's."""
        return flag in self._option_string_actions

    def takes_value(self, flag: str) -> bool:
        """Whether ``flag`` must be followed by a value."""
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs not in (0, "?")

    def takes_number(self, flag: str) -> bool:
        """Whether ``flag`` may be followed by a number, or by none."""
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs == "?"

    def accepts(self, flag: str, word: str) -> bool:
        """Whether ``word``, with its quotes, can be a value of ``flag``."""
        action = self._option_string_actions[flag]
        try:
            self._check_value(action, self._get_value(action, shlex.split(word)[0]))
        except (argparse.ArgumentError, ValueError, IndexError):
            return False
        return True

    def takes_json(self, flag: str) -> bool:
        """Whether the value of ``flag`` is JSON."""
        action = self._option_string_actions.get(with_dashes(flag))
        return action is not None and action.metavar in _JSON_VALUES

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is not among the choices, with the one that it resembles."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean(str(value), map(str, action.choices or ()), "")
            raise argparse.ArgumentError(action, f"{error.message}; {hint}" if hint else error.message) from None

    def choices(self, flag: str) -> tuple[str, ...]:
        """The values that ``flag`` allows; empty where any."""
        return tuple(str(choice) for choice in self._option_string_actions[flag].choices or ())

    def flags(self) -> list[str]:
        """All long flags."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with ``message`` and where the help is."""
        super().error(f"{message} (see {self.prog} --help)")
        raise AssertionError("MagicArgumentParser.error raises")

    def unknown_flag(self, flag: str) -> UnsupportedOptionError:
        """The error for a flag that the command does not have."""
        hint = did_you_mean(flag, self._option_string_actions, f"see {self.prog} --help")
        return UnsupportedOptionError(f"{flag} is not a flag of {self.command}: {hint}", flag=flag.lstrip("-"))


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        raise HelpShown(parser.format_help())


def with_dashes(word: str) -> str:
    """``--max_model_len=1`` as ``--max-model-len=1``."""
    if not word.startswith("--"):
        return word
    name, mark, rest = re.fullmatch(r"([^=.]*)([=.]?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    return name.replace("_", "-") + mark + rest


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def split_text(parser: CommandParser, line: str) -> tuple[list[str], str]:
    """Split ``line`` into leading flag words and the free text after them, which stays as typed.

    Raises UsageError where the text ends in flags of the command, which would be sent without a word; ``--`` before
    the text, or quotes around it, say that they are meant.
    """
    words: list[str] = []
    position = 0
    while (found := TOKEN.match(line, position)) and found[1].startswith("-") and found[1] != "-":
        if json := json_word(line, position, parser.takes_json):
            words += json[:2]
            position = json[2]
            continue
        position = found.end()
        if found[1] == "--":
            break
        words += shlex.split(found[1])
        if "=" not in found[1]:
            flag, value = with_dashes(found[1]), TOKEN.match(line, position)
            if value and (parser.takes_value(flag) or (parser.takes_number(flag) and is_count(value[1]))):
                words += shlex.split(value[1])
                position = value.end()
    text = line[position:].strip()
    if len(text) > 1 and text[0] in "'\"" and text.find(text[0], 1) == len(text) - 1:
        return words, text[1:-1]
    is_known = all(parser.knows(word.partition("=")[0]) or parser.knows(word[:2]) for word in words if word[:1] == "-")
    if is_known and not (found and found[1] == "--"):  # else that is what is wrong
        _check_end(parser, text)
    return words, text


def _check_end(parser: CommandParser, text: str) -> None:
    starts = (word.start() for word in re.finditer(r"(?<!\S)-\S", text))
    start = next((start for start in starts if is_flags(parser, text[start:])), 0)
    if start:
        flags, rest = text[start:], text[:start].strip()
        magic = parser.prog.replace("%%", "%")
        raise UsageError(
            f"flags go before the text: {magic} {flags} {shortened(rest, _SHOWN)} "
            f"(-- sends the text as typed: {magic} -- {shortened(text, _SHOWN)})"
        )


def is_flags(parser: CommandParser, text: str) -> bool:
    """Whether ``text`` is nothing but flags of the command, with their values."""
    position, last = 0, len(text.rstrip())
    while position < last:
        if json := json_word(text, position, parser.takes_json):
            position = json[2]
            continue
        word = TOKEN.match(text, position)
        flag = with_dashes(word[1]).partition("=")[0] if word else ""
        if word is None or not parser.knows(flag):
            return False
        position = word.end()
        if "=" in word[1]:
            continue
        value = TOKEN.match(text, position)
        if parser.takes_value(flag):
            if value is None or not parser.accepts(flag, value[1]):
                return False
            position = value.end()
        elif value and parser.takes_number(flag) and is_count(value[1]):
            position = value.end()
    return last > 0


def split_words(line: str, parser: CommandParser | None = None) -> list[str]:
    """Split ``line`` as a shell would, but for JSON behind a flag of ``parser`` that takes it: quoted or not."""
    parts = [(line, False)] if parser is None else pieces(line, parser.takes_json)
    words: list[str] = []
    for text, whole in parts:
        try:
            words += [text] if whole else shlex.split(text)
        except ValueError as error:
            raise ConfigError(f"{line.strip()!r}: {error}; close the quote") from None
    return words


def pick(namespace: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of ``names`` that the user gave."""
    given = vars(namespace)
    return {name: given[name] for name in names if name in given}
