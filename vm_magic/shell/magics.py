"""``%vllm_metal``, ``%chat`` and ``%%chat`` in a shell. What they do is imported by the first one that is used."""

from collections.abc import Callable, Mapping
from typing import Any

from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from traitlets import Bool, TraitError
from traitlets.config import Config

from engine.errors import VMMagicError
from engine.openai.http.ring_log import RingLog
from engine.runtime.interrupt import ended_with_interrupt
from vm_magic.shell.shadowed_engine import EngineShadowedError, check_engine, shadow_report
from vm_magic.show.errors import HelpShown, Interrupted, short_error
from vm_magic.show.terminal import say
from vm_magic.state.cell_record import unnoted
from vm_magic.state.live_settings import LiveTraits


@magics_class
class VLLMMetal(LiveTraits, Magics):  # type: ignore[misc]
    """A language model inside this kernel. Its name is what ``%config VLLMMetal.…`` says."""

    short_errors = Bool(True, help="Show errors as one line; False shows tracebacks.").tag(config=True)

    record = Bool(False, help="Record every reply, as --record does; --no-record leaves one out.").tag(config=True)

    def __init__(self, shell: Any, logs: RingLog) -> None:
        super().__init__(shell=shell, config=Config())
        self.logs = logs

    def configure(self, values: Mapping[str, Any]) -> None:
        """Set ``values`` as a configuration file does. A bad one is reported in one line; the others are kept."""
        for name, value in values.items():
            try:
                self.update_config(Config({type(self).__name__: {name: value}}))
            except (VMMagicError, TraitError) as error:
                say(f"{type(self).__name__}.{name} is left out: {error}", error=True)

    @no_var_expand  # type: ignore[untyped-decorator]
    @line_cell_magic  # type: ignore[untyped-decorator]
    def vllm_metal(self, line: str, cell: str | None = None) -> Any:
        """Run a language model inside this kernel: %vllm_metal --help lists the commands."""
        try:
            check_engine()
        except EngineShadowedError as error:
            report = shadow_report(error, line)
            if report is None:
                raise
            say(report)
            return None
        return self.shielded(lambda: self._run(line, cell))

    @no_var_expand  # type: ignore[untyped-decorator]
    def chat_line(self, line: str) -> Any:
        """Send a message to the loaded model: %vllm_metal chat --help lists the flags."""
        check_engine()
        return self.shielded(lambda: self._run(f"chat {line}", None))

    @no_var_expand  # type: ignore[untyped-decorator]
    def chat_cell(self, line: str, cell: str) -> Any:
        """Send the cell's body to the loaded model: %vllm_metal chat --help lists the flags."""
        check_engine()
        return self.shielded(lambda: self._run(f"chat {line}", cell))

    def shielded(self, action: Callable[[], Any]) -> Any:
        """Run ``action``; errors become one line unless ``short_errors`` is off."""
        try:
            with ended_with_interrupt():
                return action()
        except HelpShown as help_text:
            say(help_text.text)
            return None
        except Exception as error:
            if not self.short_errors:
                raise
            failure: BaseException = short_error(error)
        except Interrupted:
            raise
        except KeyboardInterrupt:  # ■ before there was a request, or after it had ended
            if not self.short_errors:
                raise
            failure = Interrupted("stopped; the model stays loaded")
        raise failure  # outside of the except block: the original and its frames are not kept alive

    def _run(self, line: str, cell: str | None) -> Any:
        from vm_magic.commands.base import Context
        from vm_magic.commands.table import run

        with unnoted(self.shell):
            return run(Context(self.shell, self.logs, self.record), line, cell)
