"""``chat --compare``: from flags and a message to replies side by side, filed as one."""

import argparse
from typing import Any

from IPython.core.error import UsageError

from engine.errors import ConfigError
from vm_magic.chat.compare import ComparedChat, Comparison, start_comparison
from vm_magic.chat.generation import ChatOptions
from vm_magic.commands.base import Context, file_value
from vm_magic.show.cards import speed_text
from vm_magic.show.compare_view import (
    CompareView,
    NotebookCompare,
    SilentCompare,
    TerminalCompare,
    VariantShown,
    compare_bundle,
)
from vm_magic.show.display_handle import Bundle, can_update, open_handle
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_bundle import Format
from vm_magic.show.reply_view import WAITING
from vm_magic.show.terminal import publish, say
from vm_magic.state.chat_flags import SAMPLING_FLAGS, reply_format
from vm_magic.state.compare_flags import Variant, compare_names, read_variants
from vm_magic.state.session import Session, peek_session

_READERS = {name: read for _, name, read, _ in SAMPLING_FLAGS}


def run_comparison(
    context: Context, parsed: argparse.Namespace, text: str, options: ChatOptions, sent: Bundle | None, *, cell: bool
) -> Comparison | None:
    """Run and show what ``--compare`` asks for. The line form returns it, the cell form files it as ``_``."""
    shell = context.shell
    variants = read_variants(parsed.compare, _READERS)
    _check(parsed, variants[0])
    format = reply_format(parsed)
    compared = start_comparison(context.session, text, options, variants, format)
    if sent is not None and not parsed.out:
        publish(shell, sent)
    view = _view(parsed, shell, variants, format) if cell else SilentCompare()
    found = _followed(compared, view)
    if cell or parsed.out or compared.interrupted:  # else the line returns it
        file_value(found, shell, parsed.out)
    if cell and not parsed.out:
        _offer(shell, found)
        if parsed.stats:
            say("\n".join(f"{label}: {speed_text(reply)}" for label, reply in zip(found.labels, found, strict=True)))
    if compared.interrupted:
        tokens = sum(reply.usage.completion_tokens for reply in found)
        place = parsed.out or "_"
        raise Interrupted(f"stopped after {tokens} tokens in all; the model stays loaded, {place} has what came")
    return found if not cell and not parsed.out else None


def _followed(compared: ComparedChat, view: CompareView) -> Comparison:
    try:
        return compared.follow(view)
    except BaseException:
        compared.abort()
        raise


def _check(parsed: argparse.Namespace, first: Variant) -> None:
    """Refuse flags that do not go with ``--compare``, and values given twice."""
    for flag in ("tools", "detach", "logprobs", "record", "to_cell"):
        if getattr(parsed, flag, None):
            name = flag.replace("_", "-")
            raise UsageError(f"--compare does not go with --{name}: leave one of them out")
    for name in first.values:
        if getattr(parsed, name, None) is not None:
            again = f"--{name.replace('_', '-')}"
            raise ConfigError(f"--compare {name}: {again} gives it too; leave one out", flag="compare")


def _view(parsed: argparse.Namespace, shell: Any, variants: list[Variant], format: Format) -> CompareView:
    if parsed.out:
        return SilentCompare()
    if not can_update(shell):
        return TerminalCompare()
    handle = open_handle(shell, compare_bundle(waiting(variants), format))
    return NotebookCompare(handle, format, stream=not parsed.no_stream)


def waiting(variants: list[Variant]) -> list[VariantShown]:
    """The columns before the first words."""
    return [VariantShown(variant.label, WAITING) for variant in variants]


def _offer(shell: Any, found: Comparison) -> None:
    """Buttons that keep a reply, where there can be some; else the line that does it."""
    between = "or" if len(found) == 2 else "…"
    hint = f"No reply is part of the conversation yet. Keep one: _.keep(0) {between} _.keep({len(found) - 1})"
    if not can_update(shell):
        say(hint)
        return
    from vm_magic.panel.choice_buttons import ChoiceButtons

    def choose(place: int) -> str:
        reply = found.keep(place)
        shell.user_ns["_"] = shell.displayhook._ = reply
        return kept(place)

    def kept(place: int) -> str:
        return f"Kept in the conversation: {found.labels[place]}"

    buttons = ChoiceButtons(shell, [f"Keep {label}" for label in found.labels], hint, choose)
    found.on_keep(lambda place: buttons.mark(place, kept(place)))


def compare_candidates(fragment: str) -> list[str]:
    """What Tab offers after ``--compare``."""
    name, mark, _ = fragment.partition("=")
    if not mark:
        return [f"{one}=" for one in compare_names(_READERS)]
    if name == "think":
        return ["think=on,off"]
    before = f"{fragment.rpartition(',')[0]}," if "," in fragment else "model="
    return [f"{before}{one}" for one in _reachable()] if name == "model" else []


def _reachable() -> list[str]:
    """Models' names, without asking the server: Tab does not wait for a network."""
    session: Session | None = peek_session()
    if session is None:
        return []
    here = [] if session.loaded is None else list(session.loaded.args.names)
    return [*here, *([] if session.remote is None else [session.remote.model])]
