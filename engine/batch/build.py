"""Which build of this project runs: its version, and the commit where that can be known."""

import json
import subprocess
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "vm-magic"
_ROOT = Path(__file__).resolve().parents[2]


def build(root: Path = _ROOT) -> str:
    """Such as "0.1.0, commit 2cab21c0f00d+", where + marks changes; ``root`` is the folder that the packages lie in."""
    try:
        found = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return ", ".join(filter(None, ["not installed", _checkout(root)]))
    return ", ".join(filter(None, [found.version, _checkout(root) or _installed_from(found)]))


def _checkout(root: Path) -> str:
    """The commit of a clone that the code runs from."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"commit {done.stdout.strip()}"


def _installed_from(found: metadata.Distribution) -> str:
    """The commit that pip installed from a repository, as it keeps it (PEP 610)."""
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id", "")
    return f"commit {commit[:12]}" if commit else ""
