"""The engine's thread, where it cannot even begin."""

import pytest

from engine.runtime import engine_thread


def test_a_thread_that_cannot_begin_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread() -> None:
        raise RuntimeError("no stream for this thread")

    monkeypatch.setattr(engine_thread, "mlx_thread", no_thread)
    thread = engine_thread.EngineThread(lambda: pytest.fail("nothing is built"))
    with pytest.raises(RuntimeError, match="no stream for this thread"):
        thread.start()
    assert not thread.alive
