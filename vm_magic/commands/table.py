"""What ``%vllm_metal`` and ``%%chat`` do: parse the line, call the session, show what came of it."""

import argparse
import difflib
import logging
import os
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.display import display

from engine.errors import ConfigError
from engine.openai.http.ring_log import RingLog
from engine.params.engine_args import ENGINE_FLAGS
from vm_magic.commands import arguments
from vm_magic.commands.arguments import COMMANDS, command_parser, pick, split_text, split_words
from vm_magic.commands.cards import StatusCard, metrics_table, models_table, status_card
from vm_magic.commands.chat_command import talk
from vm_magic.commands.history_view import HistoryView, conversations_table, history_view
from vm_magic.commands.remote_cards import refuse_remote, remote_card, remote_metrics, remote_models
from vm_magic.commands.score_command import score_command
from vm_magic.commands.shell_text import read_shell_text
from vm_magic.panel import close_left_panel, close_panel, open_panel, panel_bundle, panel_line
from vm_magic.show.display import can_update
from vm_magic.show.errors import HelpShown, Interrupted
from vm_magic.show.progress import LoadProgress, size_text
from vm_magic.show.tables import Table, settings_text
from vm_magic.state import session as sessions
from vm_magic.state.live_settings import change_settings
from vm_magic.state.references import release_references
from vm_magic.state.session import Session, environment
from vm_magic.state.settings_text import MEMORY_NAMES, read_settings

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle

_log = logging.getLogger(__name__)
_ENGINE_OPTIONS = tuple(flag.field for flag in ENGINE_FLAGS)


