"""``LLM.map(replicas=…)``: the same answers in the same order, whichever copy of the model gave them."""

import io
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas
import pytest

from engine import LLM
from engine.batch import replicas as replicas_module
from engine.batch.map import Answer, MapInterrupted, MapRequest, map_prompts
from engine.batch.replica_process import Answers, Worker
from engine.batch.replicas import Member, Replica, ReplicaOrder, Replicas, replica_names, replicated
from engine.errors import ConfigError, EngineClosedError, RequestError
from tests.conftest import TinyModelDir

ROWS = [{"text": f"row {number} of a table"} for number in range(24)]
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "use_tqdm": False}


@pytest.fixture(scope="module")
def llm(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    options: dict[str, Any] = {"max_model_len": 256, "gpu_memory_utilization": 0.05, "max_num_seqs": 4}
    with LLM(str(tiny_model_dir("llama")), **options) as loaded:
        yield loaded


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Replica]:
    """The replicas that were made, and whose processes must be over when the test is."""
    found: list[Replica] = []

    class Kept(Replica):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            found.append(self)

    monkeypatch.setattr(replicas_module, "Replica", Kept)
    return found


def all_gone(made: list[Replica]) -> bool:
    return bool(made) and all(replica._process.poll() is not None for replica in made)


def test_two_processes_give_the_answers_of_one_in_the_order_of_the_rows(llm: LLM, made: list[Replica]) -> None:
    alone = llm.map(ROWS, "{{ text }}", **ASKED)
    shared = llm.map(ROWS, "{{ text }}", replicas=["cpu", "cpu"], **ASKED)
    columns = ["prompt", "text", "tokens", "prompt_tokens", "finish_reason"]
    pandas.testing.assert_frame_equal(alone[columns], shared[columns])
    assert shared.error.isna().all()
    assert all_gone(made)


def test_a_process_that_dies_leaves_its_prompts_to_the_others(llm: LLM, made: list[Replica]) -> None:
    alone = llm.map(ROWS, "{{ text }}", **ASKED)

    class Client:
        """Goes on where the replica has prompts, and then it is killed."""

        def __init__(self, several: Any) -> None:
            self.several, self.taken = several, 0

        @property
        def look_ahead(self) -> int:
            return len(ROWS)

        def check(self, params: Mapping[str, Any]) -> None:
            self.several.check(params)

        def submit(self, prompt: str, params: Mapping[str, Any]) -> Any:
            self.taken += 1
            if self.taken == len(ROWS) // 2:
                assert made[0]._jobs or made[0]._numbers
                os.kill(made[0]._process.pid, signal.SIGKILL)
            return self.several.submit(prompt, params)

    form = replicas_module.FormClient(_form(), {})
    with replicated(2, form(llm), llm, form) as several:
        assert isinstance(several, Replicas)
        several.wait()
        request = MapRequest.of("{{ text }}", {"temperature": 0, "max_tokens": 6})
        shared = map_prompts(Client(several), ROWS, request, keep=lambda frame: None, use_tqdm=False)
        assert [member.lost is None for member in several.members] == [True, False]
        assert "the replica on cpu is gone" in str(several.members[1].lost)
    assert list(shared.text) == list(alone.text)
    assert shared.error.isna().all()
    assert all_gone(made)


def _form() -> Any:
    from engine.batch.choices import AnswerForm

    return AnswerForm()


