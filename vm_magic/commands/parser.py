"""Reads a command's line: flags, values, and free text that stays as typed."""

import argparse
import difflib
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from IPython.core.magic_arguments import MagicArgumentParser

from engine.errors import ConfigError, UnsupportedOptionError
from vm_magic.show.errors import HelpShown


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
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
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
    """Split ``line`` into leading flag words and the free text after them, which stays as typed."""
    words: list[str] = []
    position = 0
    token = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+)""")
    while (found := token.match(line, position)) and found[1].startswith("-") and found[1] != "-":
        position = found.end()
        if found[1] == "--":
            break
        words += shlex.split(found[1])
        if "=" not in found[1]:
            flag, value = with_dashes(found[1]), token.match(line, position)
            if value and (parser.takes_value(flag) or (parser.takes_number(flag) and value[1].isdigit())):
                words += shlex.split(value[1])
                position = value.end()
    text = line[position:].strip()
    if len(text) > 1 and text[0] in "'\"" and text.find(text[0], 1) == len(text) - 1:
        text = text[1:-1]
    return words, text


def split_words(line: str) -> list[str]:
    """Split ``line`` as a shell would, so that JSON in single quotes arrives whole."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"{line.strip()!r}: {error}; close the quote") from None


def pick(namespace: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of ``names`` that the user gave."""
    given = vars(namespace)
    return {name: given[name] for name in names if name in given}
