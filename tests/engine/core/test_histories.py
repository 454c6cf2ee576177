"""Random histories of requests: whatever comes, goes, gives way and is changed, books and contents are right."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.engine.core.histories import Histories
from tests.nightly import NIGHTLY, size

STEPS = size(50, 200)
EXAMPLES = size(60, 600)
LEAST = size(2_000, 100_000)
BRIEF_OR_LONG = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=not NIGHTLY, database=None,
    suppress_health_check=list(HealthCheck), print_blob=True,
)  # fmt: skip


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_books_and_contents_are_right_after_every_step_of_any_history():
    Histories.num_rules = 0
    run_state_machine_as_test(Histories, settings=BRIEF_OR_LONG)
    assert Histories.num_rules >= LEAST