def test_an_interrupted_map_ends_its_processes(llm: LLM, made: list[Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, *args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.batch.map.MapRun._take_one", interrupt)
    with pytest.raises(MapInterrupted):
        llm.map(ROWS, "{{ text }}", replicas=2, **ASKED)
    assert all_gone(made)
    assert llm.map(ROWS[:0], "{{ text }}", **ASKED).empty


def test_a_model_that_cannot_be_loaded_there_is_said_and_the_own_one_goes_on(
    llm: LLM, made: list[Replica], caplog: pytest.LogCaptureFixture
) -> None:
    form = replicas_module.FormClient(_form(), {})
    order = ReplicaOrder(LLM, "/nowhere/at/all", {}, {}, form)
    with Replicas(["cpu", "cpu"], form(llm), "cpu", order) as several:
        several.wait()
        shared = map_prompts(
            several, ROWS[:3], MapRequest.of("{{ text }}", {"max_tokens": 2}), keep=lambda frame: None, use_tqdm=False
        )
    assert shared.error.isna().all()
    assert "the replica on cpu is gone: ModelNotFoundError" in caplog.text
    with pytest.raises(EngineClosedError, match="ModelNotFoundError"), Replicas(["cpu"], form(llm), "none", order):
        pass
    assert all_gone(made)


STUCK = """
import os, pickle, sys, time
from engine.batch.map import Answer
orders, answers = sys.stdin.buffer, sys.stdout.buffer
def send(*message):
    pickle.dump(message, answers)
    answers.flush()
order = pickle.load(orders)
send("ready", 4)
if order.model == "waits":
    number = pickle.load(orders)[1]
    orders.read(1)  # the next prompt is under way
    send("over", number, Answer("first", None, 1, 1, 0, 0.1, "stop"))
    while not os.path.exists(order.options["go on"]):
        time.sleep(0.01)
while orders.read(1 << 16):
    pass
"""


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Replica]:
    """Makes replicas without a model. The one called ``waits`` reads no further than the beginning of a second prompt,
    until there is a file of the name ``go on``."""
    (tmp_path / "stuck_replica.py").write_text(STUCK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(replicas_module, "PROCESS", "stuck_replica")
    form = replicas_module.FormClient(_form(), {})
    return lambda model, **options: Replica("cpu", ReplicaOrder(LLM, model, options, {}, form))


def test_answers_are_read_while_a_long_prompt_waits_to_be_taken(stuck: Callable[..., Replica], tmp_path: Path) -> None:
    replica = stuck("waits", **{"go on": str(tmp_path / "go")})
    over = threading.Event()
    first = replica.submit("short", {})
    first.when_over(over.set)
    writer = threading.Thread(target=replica.submit, args=("x" * 4_000_000, {}))
    writer.start()
    came = over.wait(20)
    assert writer.is_alive(), "nobody has read the long one"
    (tmp_path / "go").touch()
    writer.join()
    replica.close()
    assert came
    assert first.answer().text == "first"


def test_an_interrupt_while_processes_end_leaves_none_behind(
    stuck: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [stuck(name) for name in ("one", "other", "third")]
    several = several_fakes()
    several.members = [Member(replica.name, replica) for replica in made]
    several.wait()
    wait = made[1]._process.wait

    def interrupted(timeout: float | None = None) -> int:
        monkeypatch.setattr(made[1]._process, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(made[1]._process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        several.close()
    assert [replica._process.wait(20) is not None for replica in made] == [True] * 3
    for replica in made:
        replica.close()


def test_modules_in_the_working_folder_are_not_taken_for_the_ones_of_this_process(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[3]), *filter(None, sys.path)])
    monkeypatch.chdir(tmp_path)
    replica = Replica("cpu", ReplicaOrder(LLM, "/nowhere/at/all", {}, {}, replicas_module.FormClient(_form(), {})))
    assert replica.ready.wait(60)
    replica.close()
    assert "ModelNotFoundError" in str(replica.lost)


class FakeJob:
    """A prompt whose end the test decides."""

    num_tokens = 0

    def __init__(self, text: str) -> None:
        self.text, self.outcome, self.aborted = text, None, False
        self.callbacks: list[Callable[[], None]] = []
        self.outcome: Answer | Exception | None

    @property
    def stream(self) -> "FakeJob":
        return self

    def when_over(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def abort(self) -> None:
        self.aborted = True

    def answer(self) -> Answer:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def end(self, outcome: Answer | Exception) -> None:
        self.outcome = outcome
        for callback in self.callbacks:
            callback()


class FakeClient:
    look_ahead = 4

    def __init__(self) -> None:
        self.jobs: list[FakeJob] = []
        self.closed = False

    def check(self, params: Mapping[str, Any]) -> None:
        return

    def submit(self, prompt: str, params: Mapping[str, Any]) -> FakeJob:
        if self.closed:
            raise EngineClosedError("closed")
        self.jobs.append(FakeJob(prompt))
        return self.jobs[-1]


def several_fakes(*clients: FakeClient) -> Replicas:
    own = clients[0] if clients else FakeClient()
    found = Replicas([], own, "0", ReplicaOrder(LLM, "", {}, {}, lambda model: own))
    found.members = [Member(str(number), client) for number, client in enumerate(clients)]
    return found


def answer(text: str) -> Answer:
    return Answer(text, None, 1, 1, 0, 0.1, "stop")


def test_prompts_go_where_most_room_is_and_to_another_where_an_engine_closed() -> None:
    one, other = FakeClient(), FakeClient()
    other.look_ahead = 8
    several = several_fakes(one, other)
    jobs = [several.submit(str(number), {}) for number in range(12)]
    assert (len(one.jobs), len(other.jobs)) == (4, 8)
    over = threading.Event()
    jobs[0].when_over(over.set)
    one.closed = True
    for job in list(one.jobs):
        job.end(EngineClosedError("closed"))
    assert not over.is_set()
    assert len(other.jobs) == 12
    for job in other.jobs:
        job.end(answer(f"answer {job.text}"))
    assert over.is_set()
    assert [job.answer().text for job in jobs] == [f"answer {number}" for number in range(12)]
    assert all(member.num_jobs == 0 for member in several.members)
    several.submit("more", {})
    assert other.jobs[-1].text == "more"


def test_an_error_of_the_prompt_is_its_own_and_the_last_engine_to_close_ends_the_map() -> None:
    one, other = FakeClient(), FakeClient()
    several = several_fakes(one, other)
    wrong, cut, unlucky = (several.submit(name, {}) for name in ("wrong", "cut", "unlucky"))
    one.jobs[0].end(RequestError("too long"))
    with pytest.raises(RequestError, match="too long"):
        wrong.answer()
    cut.abort()
    assert other.jobs[0].aborted
    other.closed = one.closed = True
    other.jobs[0].end(EngineClosedError("closed"))
    with pytest.raises(EngineClosedError):
        cut.answer()
    assert len(one.jobs) == 2, "what was aborted is not begun again"
    one.jobs[1].end(EngineClosedError("closed"))
    with pytest.raises(EngineClosedError):
        unlucky.answer()
    with pytest.raises(EngineClosedError):
        several.submit("more", {})


def test_an_answer_that_cannot_be_read_is_told_to_who_asks_and_not_to_the_engines_thread() -> None:
    client = FakeClient()
    job = several_fakes(client).submit("odd", {})
    client.jobs[0].end(ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        job.answer()


def test_a_process_whose_answer_cannot_be_read_goes_on() -> None:
    stream = io.BytesIO()
    client = FakeClient()
    worker = Worker(client, Answers(stream))
    orders = [("submit", 0, "odd", {}), ("submit", 1, "fine", {})]
    worker.follow(io.BytesIO(b"".join(map(pickle.dumps, orders))))
    client.jobs[0].end(ValueError("odd"))
    client.jobs[1].end(answer("fine"))
    stream.seek(0)
    assert [str(pickle.load(stream)[2]) for _ in range(2)] == ["ValueError: odd", str(answer("fine"))]


GPUS = ["cuda:0", "cuda:1", "cpu"]


@pytest.mark.parametrize(
    ("wanted", "own", "there", "found"),
    [
        (1, "cuda:0", GPUS, ["cuda:0"]),
        (2, "cuda:1", GPUS, ["cuda:1", "cuda:0"]),
        (["cuda:1", "cuda:0"], "cuda:0", GPUS, ["cuda:1", "cuda:0"]),
        (["CUDA:1"], "cuda:0", GPUS, ["cuda:1"]),
        (("gpu", "cuda:1"), "cuda:0", GPUS, ["cuda:0", "cuda:1"]),
        (3, "cpu", ["cpu"], ["cpu"] * 3),
        (["metal"], "metal", ["metal", "cpu"], ["metal"]),
        (3, "cuda:0", GPUS, "replicas=3: a GPU takes one, and this machine has cuda:0 and cuda:1 and cpu"),
        (2, "metal", ["metal", "cpu"], "a GPU takes one, and this machine has metal and cpu"),
        (0, "cpu", ["cpu"], "replicas=0: must be at least 1"),
        (True, "cpu", ["cpu"], "give how many, or a list of devices such as"),
        ("cuda:1", "cuda:0", GPUS, "give how many, or a list of devices such as"),
        ([], "cpu", ["cpu"], "give how many, or a list of devices such as"),
        (["cuda:2"], "cuda:0", GPUS, "cuda:2 is not here; this machine has cuda:0 and cuda:1 and cpu"),
        (["cuda:1", "cuda:1"], "cuda:0", GPUS, "cuda:1 is there twice: a GPU takes one"),
        (["gpu"], "cpu", ["cpu"], "gpu is not here; this machine has cpu"),
    ],
)
def test_replicas_are_a_number_or_devices_that_are_here(
    monkeypatch: pytest.MonkeyPatch, wanted: Any, own: str, there: list[str], found: list[str] | str
) -> None:
    monkeypatch.setattr(replicas_module, "device_names", lambda: there)
    if isinstance(found, list):
        assert replica_names(wanted, own) == found
        return
    with pytest.raises(ConfigError) as caught:
        replica_names(wanted, own)
    assert found in str(caught.value)
