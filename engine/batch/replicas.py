"""``LLM.map(replicas=…)``: the same model several times, each in a process and on a device of its own.

A replica is a :class:`MapClient` whose prompts go to another process: MLX is no engine for two GPUs in one (see
:mod:`engine.runner.device.placement`), and one interpreter would build the steps of both in turn.
"""

import itertools
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, Field, dataclass, fields, replace
from types import TracebackType
from typing import Any, Protocol, Self

from engine.batch.map import Answer, MapClient, MapJob, PromptStream
from engine.errors import ConfigError, EngineClosedError, RequestError
from engine.params.engine_args import EngineArgs
from engine.params.settings import Settings
from engine.runner.device.placement import device_names, environment_of, own_name

logger = logging.getLogger("engine")
PROCESS = "engine.batch.replica_process"
_END_SECONDS = 10.0
"""How long a replica may take to free its model before it is ended."""
_WAIT_SLICE = 0.2
_TAIL = 400


class MakeClient(Protocol):
    """What asks a model in the form that a map wants, pickled and called where the model is."""

    def __call__(self, model: Any) -> MapClient:
        """The client of ``model``."""


@dataclass(frozen=True)
class ReplicaOrder:
    """What a replica's process is told first: ``load(model, **options)`` gives the model there."""

    load: Callable[..., Any]
    model: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    client: MakeClient


@dataclass(frozen=True)
class FormClient:
    """The client that ``form`` makes (see :class:`engine.batch.choices.AnswerForm`)."""

    form: Any
    params: Mapping[str, Any]

    def __call__(self, model: Any) -> MapClient:
        """The client of ``model``."""
        client: MapClient = self.form.of(model, self.params)[0]
        return client


class ReplicaLostError(EngineClosedError):
    """A replica's process ended, or its engine failed: its prompts can go to another."""


