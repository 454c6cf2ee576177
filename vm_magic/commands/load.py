"""``load``, ``unload`` and ``models``: the model of this kernel."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from engine.format.text import count_text
from engine.memory.plan import room
from engine.params.sizes import plain_size, size_text
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.engine_flags import ENGINE_OPTIONS, EngineCommand
from vm_magic.commands.panel import leave_panel
from vm_magic.commands.parser import pick
from vm_magic.show.display_handle import can_fold
from vm_magic.show.errors import Interrupted
from vm_magic.show.load_view import load_bundle, print_log_line
from vm_magic.show.progress import LoadProgress
from vm_magic.show.tables import Table
from vm_magic.show.terminal import say
from vm_magic.state import session as sessions
from vm_magic.state.references import release_references

_log = logging.getLogger(__name__)


class Load(EngineCommand, LineCommand):
    """Loads a model; the same call again does nothing."""

    help = "load a model into this kernel"
    needs_kernel = "loads into this kernel"
    needs_model = True

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:
        """Load, and say if a port closed with the model before."""
        session = context.session
        had_port = session.server is not None
        load_model(context, parsed.model, pick(parsed, ENGINE_OPTIONS))
        if had_port and session.server is None:
            say("the port closed with the model before; %vllm_metal serve opens it for this one")


def load_model(context: Context, model: str, options: dict[str, Any]) -> None:
    """Load, and print and log the result; ■ leaves nothing half-loaded, and the model before is there again."""
    session = context.session
    shown: list[LoadProgress] = []

    def progress(name: str) -> LoadProgress:
        shown.append(LoadProgress(context.shell, name))
        shown[-1].open()  # known by then, so that an interrupt while it opens still ends it
        return shown[-1]

    try:
        loaded = session.load(model, options, progress)
    except BaseException as error:
        _finish_failed(shown, session.model_name, error)
        if isinstance(error, KeyboardInterrupt):
            kept = "; ".join(_notes(error)) or f"{session.model_name or 'nothing'} is loaded"
            raise Interrupted(f"loading stopped; {kept}") from None
        raise
    if not loaded:
        say(f"{model} is loaded already")
        return
    _show_loaded(context, shown[0])


def _finish_failed(bars: Sequence[LoadProgress], now: str | None, error: BaseException) -> None:
    """End the bars of a load that failed, and of the model before if that was loaded again: ``now`` it is there."""
    for number, bar in enumerate(bars):
        failed = "not loaded with these flags" if now == bar.model else "not loaded"
        took = f"loaded again in {bar.seconds:.1f} s" if number and now == bar.model else failed
        bar.finish(f"{bar.model}: {took}")
    if not isinstance(error, KeyboardInterrupt):
        for note in _notes(error):
            say(note)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _show_loaded(context: Context, bar: LoadProgress) -> None:
    llm = context.session.require()
    headline = f"{bar.model}: {plain_size(llm.plan.model_memory, 2)} loaded in {bar.seconds:.1f} s"
    others = sessions.others_line(llm.plan.usable)
    lines = [room(llm.plan, sessions.memory_in_use()), *filter(None, [others]), *llm.notes]
    log_lines = [llm.plan.log_line(), *filter(None, [llm.defaults.log_line()])]
    folds = can_fold(context.shell)
    bar.finish(headline, load_bundle(headline, "\n".join(log_lines)) if folds else None)
    say("\n".join(lines))  # jupyter console shows this, and not what takes the place of a bar
    if not folds:
        print_log_line("\n".join(log_lines))
    for text in [headline, log_lines[0], *lines]:  # the others are in the log already
        _log.info("%s", text)


class Unload(LineCommand):
    """Frees the model, or ends the connection to a server first."""

    help = "free the model and its memory"

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:  # noqa: ARG002
        """Unload, and print the memory in use before and after."""
        session = context.session
        if session.disconnect():
            say("the connection is closed")
            leave_panel()
        if session.loaded is None:
            session.unload()
            say("nothing is loaded")
            return
        before = sessions.memory_in_use()
        session.unload()
        release_references(context.shell)
        say(f"memory in use: {plain_size(before)} before, {plain_size(sessions.memory_in_use())} after")


class Models(LineCommand):
    """Lists models: those on this machine, or those of the server."""

    help = "models on this machine"

    def execute(self, context: Context, parsed: argparse.Namespace) -> Table:  # noqa: ARG002
        """A table of the models."""
        remote = context.session.remote
        if remote is None:
            return models_table(sessions.cached_models())
        rows = tuple(
            (
                one.name,
                count_text(one.max_model_len) if one.max_model_len else "",
                one.parent or "",
                "connected" if one.name == remote.model else "",
            )
            for one in remote.models()
        )
        return Table(("model", "context", "adapter of", ""), rows, f"served at {remote.base_url}")


def models_table(models: Sequence[Any]) -> Table:
    """Models on this machine."""
    rows = tuple((m.name, size_text(m.bytes), m.kind) for m in models)
    return Table(
        ("model", "size", "kind"), rows, "" if rows else "no models here yet; %vllm_metal load smollm2 fetches one"
    )
