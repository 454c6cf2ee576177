"""The notebook's state: the loaded model, its port, the conversations, the last reply.

One session per kernel. It lives in this module, which ``%reload_ext`` does not re-import, and so
outlives a reload. The engine is imported by the first command that needs it.
"""

import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from engine.errors import EngineClosedError, RequestError
from engine.format.names import did_you_mean
from engine.outputs import Reply
from engine.params.engine_args import EngineArgs
from engine.params.settings import Settings
from engine.runner.device.faults import check_device
from vm_magic.state.conversation import DEFAULT_CONVERSATION, Conversation
from vm_magic.state.kept_model import KeptModel, add_to_message, load_variables
from vm_magic.state.talk import TalkMode

if TYPE_CHECKING:
    from engine.batch.kernel_bench import KernelBench
    from engine.llm import LLM
    from engine.models.weight_format import CachedModel
    from engine.openai.server import ServerHandle
    from vm_magic.remote.llm import RemoteLLM

Progress = Callable[[str, int, int], None]
MAX_RECORDS = 32
"""Recorded replies that are remembered."""
_KERNEL_KEY = f"sk-{secrets.token_urlsafe(24)}"
"""The key of a port that is given none: the same for the life of this kernel, so that clients go on."""


def new_llm(model: str, progress: Progress | None, **options: Any) -> "LLM":
    """Load ``model``; the one place where the engine is imported."""
    from engine.llm import LLM

    return LLM(model, progress=progress, **options)


def find_model(args: EngineArgs, progress: Progress) -> None:
    """Download ``args.model`` unless it is here, and check all that its files and ``args`` tell before a load.

    Raises ModelNotFoundError, ModelLoadError, ConfigError or MemoryPlanError, as the load would.
    """
    from engine.runtime.preflight import check_load

    check_load(args, progress)


def others_line(planned: int) -> str | None:
    """What other processes hold of this machine's memory beside ``planned`` bytes, in one line; None for none."""
    from engine.runtime.neighbours import neighbours, neighbours_line

    others = neighbours()
    if not others:
        return None
    from engine.runner.device.devices import describe_device, prepare_backend

    prepare_backend()
    return neighbours_line(planned, describe_device(), others)


def memory_in_use() -> int:
    """Bytes that the engine's device holds for this process."""
    from engine.llm import memory_in_use as measured

    return measured()


def new_plan(model: str, **options: Any) -> Any:
    """The memory plan of ``model`` without its weights."""
    import engine

    return engine.plan(model, **options)


def new_plan_table(model: str, **settings: Any) -> Any:
    """Plans of ``model`` for every combination of the lists in ``settings``."""
    import engine

    return engine.plan_table(model, **settings)


def new_card(model: str, **options: Any) -> Any:
    """What is understood of ``model`` before loading."""
    import engine

    return engine.inspect(model, **options)


def kernel_bench() -> "KernelBench":
    """A check of the GPU kernels that needs no model."""
    from engine.batch.kernel_bench import bench_kernels

    return bench_kernels()


def cached_models() -> "list[CachedModel]":
    """Models on this machine."""
    from engine.models import local

    return local.cached_models()


