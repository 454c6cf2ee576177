"""Measures the device when asked, and tells how near the engine's steps came to its best."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import EngineClosedError
from engine.explain.speed import Speed, SpeedFacts, running_speed
from engine.memory.roofline import DeviceSpeed, ModelWork
from engine.outputs import StepTotals
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import choose_blas, describe_device
from engine.runner.kv.attention_path import AttentionPath

if TYPE_CHECKING:
    from engine.memory.plan import MemoryPlan
    from engine.runtime.engine_thread import EngineThread
    from engine.runtime.llm_engine import LLMEngine

NOT_MEASURED = "the device was not measured yet"
BUSY = "the device is measured only while no request runs: try again then"
CLOSED = "the engine is closed"
_SAMPLING = "sampling: "


class SpeedGauge:
    """Of one engine. The device is measured between steps on its thread, once a process, and while it is idle."""

    def __init__(
        self, thread: "EngineThread", args: EngineArgs, paths: tuple[AttentionPath, ...], notes: Sequence[str]
    ) -> None:
        self._thread = thread
        self._backend = args.attention_backend
        self._paths = paths
        self._sampling_note = next((note for note in notes if note.startswith(_SAMPLING)), "")
        self._model: tuple[ModelWork, bool] | None = None
        self.device: DeviceSpeed | None = None
        """As it was measured; None before."""
        self.missing = NOT_MEASURED
        """Why it was not."""

    def measure(self) -> DeviceSpeed | None:
        """Measure the device if that was not done; None while requests run, or where it cannot be, and then
        :attr:`missing` says why. Takes up to a second."""
        if self.device is None:
            try:
                self.device = self._thread.call(self._measured)
                self._know_model()
            except EngineClosedError:
                self.missing = CLOSED
        return self.device

    def facts(self, plan: "MemoryPlan") -> SpeedFacts | None:
        """What the engine's speed follows from, asked of the model once; None where it is closed already."""
        try:
            work, on_cpu = self._know_model()
        except EngineClosedError:
            return None
        blas = (choose_blas() or "") if on_cpu else ""
        return SpeedFacts(plan, work, self._paths, on_cpu, self._backend, blas, self._sampling_note, _load())

    def running(self, totals: StepTotals, plan: "MemoryPlan") -> Speed:
        """How near the steps in ``totals`` came, of all requests together; without a measured device, why not."""
        facts = self.facts(plan)
        if self.device is None or facts is None:
            return Speed(missing=self.missing)
        return running_speed(totals, facts, self.device)

    def _know_model(self) -> tuple[ModelWork, bool]:
        if self._model is None:
            self._model = self._thread.call(lambda engine: (_work(engine), describe_device().kind == "cpu"))
        return self._model

    def _measured(self, engine: "LLMEngine") -> DeviceSpeed | None:
        from engine.runner.device_speed import device_speed

        if engine.has_work:
            self.missing = BUSY
            return None
        try:
            return device_speed(_work(engine).dtype)
        except (RuntimeError, MemoryError) as error:
            self.missing = f"the device could not be measured: {' '.join(str(error).split())[:120]}"
            return None


def _work(engine: "LLMEngine") -> ModelWork:
    from engine.runner.model_work import model_work

    return model_work(engine.runner.backend.model, engine.runner.vocab_size)


def _load() -> float:
    """Threads that want to run for each processor, over the last minute."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)
