"""Reads shell text as documentation prints it, without a shell: assignments and ``vllm serve``.

Nothing is ever run. Comments, continued lines, quotes, ``export A=B``, ``env A=B …``, ``$A`` and ``~``
are understood; every other command is refused by its name and line.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.params.engine_args import ENGINE_FLAGS

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?-([^}]*))?\})")
_PLACEHOLDER = re.compile(r"<[A-Za-z][^<>\n;|&]*>")
_OPERATOR = re.compile(r"&&|\|\||[;&|<>()]")
_SEPARATORS = ("\n", ";", "&&", "&")
PROCESS_VARIABLES = frozenset(
    {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
)
"""Variables that choose a program or its libraries: without meaning inside a running kernel."""
_KNOWN_VLLM = frozenset({"VLLM_METAL_USE_PAGED_ATTENTION", "VLLM_API_KEY", *(flag.env for flag in ENGINE_FLAGS)})


@dataclass
class ShellText:
    """What pasted text asks for: variables, the words after ``vllm serve``, and lines to tell the user."""

    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Word:
    text: str
    operator: bool = False
    assignable: bool = False
    """Whether its beginning up to the first ``=`` was typed without quotes."""


def _refuse(line: int, message: str) -> ConfigError:
    return ConfigError(f"line {line}: {message}", flag="serve")


class _Reader:
    """Splits text into commands; variables are expanded when a word is read, so order counts."""

    def __init__(self, text: str, variables: dict[str, str]) -> None:
        self.text = text
        self.variables = variables
        self.position = 0

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.position) + 1

    def commands(self) -> Iterator[tuple[int, list[str], int]]:
        """Yields (line, words, number of leading assignments) per command."""
        words: list[_Word] = []
        first_line = 1
        while True:
            word = self._next_word()
            if word is not None and not (word.operator and word.text in _SEPARATORS):
                if word.operator:
                    raise _refuse(self.line, self._why_not(word.text))
                if not words:
                    first_line = self.line
                words.append(word)
                continue
            if words:
                yield first_line, [w.text for w in words], self._count_assignments(words)
                words = []
            if word is None:
                return

    @staticmethod
    def _count_assignments(words: list[_Word]) -> int:
        count = 0
        while count < len(words) and words[count].assignable and _ASSIGNMENT.fullmatch(words[count].text):
            count += 1
        return count

    @staticmethod
    def _why_not(operator: str) -> str:
        if operator in "<>":
            return f"'{operator}' (redirection) has no meaning here; %vllm_metal logs shows the log"
        return f"'{operator}' is not understood: nothing is run in a shell; keep only the vllm serve command"

    def _next_word(self) -> _Word | None:
        self._skip_blanks()
        if self.position >= len(self.text):
            return None
        if self.text[self.position] == "\n":
            self.position += 1
            return _Word("\n", operator=True)
        placeholder = _PLACEHOLDER.match(self.text, self.position)
        if placeholder:
            raise _refuse(self.line, f"{placeholder[0]} is a placeholder; write your own value there")
        operator = _OPERATOR.match(self.text, self.position)
        if operator:
            self.position = operator.end()
            return _Word(operator[0], operator=True)
        return self._word()

    def _skip_blanks(self) -> None:
        blank = re.compile(r"(?:[ \t\r]|\\\r?\n)+|#[^\n]*")
        while found := blank.match(self.text, self.position):
            self.position = found.end()

    def _word(self) -> _Word:
        parts: list[str] = []
        assignable = True
        start_line = self.line
        if self.text.startswith("~", self.position):
            parts.append(self._tilde())
        while self.position < len(self.text):
            char = self.text[self.position]
            if self._ends_word(char):
                break
            assignable = assignable and (char not in "'\"$\\" or "=" in "".join(parts))
            parts.append(self._part(char))
            if parts[-1] == "=" and self.text.startswith("~", self.position):
                parts.append(self._tilde())
        text = "".join(parts)
        value = text.partition("=")[2] or text
        if _PLACEHOLDER.fullmatch(value):
            raise _refuse(start_line, f"{value} is a placeholder; write your own value there")
        return _Word(text, assignable=assignable)

    def _ends_word(self, char: str) -> bool:
        if char == "<" and _PLACEHOLDER.match(self.text, self.position):
            return False
        blank = char in " \t\r\n" or self.text.startswith("\\\n", self.position)
        return blank or _OPERATOR.match(char) is not None

    def _tilde(self) -> str:
        self.position += 1
        following = self.text[self.position : self.position + 1]
        return self.variables.get("HOME", "~") if following in ("", "/", " ", "\n", "\t") else "~"

    def _part(self, char: str) -> str:
        """One quoted piece, variable or character, from the current position on."""
        if char == "'":
            return self._single_quoted()
        if char == '"':
            return self._double_quoted()
        if char == "<":
            placeholder = _PLACEHOLDER.match(self.text, self.position)
            assert placeholder, "the caller looked"
            raise _refuse(self.line, f"{placeholder[0]} is a placeholder; write your own value there")
        if char == "\\":
            self.position += 2
            return self.text[self.position - 1 : self.position]
        if char in "$`":
            return self._variable()
        self.position += 1
        return char

    def _single_quoted(self) -> str:
        end = self.text.find("'", self.position + 1)
        if end < 0:
            raise _refuse(self.line, "a ' is never closed")
        text = self.text[self.position + 1 : end]
        self.position = end + 1
        return text

    def _double_quoted(self) -> str:
        opened = self.line
        self.position += 1
        parts: list[str] = []
        while self.position < len(self.text):
            char = self.text[self.position]
            if char == '"':
                self.position += 1
                return "".join(parts)
            following = self.text[self.position + 1 : self.position + 2]
            if char == "\\" and following and following in '$`"\\\n':
                self.position += 2
                parts.append("" if following == "\n" else following)
            elif char in "$`":
                parts.append(self._variable())
            else:
                self.position += 1
                parts.append(char)
        raise _refuse(opened, 'a " is never closed')

    def _variable(self) -> str:
        rest = self.text[self.position : self.position + 2]
        if rest == "$(" or rest.startswith("`"):
            raise _refuse(self.line, "$(…) and `…` would run a command; write the value itself")
        found = _VARIABLE.match(self.text, self.position)
        if not found:
            self.position += 1
            return "$"
        name, default = found[1] or found[2], found[3]
        value = self.variables.get(name) or default
        if value is None and name not in self.variables:
            raise _refuse(self.line, f"${name} is not set; assign it above, or write the value itself")
        self.position = found.end()
        return value or ""


def read_shell_text(text: str, environ: Mapping[str, str]) -> ShellText:
    """Read pasted ``text``; ``environ`` gives variables that it uses without assigning them.

    Raises ConfigError with the line number for anything but assignments and one ``vllm serve``.
    """
    result = ShellText()
    reader = _Reader(text, dict(environ))
    served = 0
    for line, words, num_assignments in reader.commands():
        if words[0] == "$":  # a prompt, as documentation prints it
            words = words[1:]
            num_assignments = next((i for i, w in enumerate(words) if not _ASSIGNMENT.fullmatch(w)), len(words))
        assignments, command = words[:num_assignments], words[num_assignments:]
        if command and command[0] in ("export", "env"):
            extra, command = _leading_assignments(line, command)
            assignments += extra
        _assign(result, reader.variables, assignments)
        if not command:
            continue
        arguments = _serve_arguments(line, command)
        if served:
            raise _refuse(line, f"a second vllm serve (the first is on line {served}); this kernel holds one model")
        served, result.arguments = line, arguments
    return result


def _leading_assignments(line: int, command: list[str]) -> tuple[list[str], list[str]]:
    """Assignments after ``export`` or ``env``, and the command that follows ``env``."""
    name, rest = command[0], command[1:]
    count = next((i for i, word in enumerate(rest) if not _ASSIGNMENT.fullmatch(word)), len(rest))
    if name == "env":
        if count < len(rest) and rest[count].startswith("-"):
            raise _refuse(line, f"env {rest[count]} is not understood; keep only NAME=VALUE")
        return rest[:count], rest[count:]
    wrong = [word for word in rest[count:] if not re.fullmatch(r"[A-Za-z_]\w*", word)]
    if wrong:
        raise _refuse(line, f"export {wrong[0]}: expected NAME=VALUE")
    return [word for word in rest if "=" in word], []


def _assign(result: ShellText, variables: dict[str, str], assignments: list[str]) -> None:
    for assignment in assignments:
        name, value = assignment.split("=", 1)
        variables[name] = value
        if name in PROCESS_VARIABLES:
            result.notes.append(f"{name} is not used: the model runs in this kernel's own process")
            continue
        if name.startswith("VLLM_") and name not in _KNOWN_VLLM:
            ours = name.replace("VLLM_", "VLLM_METAL_", 1)
            instead = f"; {ours} is" if ours in _KNOWN_VLLM else ""
            result.notes.append(f"{name} is not read by this engine{instead}")
        result.environment[name] = value


def _serve_arguments(line: int, command: list[str]) -> list[str]:
    program = command[0].rsplit("/", 1)[-1]
    if program != "vllm":
        raise _refuse(line, f"'{command[0]}' is not run here: only vllm serve and assignments mean something")
    if command[1:2] != ["serve"]:
        given = " ".join(command[:2])
        raise _refuse(line, f"'{given}' is not run here: only vllm serve means something")
    return command[2:]
