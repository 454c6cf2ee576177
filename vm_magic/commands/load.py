"""``load``, ``unload`` and ``models``: the model of this kernel."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from engine.params.sizes import size_text
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.engine_flags import ENGINE_OPTIONS, EngineCommand
from vm_magic.commands.panel import leave_panel
from vm_magic.commands.parser import pick
from vm_magic.show.errors import Interrupted
from vm_magic.show.progress import LoadProgress
from vm_magic.show.tables import Table
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
            print("the port closed with the model before; %vllm_metal serve opens it for this one")


def load_model(context: Context, model: str, options: dict[str, Any]) -> None:
    """Load, and print and log the result; ■ leaves nothing half-loaded."""
    session = context.session
    shown: list[LoadProgress] = []

    def progress() -> LoadProgress:
        shown.append(LoadProgress(context.shell, model))
        shown[0].open()  # known by then, so that an interrupt while it opens still ends it
        return shown[0]

    try:
        loaded = session.load(model, options, progress)
    except BaseException as error:
        for bar in shown:
            bar.finish(f"{model}: not loaded")
        if isinstance(error, KeyboardInterrupt):
            kept = "nothing" if session.loaded is None else session.model_name
            raise Interrupted(f"loading stopped; {kept} is loaded") from None
        raise
    llm = session.require()
    if not loaded:
        print(f"{model} is loaded already")
        return
    headline = f"{model}: {size_text(llm.plan.model_memory)} loaded in {shown[0].seconds:.1f} s"
    shown[0].finish(headline)
    print(*(lines := [llm.plan.log_line(), *llm.notes]), sep="\n")
    for text in [headline, *lines]:
        _log.info("%s", text)


class Unload(LineCommand):
    """Frees the model, or ends the connection to a server first."""

    help = "free the model and its memory"

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:  # noqa: ARG002
        """Unload, and print the memory in use before and after."""
        session = context.session
        if session.disconnect():
            print("the connection is closed")
            leave_panel()
        if session.loaded is None:
            session.unload()
            print("nothing is loaded")
            return
        before = sessions.memory_in_use()
        session.unload()
        release_references(context.shell)
        print(f"memory in use: {size_text(before)} before, {size_text(sessions.memory_in_use())} after")


class Models(LineCommand):
    """Lists models: those on this machine, or those of the server."""

    help = "models on this machine"

    def execute(self, context: Context, parsed: argparse.Namespace) -> Table:  # noqa: ARG002
        """A table of the models."""
        remote = context.session.remote
        if remote is None:
            return models_table(sessions.cached_models())
        rows = tuple(
            (one.name, str(one.max_model_len or ""), one.parent or "", "connected" if one.name == remote.model else "")
            for one in remote.models()
        )
        return Table(("model", "context", "adapter of", ""), rows, f"served at {remote.base_url}")


def models_table(models: Sequence[Any]) -> Table:
    """Models on this machine."""
    rows = tuple((m.name, size_text(m.bytes), m.kind) for m in models)
    return Table(
        ("model", "size", "kind"), rows, "" if rows else "no models here yet; %vllm_metal load smollm2 fetches one"
    )