class Session:
    """What the magics share. Thread-safe where a detached reply touches it (plain assignments)."""

    def __init__(self) -> None:
        self.llm: LLM | None = None
        self.remote: RemoteLLM | None = None
        """The server that chats, completions, maps and settings go to; a loaded model stays beside it."""
        self.conversations: dict[str, Conversation] = {}
        self.last_reply: Reply | None = None
        self.talk: TalkMode | None = None
        """Whether cells of plain text are messages, and with which flags."""
        self.records: deque[list[dict[str, Any]]] = deque(maxlen=MAX_RECORDS)
        """What ``--record`` kept, the latest last: the turns of each reply."""
        self.pasted_environment: dict[str, str] = {}
        """Variables that the pasted text set, for the model that it served."""
        self._args: EngineArgs | None = None
        self._options: dict[str, Any] = {}
        self._variables: dict[str, str | None] = {}
        self._server_options: dict[str, Any] = {}
        self._settings = Settings()

    @property
    def loaded(self) -> "LLM | None":
        """The model, or None (also after somebody closed it)."""
        return None if self.llm is None or self.llm.closed else self.llm

    @property
    def server(self) -> "ServerHandle | None":
        """The open port, whoever opened it."""
        return None if self.llm is None else self.llm.server

    def remote_llm(self) -> "RemoteLLM":
        """The connected server's model; only where :attr:`remote` is not None."""
        assert self.remote is not None, "not connected"
        return self.remote

    def connect(self, remote: "RemoteLLM") -> None:
        """Send what can be remote to ``remote`` from now on; an earlier connection ends, settings go along."""
        settings = self.settings
        self.disconnect()
        remote.settings.adopt(settings)
        self.remote = remote

    def disconnect(self) -> bool:
        """Go back to the model of this kernel; settings stay. Returns False if there was no connection."""
        remote, self.remote = self.remote, None
        if remote is None:
            return False
        self.settings.adopt(remote.settings)
        remote.close()
        return True

    def require(self) -> "LLM":
        """The model; raises EngineClosedError when none is loaded, or it is closed, DeviceFailedError with the GPU."""
        llm = self.loaded
        if llm is None:
            check_device()
        if llm is None and self.llm is not None:
            again = f"%vllm_metal load {self.llm.args.model} loads it again"
            raise EngineClosedError(f"the model was closed, or its engine failed (%vllm_metal logs); {again}")
        if llm is None:
            raise EngineClosedError("no model is loaded; run %vllm_metal load smollm2 (or another model) first")
        return llm

    @property
    def settings(self) -> Settings:
        """The live settings: the remote model's, the loaded one's, or those that the next model will get."""
        if self.remote is not None:
            return self.remote.settings
        llm = self.loaded
        return self._settings if llm is None else llm.settings

    def conversation(self, name: str | None) -> Conversation:
        """The conversation of that name, made if it is new."""
        name = name or DEFAULT_CONVERSATION
        return self.conversations.setdefault(name, Conversation(name))

    def forked(self, source: str, earlier: Conversation) -> Conversation:
        """A copy of conversation ``source`` to go on with as ``earlier``, which must have no messages of its own.

        Raises RequestError where there is nothing to copy, or something in the way.
        """
        name = earlier.name
        if source == name:
            raise RequestError(f"--fork {source}: give the copy another name with -c NAME", param="fork")
        if source not in self.conversations or not self.conversations[source].messages:
            known = [one.name for one in self.conversations.values() if one.messages]
            hint = did_you_mean(source, known, f"there are: {', '.join(known) or 'none yet'}")
            raise RequestError(f"--fork {source}: no such conversation; {hint}", param="fork")
        if earlier.messages:
            fix = "take another -c NAME, or add --new to replace it"
            raise RequestError(f"--fork {source}: conversation {name!r} has messages already; {fix}", param="fork")
        self.conversation(name).forked_from = source
        return Conversation(name, list(self.conversations[source].messages))

    def load(self, model: str, options: Mapping[str, Any], progress: Callable[[str], Progress]) -> bool:
        """Load ``model`` with engine ``options``; another one goes first, once nothing speaks against this one.

        If the load fails all the same, the other one is loaded again, and its port opened. What is raised then says
        which model there is. Returns False if it is loaded already with the same options. ``progress(model)`` makes
        what is told of a load, and is called only if there is something to load.
        """
        args = EngineArgs.from_options(model, options)
        if self.loaded is not None and args == self._args:
            return False
        before = self._kept()
        report = progress(model)
        if before is not None:
            try:
                find_model(args, report)
            except Exception as error:
                add_to_message(error, f"{before.name} stays loaded")
                raise
        old = self.llm
        try:
            self.unload()
            self._load(args, options, report)
        except BaseException as error:
            if before is not None and old is not None:
                clear_frames(error.__traceback__)  # which may hold what was loaded so far
                add_to_message(error, self._load_again(before, old, progress))
            raise
        self.pasted_environment = {}
        return True

    def _load(self, args: EngineArgs, options: Mapping[str, Any], report: Progress) -> None:
        variables = load_variables()
        llm = new_llm(args.model, report, **options)
        self.llm, self._args, self._options, self._variables = llm, args, dict(options), variables
        llm.settings.adopt(self._settings)

    def _kept(self) -> KeptModel | None:
        """What loads the model again that is loaded now."""
        llm = self.loaded
        if llm is None or self._args is None:
            return None
        return KeptModel(self._args, self._options, self._variables, llm.args, self.pasted_environment, self.server)

    def _load_again(self, kept: KeptModel, old: "LLM", progress: Callable[[str], Progress]) -> str:
        """Load ``kept`` as it was; says what came of it, and raises nothing: the reason to do so is being raised."""
        try:
            old.close()  # an interrupt may have come while it closed
            with environment(kept.variables):
                self._load(kept.asked, kept.options, progress(kept.name))
            self.pasted_environment = kept.pasted_environment
            return kept.resume(self.require())
        except BaseException as error:  # noqa: BLE001  (■ too: one error is being raised already)
            why = " ".join(str(error).split()) or type(error).__name__
            return f"{kept.name} could not be loaded again ({why}): %vllm_metal {kept.command} tries once more"

    @property
    def server_options(self) -> Mapping[str, Any]:
        """What the user asked of the open port."""
        return {} if self.server is None else dict(self._server_options)

    @property
    def model_name(self) -> str | None:
        """What the user called the loaded model."""
        return self._args.model if self._args is not None and self.loaded is not None else None

    def check_server(self, options: Mapping[str, Any]) -> None:
        """Raise what :meth:`serve` would for ``options``, before anything is given up for it."""
        from engine.openai.server import want_server

        want_server(**_with_default_port(options)).check(self.server)

    def serve(self, options: Mapping[str, Any]) -> "ServerHandle":
        """Open the port with server ``options``; the same call again gives the same handle."""
        llm, server = self.require(), self.server
        if server is None or dict(options) != self._server_options:
            server = llm.serve(**_with_key(_with_default_port(options)))
            self._server_options = dict(options)
        return server

    def stop(self) -> bool:
        """Close the port. Returns False if there was none."""
        server = self.server
        if server is None:
            return False
        server.stop()
        return True

    def unload(self) -> bool:
        """Close port and model; settings and conversations stay. Returns False if nothing was loaded."""
        self.stop()
        self.disconnect()
        llm = self.llm
        if llm is None:
            return False
        self._settings.adopt(llm.settings)
        llm.close()
        self.llm = self._args = None  # not before: after an interrupt there is something to unload
        return True


def _with_default_port(options: Mapping[str, Any]) -> dict[str, Any]:
    from engine.openai.http.options import DEFAULT_PORT

    default = {} if "port" in options else {"port": DEFAULT_PORT, "port_is_default": True}
    return {**default, **options}


def _with_key(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the kernel's key where neither they nor ``VLLM_API_KEY`` say anything of keys."""
    said = options.get("api_key") or options.get("no_api_key") or os.environ.get("VLLM_API_KEY", "").strip()
    return dict(options) if said else {**options, "api_key": [_KERNEL_KEY]}


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set ``variables`` (None: unset them) for the time of a load, as a shell does for one command."""
    before = {name: os.environ.get(name) for name in variables}
    _set_all(variables)
    try:
        yield
    finally:
        _set_all(before)


def _set_all(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


_session: Session | None = None


def current_session() -> Session:
    """The kernel's session, made on first use."""
    global _session
    if _session is None:
        _session = Session()
    return _session


def close_session() -> None:
    """Free the model and forget the session. Closing twice is safe."""
    global _session
    session, _session = _session, None
    if session is not None:
        session.unload()


def peek_session() -> Session | None:
    """The kernel's session, if there is one."""
    return _session
