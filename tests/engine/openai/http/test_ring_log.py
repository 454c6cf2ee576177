"""Log lines in memory, and what of them a notebook's own handlers get."""

import io
import logging
from collections.abc import Iterator

import pytest

from engine.openai.http.ring_log import RingLog


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What ``logging.basicConfig()`` prints."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    yield stream
    root.removeHandler(handler)
    root.setLevel(before)


def test_what_is_kept_is_printed_only_where_it_would_have_been(printed: io.StringIO) -> None:
    ring, child = RingLog(["ring_log_test"]), logging.getLogger("ring_log_test.child")
    ring.attach()
    child.info("kept")
    child.warning("said")
    logging.getLogger().setLevel(logging.INFO)
    child.info("asked for")
    ring.detach()
    assert [line.rpartition(": ")[2] for line in ring.lines] == ["kept", "said", "asked for"]
    assert printed.getvalue() == "said\nasked for\n"


def test_a_level_that_the_user_set_is_kept_to(printed: io.StringIO) -> None:
    ring, logger = RingLog(["ring_log_test"]), logging.getLogger("ring_log_test")
    ring.attach()
    logger.setLevel(logging.DEBUG)
    logger.debug("wanted")
    ring.detach()
    assert printed.getvalue() == "wanted\n"


def test_a_logger_is_left_as_it_was(printed: io.StringIO) -> None:
    ring, logger = RingLog(["ring_log_test"]), logging.getLogger("ring_log_test")
    ring.attach()
    ring.detach()
    ring.detach()
    assert (logger.level, logger.propagate, logger.handlers) == (logging.NOTSET, True, [])
    logger.warning("as before")
    assert printed.getvalue() == "as before\n"