class PendingAnswer:
    """What becomes of a prompt."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._outcome: Answer | Exception | None = None

    def answer(self) -> Answer:
        """What came; raises what ended the request."""
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None, "the request is under way"
        return self._outcome

    def when_over(self, callback: Callable[[], None]) -> None:
        """``callback()`` once the request is over; at once if it is."""
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback()

    def end(self, outcome: Answer | Exception) -> None:
        """The request is over. Only the first outcome counts."""
        with self._lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class ReplicaJob(PendingAnswer):
    """A prompt in a replica: its stream and its answer."""

    def __init__(self, number: int, abort: Callable[[int], None]) -> None:
        super().__init__()
        self.num_tokens = 0
        self._number, self._abort = number, abort

    @property
    def stream(self) -> PromptStream:
        """Its request."""
        return self

    def abort(self) -> None:
        """End the request soon."""
        self._abort(self._number)

    def end(self, outcome: Answer | Exception) -> None:
        """The request is over. Only the first outcome counts."""
        if isinstance(outcome, Answer):
            self.num_tokens = outcome.tokens
        super().end(outcome)


class Replica:
    """A model in a process of its own, which loads it meanwhile: prompts may be handed over at once."""

    look_ahead = 0
    """How many prompts fill it; 0 while it loads."""

    def __init__(self, name: str, order: ReplicaOrder) -> None:
        self.name = name
        self.lost: str | None = None
        """Why nothing more can be asked of it."""
        self.ready = threading.Event()
        """Set once it has loaded its model, or is lost."""
        self._jobs: dict[int, ReplicaJob] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """A lock of its own: a write may wait until the process reads, which may wait until its answers are read."""
        self._closing = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROCESS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(name),
            start_new_session=True,  # Ctrl-C in a terminal is for this process, which then ends the others' requests
        )
        self._reader = threading.Thread(target=self._read, name=f"replica-{name}", daemon=True)
        self._reader.start()
        self._tell(order)

    def check(self, params: Mapping[str, Any]) -> None:
        """Nothing: who hands prompts over has checked them with the same model."""

    def submit(self, prompt: str, params: Mapping[str, Any]) -> ReplicaJob:
        """Begin. Raises ReplicaLostError."""
        number = next(self._numbers)
        job = ReplicaJob(number, lambda number: self._tell(("abort", number)))
        with self._lock:
            if self.lost is not None:
                raise ReplicaLostError(self.lost)
            self._jobs[number] = job
        self._tell(("submit", number, prompt, dict(params)))
        return job

    def end(self) -> None:
        """Have the process free its model and end, at once where it still loads; waits for nothing. Safe to repeat."""
        self._closing = True
        if not self.ready.is_set():
            self._process.kill()
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:  # what it was to be told last cannot reach it
            logger.debug("the replica on %s had ended", self.name)

    def close(self) -> None:
        """:meth:`end`, and wait for it; where it takes too long, or at an interrupt, it is killed. Safe to repeat."""
        self.end()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            logger.debug("the replica on %s did not end by itself", self.name)
        finally:
            self._process.kill()  # nothing happens to one that has ended
        self._process.wait()
        self._reader.join()
        self._errors.close()

    def _tell(self, message: object) -> None:
        """Send ``message``. A process that is gone is noticed by whoever reads from it."""
        assert self._process.stdin is not None
        content = pickle.dumps(message)
        try:
            with self._writing:
                self._process.stdin.write(content)
                self._process.stdin.flush()
        except (OSError, ValueError):
            logger.debug("the replica on %s cannot be told anything any more", self.name)

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        why = "its process ended"
        try:
            while True:
                kind, *rest = pickle.load(stream)
                if kind == "lost":
                    why = rest[0]
                    break
                self._take(kind, *rest)
        except (EOFError, OSError, pickle.UnpicklingError):
            why = self._last_words() or why
        finally:
            stream.close()
            self._lose(why)

    def _take(self, kind: str, *rest: Any) -> None:
        if kind == "ready":
            self.look_ahead = rest[0]
            self.ready.set()
        elif kind == "tokens":
            for number, count in rest[0].items():
                if (job := self._jobs.get(number)) is not None:
                    job.num_tokens = count
        else:
            number, outcome = rest
            with self._lock:
                known = self._jobs.pop(number, None)
            if known is not None:
                known.end(outcome)

    def _lose(self, why: str) -> None:
        with self._lock:
            self.lost = f"the replica on {self.name} is gone: {why}"
            self.look_ahead = 0
            jobs, self._jobs = list(self._jobs.values()), {}
        self.ready.set()
        if not self._closing:
            logger.error("%s", self.lost)
        for job in jobs:
            job.end(ReplicaLostError(self.lost))

    def _last_words(self) -> str:
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][-_TAIL:] if lines else ""


class SharedJob(PendingAnswer):
    """A prompt of several replicas: where the one that has it is lost, another gets it."""

    def __init__(self, replicas: "Replicas", prompt: str, params: Mapping[str, Any]) -> None:
        super().__init__()
        self._replicas, self._prompt, self._params = replicas, prompt, params
        self._aborted = False
        self._job: MapJob | None = None

    @property
    def stream(self) -> PromptStream:
        """Its request."""
        return self

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return 0 if self._job is None else self._job.stream.num_tokens

    def begin(self) -> None:
        """Hand the prompt to the replica that has most room. Raises RequestError where only this prompt is wrong."""
        while True:
            member = self._replicas.next_member()
            try:
                job = self._job = member.client.submit(self._prompt, self._params)
                break
            except EngineClosedError as error:
                member.lost = str(error)
        self._replicas.count(member, 1)
        if self._aborted:
            job.stream.abort()
        job.stream.when_over(lambda: self._ended(member))

    def abort(self) -> None:
        """End the request soon."""
        self._aborted = True
        if self._job is not None:
            self._job.stream.abort()

    def _ended(self, member: "Member") -> None:
        self._replicas.count(member, -1)
        assert self._job is not None
        outcome: Answer | Exception
        try:
            outcome = self._job.answer()
        except EngineClosedError as error:  # no fault of the prompt's
            outcome, member.lost = error, str(error)
            if not self._aborted:
                refused = self._begun_again()
                if refused is None:
                    return
                outcome = refused
        except Exception as error:  # noqa: BLE001 - this may be an engine's thread; whoever asks for the answer raises it
            outcome = error
        self.end(outcome)

    def _begun_again(self) -> Exception | None:
        """Why no other replica has the prompt now; None if one has."""
        try:
            self.begin()
        except (RequestError, EngineClosedError) as error:
            return error
        return None


@dataclass(eq=False)
class Member:
    """One of several: its client, and how many prompts it has. ``lost``: why nothing more can be asked of it."""

    name: str
    client: MapClient
    num_jobs: int = 0
    lost: str | None = None


class Replicas:
    """Several clients as one. A context: at its end every process that it started is over and has freed its model.

    ``own`` is this process's model, on the device ``own_name``: it takes prompts where that is one of ``names``.
    """

    def __init__(self, names: Sequence[str], own: MapClient, own_name: str, order: ReplicaOrder) -> None:
        self._names, self._own, self._own_name, self._order = names, own, own_name, order
        self._lock = threading.Lock()
        self.members: list[Member] = []

    def __enter__(self) -> Self:
        left = list(self._names)
        if self._own_name in left:
            left.remove(self._own_name)
            self.members.append(Member(self._own_name, self._own))
        try:
            for name in left:
                options = {**self._order.options, "device": "cpu" if name == "cpu" else "auto"}
                self.members.append(Member(name, Replica(name, replace(self._order, options=options))))
            if len(left) == len(self._names):
                self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def look_ahead(self) -> int:
        """Enough for those that have loaded their model."""
        return max(1, sum(member.client.look_ahead for member in self.members))

    def wait(self) -> None:
        """Wait until each has loaded its model; raises EngineClosedError where none did."""
        for member in self.members:
            if isinstance(member.client, Replica):
                while not member.client.ready.wait(_WAIT_SLICE):
                    pass
        self.next_member()

    def check(self, params: Mapping[str, Any]) -> None:
        """Raise for parameters that no prompt could have."""
        self._own.check(params)

    def count(self, member: Member, more: int) -> None:
        """Note that ``member`` has so many prompts more."""
        with self._lock:
            member.num_jobs += more

    def submit(self, prompt: str, params: Mapping[str, Any]) -> SharedJob:
        """Begin where there is most room. Raises RequestError where only this prompt is wrong."""
        job = SharedJob(self, prompt, params)
        job.begin()
        return job

    def next_member(self) -> Member:
        """The one with the most room, of those that have loaded if any has. Raises EngineClosedError: all are lost."""
        for member in self.members:
            if isinstance(member.client, Replica) and member.client.lost is not None:
                member.lost = member.client.lost
        alive = [member for member in self.members if member.lost is None]
        if not alive:
            raise EngineClosedError("; ".join(str(member.lost) for member in self.members))
        loaded = [member for member in alive if member.client.look_ahead]
        return min(loaded or alive, key=lambda member: member.num_jobs / max(1, member.client.look_ahead))

    def close(self) -> None:
        """End the processes, all of them also where an interrupt comes between."""
        with ExitStack() as closing:
            for member in self.members:
                if isinstance(member.client, Replica):
                    closing.callback(member.client.close)
                    member.client.end()


def replica_names(wanted: int | Sequence[str], own: str | None = None) -> list[str]:
    """The devices of ``replicas=``: names, or how many, this process's own first. Raises ConfigError.

    A CPU may have several, a GPU one: a second copy of a model there only takes its memory.
    """
    there, own = device_names(), own or own_name()
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        others = [name for name in there if name.startswith("cuda:") and name != own]
        names = [own] * wanted if own == "cpu" else [own, *others][:wanted]
        if wanted < 1:
            raise _refused(wanted, "must be at least 1")
        if len(names) < wanted:
            raise _refused(wanted, f"a GPU takes one, and this machine has {' and '.join(there)}")
        return names
    names = [str(name).strip().lower() for name in wanted] if not isinstance(wanted, str | bool | int) else []
    names = [there[0] if name in ("gpu", there[0].partition(":")[0]) and there[0] != "cpu" else name for name in names]
    if not names:
        raise _refused(wanted, "give how many, or a list of devices such as ['cuda:0', 'cuda:1']")
    for name in names:
        if name not in there:
            raise _refused(wanted, f"{name} is not here; this machine has {' and '.join(there)}")
        if name != "cpu" and names.count(name) > 1:
            raise _refused(wanted, f"{name} is there twice: a GPU takes one")
    return names


class ReplicatedModel(Protocol):
    """What of :class:`engine.llm.LLM` its replicas are made like."""

    args: EngineArgs
    settings: Settings


@contextmanager
def replicated(
    wanted: int | Sequence[str] | None, own: MapClient, model: ReplicatedModel, client: MakeClient
) -> Iterator[MapClient]:
    """What a map asks: ``own``, the client of ``model``, or several such models as one. Raises ConfigError."""
    if wanted is None:
        yield own
        return
    here = own_name()
    names = replica_names(wanted, here)
    if names == [here]:
        yield own
        return
    left_out, args = ("model", "memory_flag", "device"), model.args
    options = {
        each.name: getattr(args, each.name)
        for each in fields(args)
        if each.name not in left_out and getattr(args, each.name) != _default(each)
    }
    order = ReplicaOrder(type(model), args.model, options, model.settings.everything(), client)
    with Replicas(names, own, here, order) as several:
        yield several


def _default(each: "Field[Any]") -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _refused(wanted: object, why: str) -> ConfigError:
    return ConfigError(f"replicas={wanted!r}: {why}", flag="replicas", value=wanted)


def _environment(name: str) -> dict[str, str]:
    """As this process's, with the device ``name``, and this process's modules; none of the working folder beside."""
    paths = [path or os.getcwd() for path in sys.path]
    return {**environment_of(name), "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
