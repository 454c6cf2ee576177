"""MODEL and the engine's flags, as ``load``, ``serve`` and ``plan`` take them."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from engine.errors import ConfigError, UnsupportedOptionError
from engine.params.engine_args import ENGINE_FLAGS, Flag
from engine.params.vllm_flags import ACCEPTED_NO_OPS, REFUSED_FLAGS, check_vllm_flag, refuse_flag
from vm_magic.commands.base import Command
from vm_magic.commands.parser import CommandParser, with_dashes
from vm_magic.state import session as sessions

ENGINE_OPTIONS = tuple(flag.field for flag in ENGINE_FLAGS)


class EngineParser(CommandParser):
    """A parser of a model and the engine's flags; knows vLLM's flags that the engine has not."""

    needs_model = False

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse ``words``; the model may be given by its place or by ``--model``."""
        result = super().read(self._without_no_ops([with_dashes(word) for word in words]))
        flag = vars(result).pop("model_flag", None)
        if flag is not None and result.model not in (None, flag):
            self.error(f"MODEL is {result.model} and --model says {flag}: give one")
        result.model = result.model or flag
        if result.model is None and self.needs_model:
            self.error("the following arguments are required: MODEL")
        return result

    def _without_no_ops(self, words: Sequence[str]) -> list[str]:
        """``words`` without vLLM's flags that are accepted no-ops. Raises UnsupportedOptionError for others."""
        result: list[str] = []
        rest = iter(words)
        for word in rest:
            flag, mark, value = word.partition("=")
            name = flag.removeprefix("--").removeprefix("no-")
            if not flag.startswith("--") or self.knows(flag) or name not in ACCEPTED_NO_OPS:
                result.append(word)
            elif isinstance(ACCEPTED_NO_OPS[name], bool):
                check_vllm_flag(name, not flag.startswith("--no-"))
            else:
                check_vllm_flag(name, value if mark else next(rest, ""))
        return result

    def unknown_flag(self, flag: str) -> UnsupportedOptionError:
        """As for other commands; a flag of vLLM's is refused with what to do instead."""
        name = flag.lstrip("-")
        return refuse_flag(name) if name.removeprefix("no-") in REFUSED_FLAGS else super().unknown_flag(flag)


class EngineCommand(Command):
    """A command that takes a model and the engine's flags."""

    needs_model = False
    takes_lists = False
    """Whether a flag with a choice may name several values, with commas between them."""

    def make_parser(self) -> CommandParser:
        """A parser with MODEL and the engine's flags."""
        parser = EngineParser(self.name, self.help, self.percent)
        parser.needs_model = self.needs_model
        parser.add_argument("model", nargs="?", metavar="MODEL", help="smollm2, a folder, a hub id or a .gguf file")
        parser.add_argument(
            "--model", dest="model_flag", metavar="MODEL", default=argparse.SUPPRESS, help="another way to give MODEL"
        )
        group = parser.add_argument_group("engine flags")
        for flag in ENGINE_FLAGS:
            _add_flag(group, flag, lists=self.takes_lists)
        return parser

    def arguments(self) -> Iterable[str]:
        """The models on this machine."""
        return [model.name for model in sessions.cached_models()]


class Listed(tuple[str, ...]):
    """Choices of which several may be named, with commas between them."""

    def __contains__(self, text: object) -> bool:
        return all(super(Listed, self).__contains__(part.strip()) for part in str(text).split(","))


def _add_flag(group: Any, flag: Flag, *, lists: bool) -> None:
    names = [f"--{flag.name}", *(f"--{alias}" for alias in flag.aliases)]
    common: dict[str, Any] = {"help": flag.help.replace("%", "%%"), "default": argparse.SUPPRESS}
    if flag.kind == "switch":
        group.add_argument(*names, dest=flag.field, action=argparse.BooleanOptionalAction, **common)
    elif flag.kind == "list":
        group.add_argument(*names, dest=flag.field, action="extend", nargs="+", metavar=flag.metavar, **common)
    elif flag.choices:
        choices = Listed(flag.choices) if lists else flag.choices
        group.add_argument(*names, dest=flag.field, type=_one_of(flag, lists=lists), choices=choices, **common)
    else:
        group.add_argument(*names, dest=flag.field, metavar=flag.metavar or None, **common)


def _one_of(flag: Flag, *, lists: bool) -> Callable[[str], Any]:
    """Reads another name of a choice as the choice, and refuses others in the engine's words."""

    def read(text: str) -> Any:
        try:
            return ",".join(flag.parse(part.strip()) for part in text.split(",")) if lists else flag.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{flag.name} ")) from None

    return read
