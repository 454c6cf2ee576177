"""Which build runs: the version, and the commit wherever one is known."""

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from engine.batch.build import build


class Installed:
    """A distribution as pip leaves it."""

    version = "1.2.3"

    def __init__(self, origin: Any = None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.origin is None else json.dumps(self.origin)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    git("tag", "-a", "v9", "-m", "nine")
    return tmp_path


def test_a_clone_tells_its_commit_and_whether_it_was_changed(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True).stdout
    assert build(clone) == f"1.2.3, commit {head[:12]}"
    (clone / "file").write_text("two")
    assert build(clone) == f"1.2.3, commit {head[:12]}+"


def test_what_pip_installed_from_a_repository_has_its_commit_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin: dict[str, Any] = {"url": "https://example.com/x", "vcs_info": {"vcs": "git", "commit_id": "a" * 40}}
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed(origin))
    assert build(tmp_path) == f"1.2.3, commit {'a' * 12}"
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed({"url": "file:///x", "dir_info": {}}))
    assert build(tmp_path) == "1.2.3"
    monkeypatch.setattr(metadata, "distribution", lambda _: Installed())
    assert build(tmp_path) == "1.2.3"


def test_code_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert build(tmp_path) == "not installed"
