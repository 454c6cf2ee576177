"""The manual's page of checkpoints is what the tests' registries and the libraries here say."""

import pytest

from engine.runner.device.devices import describe_device
from tests.checkpoints.table import COMMAND, TABLE, installed_versions, render, written_versions


def test_the_page_of_checkpoints_is_what_the_tests_find() -> None:
    written = TABLE.read_text(encoding="utf-8")
    if installed_versions() != written_versions(written) or describe_device().kind != "cpu":
        pytest.skip(f"the page is of {written_versions(written)} on a CPU; `{COMMAND}` writes that of what is here")
    assert render() == written, f"`{COMMAND}` writes the page anew; read the difference"