class Commands:
    """The commands of one shell. ``logs`` are what ``%vllm_metal logs`` shows."""

    def __init__(self, shell: Any, logs: RingLog) -> None:
        self.shell = shell
        self.logs = logs

    @property
    def session(self) -> Session:
        """The kernel's session."""
        return sessions.current_session()

    def run(self, line: str, cell: str | None) -> Any:
        """Run the command that ``line`` begins with; none at all is ``status``. What it returns is the cell's value."""
        name, _, rest = line.strip().partition(" ")
        if name in ("-h", "--help", "help"):
            print(overview())
            return None
        name = name or "status"
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise UsageError(
                f"no command {name!r}; " + (f"did you mean {close[0]}?" if close else "see %vllm_metal --help")
            )
        refuse_remote(self.session, name, rest)
        if name in ("chat", "complete"):
            return talk(self.session, self.shell, name, rest, cell)
        if name == "grid":
            return self._grid(rest, cell)
        if name == "score":
            words, text = split_text(command_parser(name), rest)
            return score_command(self.session, self.shell, command_parser(name).read(words), text, cell)
        if name == "set":
            return self._set(rest, cell)
        parsed = command_parser(name).read(split_words(rest)) if cell is None or name != "serve" else None
        if parsed is None:
            return self._serve_pasted(rest, cell or "")
        if cell is not None:
            raise UsageError(f"%%vllm_metal {name} takes no cell; write %vllm_metal {name}")
        return getattr(self, f"_{name}")(parsed)

    # -- models ------------------------------------------------------------------------------------

    def _load(self, parsed: argparse.Namespace) -> None:
        had_port = self.session.server is not None
        self._load_model(parsed.model, pick(parsed, _ENGINE_OPTIONS))
        if had_port and self.session.server is None:
            print("the port closed with the model before; %vllm_metal serve opens it for this one")

    def _load_model(self, model: str, options: dict[str, Any]) -> None:
        """Load and say what came of it; ■ leaves nothing half-loaded."""
        shown: list[LoadProgress] = []

        def progress() -> LoadProgress:
            shown.append(LoadProgress(self.shell, model))
            shown[0].open()  # known by then, so that an interrupt while it opens still ends it
            return shown[0]

        try:
            loaded = self.session.load(model, options, progress)
        except BaseException as error:
            for bar in shown:
                bar.finish(f"{model}: not loaded")
            if isinstance(error, KeyboardInterrupt):
                kept = "nothing" if self.session.loaded is None else self.session.model_name
                raise Interrupted(f"loading stopped; {kept} is loaded") from None
            raise
        llm = self.session.require()
        if not loaded:
            print(f"{model} is loaded already")
            return
        headline = f"{model}: {size_text(llm.plan.model_memory)} loaded in {shown[0].seconds:.1f} s"
        shown[0].finish(headline)
        print(*(lines := [llm.plan.log_line(), *llm.notes]), sep="\n")
        for text in [headline, *lines]:
            _log.info("%s", text)

    def _serve(self, parsed: argparse.Namespace, *, compare: bool = False) -> "ServerHandle":
        """Open the port; a model that is loaded stays, unless flags (or ``compare``: variables) ask for another."""
        options = pick(parsed, _ENGINE_OPTIONS)
        model = parsed.model or self.session.model_name
        if model is None:
            raise ConfigError("serve which model? Nothing is loaded; write %vllm_metal serve smollm2", flag="model")
        wanted = pick(parsed, arguments.SERVER_OPTIONS)
        if options or compare or model != self.session.model_name:
            self.session.check_server(wanted)
            self._load_model(model, options)
        return self.session.serve(wanted)

    def _serve_pasted(self, line: str, cell: str) -> "ServerHandle | None":
        pasted = read_shell_text(cell, os.environ)
        for note in pasted.notes:
            print(note)
        words = [*pasted.arguments, *split_words(line)]
        if not words:
            raise ConfigError("no vllm serve line in this cell; paste one, such as: vllm serve smollm2", flag="serve")
        with environment(pasted.environment):
            about_memory = any(name.startswith("VLLM_METAL_") for name in pasted.environment)
            server = self._serve(command_parser("serve").read(words), compare=about_memory)
        self.session.pasted_environment = dict(pasted.environment)
        return server

    def _stop(self, _: argparse.Namespace) -> None:
        print("the port is closed; the model stays loaded" if self.session.stop() else "no port is open")

    def _unload(self, _: argparse.Namespace) -> None:
        if self.session.disconnect():
            print("the connection is closed")
            self._leave_panel()
        if self.session.loaded is None:
            self.session.unload()
            print("nothing is loaded")
            return
        before = sessions.memory_in_use()
        self.session.unload()
        release_references(self.shell)
        print(f"memory in use: {size_text(before)} before, {size_text(sessions.memory_in_use())} after")

    def _plan(self, parsed: argparse.Namespace) -> Any:
        from vm_magic.commands.plan_command import make_plan

        return make_plan(self.session, parsed)

    def _models(self, _: argparse.Namespace) -> Table:
        if self.session.remote is not None:
            return remote_models(self.session.remote)
        return models_table(sessions.cached_models())

    # -- state -------------------------------------------------------------------------------------

    def _connect(self, parsed: argparse.Namespace) -> None:
        from vm_magic.commands.connect import connect

        print(connect(self.session, parsed, self.shell.user_ns))
        self._leave_panel()

    def _status(self, _: argparse.Namespace) -> StatusCard:
        return status_card(self.session) if self.session.remote is None else remote_card(self.session)

    def _panel(self, parsed: argparse.Namespace) -> None:
        if parsed.close:
            print("the panel is closed" if close_panel() else "no panel is open")
        elif can_update(self.shell):
            display(panel_bundle(open_panel(), self.session), raw=True)
        else:
            print(panel_line(self.session))

    def _leave_panel(self) -> None:
        if close_left_panel():
            print("the panel is closed with what it showed; %vllm_metal panel opens the one of what is asked now")

    def _set(self, text: str, cell: str | None) -> None:
        if cell is not None:
            raise UsageError("%%vllm_metal set takes no cell; write %vllm_metal set")
        if text.strip() in ("-h", "--help"):
            raise HelpShown(command_parser("set").format_help())
        values = read_settings(text)
        change_settings(self.session, values)
        if any(name in MEMORY_NAMES for name in values):
            print(self.session.require().plan.log_line())
        if set(values) - set(MEMORY_NAMES) or not values:
            print(settings_text(self.session.settings) or "nothing is set: the model's own defaults hold")

    def _reset(self, parsed: argparse.Namespace) -> None:
        named = [self.session.conversation(parsed.name)]
        for conversation in self.session.conversations.values() if parsed.all else named:
            count = len(conversation.messages)
            conversation.clear()
            print(f"conversation {conversation.name!r}: {count} messages forgotten")

    def _history(self, parsed: argparse.Namespace) -> HistoryView | Table:
        if parsed.list:
            return conversations_table(self.session.conversations)
        return history_view(self.session.conversation(parsed.name), self.session.conversations)

    def _explain(self, parsed: argparse.Namespace) -> Any:
        from vm_magic.show.explain_view import ExplainView

        return ExplainView(self.session.require().explain(parsed.count))

    def _export(self, parsed: argparse.Namespace) -> Any:
        from vm_magic.commands import client_commands

        if parsed.client is None:
            return client_commands.export_server(self.session, show_key=parsed.show_key)
        return client_commands.export_client(self.session, parsed.client, show_key=parsed.show_key)

    def _llm(self, parsed: argparse.Namespace) -> Any:
        from vm_magic.commands import client_commands

        if parsed.show:
            return client_commands.show_llm_entry(self.session, parsed.model_id)
        print(client_commands.write_llm_entry(self.session, parsed.model_id))
        return None

    def _bench(self, parsed: argparse.Namespace) -> Table:
        from vm_magic.show.bench_view import run_bench

        return run_bench(self.session.require(), parsed, self.shell)

    def _logs(self, parsed: argparse.Namespace) -> None:
        lines = self.logs.lines[-parsed.count :]
        print("\n".join(lines) or "no log lines yet")

    def _metrics(self, _: argparse.Namespace) -> Table:
        if self.session.remote is not None:
            return remote_metrics(self.session.remote)
        return metrics_table(self.session.require().metrics.registry)

    # -- chat and complete -------------------------------------------------------------------------

    def _grid(self, line: str, cell: str | None) -> Any:
        """Both forms: a cell shows its table and files the DataFrame, a line returns it."""
        from vm_magic.commands.grid_command import run_grid_command

        parser = command_parser("grid")
        words, text = split_text(parser, line)
        parsed = parser.read(words)
        if cell is not None and text:
            raise UsageError(f"{text!r} is no flag; the prompt goes into the cell's body")
        return run_grid_command(self.session, self.shell, parsed, text if cell is None else cell, returned=cell is None)


def overview() -> str:
    """The list of commands."""
    lines = [f"  {name.ljust(9)} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["%vllm_metal COMMAND", "", *lines, "", "%vllm_metal COMMAND --help shows a command's flags."])
