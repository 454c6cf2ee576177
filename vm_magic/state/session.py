"""The notebook's state: the loaded model, its port, the conversations, the last reply.

One session per kernel. It lives in this module, which ``%reload_ext`` does not re-import, and so
outlives a reload. The engine is imported by the first command that needs it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.errors import EngineClosedError, RequestError
from engine.outputs import Reply
from engine.params.engine_args import EngineArgs
from engine.params.settings import Settings
from engine.runner.device.faults import check_device
from vm_magic.state.conversation import DEFAULT_CONVERSATION, Conversation

if TYPE_CHECKING:
    from engine.batch.kernel_bench import KernelBench
    from engine.llm import LLM
    from engine.models.weight_format import CachedModel
    from engine.openai.server import ServerHandle
    from vm_magic.remote.llm import RemoteLLM

Progress = Callable[[str, int, int], None]
MAX_RECORDS = 32
"""Recorded replies that are remembered."""


def new_llm(model: str, progress: Progress | None, **options: Any) -> "LLM":
    """Load ``model``; the one place where the engine is imported."""
    from engine.llm import LLM

    return LLM(model, progress=progress, **options)


def find_model(args: EngineArgs, progress: Progress) -> None:
    """Download ``args.model`` unless it is here, and look at its configuration.

    Raises ModelNotFoundError, ModelLoadError where it is not a language model, ConfigError for too long a length.
    """
    from engine.memory.plan import check_length
    from engine.models.model_config import read_model_config
    from engine.models.resolve import resolve

    config = read_model_config(resolve(args.model, args.revision, progress=progress), args)
    check_length(args.max_model_len, config.context_length)


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
        self.records: deque[list[dict[str, Any]]] = deque(maxlen=MAX_RECORDS)
        """What ``--record`` kept, the latest last: the turns of each reply."""
        self.pasted_environment: dict[str, str] = {}
        """Variables that the pasted text set, for the model that it served."""
        self._args: EngineArgs | None = None
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
            known = ", ".join(one.name for one in self.conversations.values() if one.messages) or "none yet"
            raise RequestError(f"--fork {source}: no such conversation; there are: {known}", param="fork")
        if earlier.messages:
            fix = "take another -c NAME, or add --new to replace it"
            raise RequestError(f"--fork {source}: conversation {name!r} has messages already; {fix}", param="fork")
        self.conversation(name).forked_from = source
        return Conversation(name, list(self.conversations[source].messages))

    def load(self, model: str, options: Mapping[str, Any], progress: Callable[[], Progress]) -> bool:
        """Load ``model`` with engine ``options``; another one that is loaded goes first, once this one is found.

        Returns False if it is loaded already with the same options. ``progress`` is called only
        if there is something to load.
        """
        args = EngineArgs.from_options(model, options)
        if self.loaded is not None and args == self._args:
            return False
        report = progress()
        if self.loaded is not None:
            find_model(args, report)
        self.unload()
        llm = new_llm(model, report, **options)
        llm.settings.adopt(self._settings)
        self.llm, self._args = llm, args
        self.pasted_environment = {}
        return True

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
            server = llm.serve(**_with_default_port(options))
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
        llm, self.llm, self._args = self.llm, None, None
        if llm is None:
            return False
        self._settings.adopt(llm.settings)
        llm.close()
        return True


def _with_default_port(options: Mapping[str, Any]) -> dict[str, Any]:
    from engine.openai.http.options import DEFAULT_PORT

    default = {} if "port" in options else {"port": DEFAULT_PORT, "port_is_default": True}
    return {**default, **options}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set ``variables`` for the time of a load, as a shell does for one command."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
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
