"""``llm``: our entry in the ``llm`` command-line tool's list of OpenAI-compatible models, and nobody else's.

https://llm.datasette.io keeps ``extra-openai-models.yaml`` and ``keys.json`` in its own user folder. Our
entry carries a mark; entries without it, comments and order stay as they are, byte for byte.
"""

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.export import open_port
from vm_magic.commands.parser import CommandParser
from vm_magic.show.cards import CodeText
from vm_magic.show.terminal import say
from vm_magic.state.clients import model_id
from vm_magic.state.session import Session

MARK = "# written by %vllm_metal llm"
MODELS_FILE = "extra-openai-models.yaml"
KEY_NAME = "vm-magic"
"""Our name in the tool's ``keys.json``."""
_OTHER_FILE_MODE, _KEYS_FILE_MODE = 0o644, 0o600


class Llm(LineCommand):
    """Writes or shows our entry for the open port."""

    help = "write or show the llm command-line tool's entry for the open port"

    def add_arguments(self, parser: CommandParser) -> None:
        """Whether to write, and under which name."""
        parser.add_argument("--show", action="store_true", help="print the entry and write nothing")
        parser.add_argument("--model-id", metavar="NAME", help="what llm -m takes (default: the model's name)")

    def execute(self, context: Context, parsed: argparse.Namespace) -> CodeText | None:
        """Show the entry and where it would go, or write it with the key and say how to use it."""
        entry = _entry(context.session, parsed.model_id)
        if parsed.show:
            path = user_folder() / MODELS_FILE
            return CodeText(entry.yaml(), "yaml", f"%vllm_metal llm writes this to {_from_home(path)}.")
        written = write_entry(entry, open_port(context.session).api_key, user_folder())
        say(f"wrote {' and '.join(map(_from_home, written))}; use it with: llm -m {entry.model_id} 'Hello!'")
        return None


def _entry(session: Session, name: str | None) -> "LlmEntry":
    server = open_port(session)
    return LlmEntry(
        name or model_id(server.model),
        server.model,
        server.base_url,
        server.api_key is not None,
        supports_tools=getattr(session.require(), "tool_call_parser", None) is not None,
    )


def _from_home(path: Path) -> str:
    """The path with ``~`` for the user's home, which a saved notebook should not name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


@dataclass(frozen=True)
class LlmEntry:
    """One model of the tool. ``model_id`` is what ``llm -m`` takes, ``model_name`` what the port calls it."""

    model_id: str
    model_name: str
    api_base: str
    needs_key: bool
    supports_tools: bool = False

    def yaml(self) -> str:
        """The entry as lines of the YAML list, the first of them marked as ours."""
        fields: dict[str, Any] = {"model_id": self.model_id, "model_name": self.model_name, "api_base": self.api_base}
        if self.needs_key:
            fields["api_key_name"] = KEY_NAME
        fields["supports_schema"] = True
        if self.supports_tools:
            fields["supports_tools"] = True
        lines = [f"{name}: {_scalar(value)}" for name, value in fields.items()]
        return "\n".join([f"- {lines[0]}  {MARK}", *(f"  {line}" for line in lines[1:])]) + "\n"


def user_folder() -> Path:
    """Where the tool keeps its files: ``LLM_USER_PATH``, or its place in the user's application data."""
    if given := os.environ.get("LLM_USER_PATH"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "io.datasette.llm"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "io.datasette.llm"


def write_entry(entry: LlmEntry, api_key: str | None, folder: Path) -> list[Path]:
    """Put ``entry`` into the tool's list and the key into its keys; gives the files that were written.

    An earlier entry of ours with that id is replaced where it stands. Raises ConfigError, changing
    nothing, if another entry has the id or a file cannot be read.
    """
    models, keys = folder / MODELS_FILE, folder / "keys.json"
    text = with_entry(models.read_text(encoding="utf-8") if models.exists() else "", entry, models)
    known = _read_keys(keys) if api_key else {}
    _replace(models, text, _OTHER_FILE_MODE)
    if api_key is None:
        return [models]
    _replace(keys, json.dumps({**known, KEY_NAME: api_key}, indent=2) + "\n", _KEYS_FILE_MODE)
    return [models, keys]


def with_entry(text: str, entry: LlmEntry, path: Path) -> str:
    """``text`` of the list with ``entry`` in it, all else untouched."""
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    indent, found = _find(text, entry.model_id, path)
    new = [f"{indent}{line}\n" for line in entry.yaml().splitlines()]
    if found is None:
        return "".join([*lines, *new])
    start, end = found
    if MARK not in lines[start]:
        raise ConfigError(
            f"{path} has an entry {entry.model_id!r} that is not ours; name this one with --model-id NAME",
            flag="model_id",
            value=entry.model_id,
        )
    return "".join([*lines[:start], *new, *lines[end:]])


def _find(text: str, model_id: str, path: Path) -> tuple[str, tuple[int, int] | None]:
    """The list's indentation, and first and last line of the entry ``model_id``."""
    try:
        root = yaml.compose(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML; correct it first, nothing was written", flag="llm") from None
    if root is None:
        return "", None
    if not isinstance(root, yaml.SequenceNode) or root.flow_style:
        raise ConfigError(f"{path} is not a YAML list with a - per model; nothing was written", flag="llm")
    indent = " " * root.start_mark.column
    for node in root.value:
        values = {key.value: value.value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
        if values.get("model_id") == model_id:
            last = node.value[-1][1].end_mark
            return indent, (node.start_mark.line, last.line + (1 if last.column else 0))
    return indent, None


def _read_keys(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"// Note": "This file stores secret API credentials. Do not share!"}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise ConfigError(f"{path} is not a JSON object; correct it first, nothing was written", flag="llm")
    return known


def _replace(path: Path, text: str, mode: int) -> None:
    """Write ``path`` whole or not at all; a file that exists keeps its mode, links stay links."""
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else mode
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(mode)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} could not be written ({error.strerror}) and stays as it was; make room or let it be written to, "
            "or take %vllm_metal llm --show",
            flag="llm",
        ) from None


def _scalar(value: Any) -> str:
    """``value`` as YAML on one line (JSON's strings are YAML's)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False)
