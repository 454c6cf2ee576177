"""Download from the Hugging Face hub, with its own library; every failure becomes one line."""

import importlib
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from engine.errors import ModelNotFoundError
from engine.models.formats import FORMATS
from engine.models.local import ResolvedModel, hub_cache
from engine.models.pypi import Progress
from engine.models.weight_format import Wanted, WeightFormat


def download(repo: str, revision: str | None, wanted: Wanted, progress: Progress | None) -> ResolvedModel:
    """Bring what is wanted of ``repo`` into the Hugging Face cache. Raises :class:`ModelNotFoundError`."""
    try:
        files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
        found, patterns = _to_download(files, wanted)
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=hub_cache(),
                allow_patterns=patterns,
                tqdm_class=_progress_class(progress),
            )
        )
    except GatedRepoError:
        raise ModelNotFoundError(
            f"{repo} is gated: accept its terms on the hub, log in with `hf auth login`, then load it again"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}; leave --revision out for main") from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"the hub has no model {repo} (or it is private: log in with `hf auth login`); check the spelling"
        ) from None
    except _connection_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelNotFoundError(
            f"{wanted.model} is not in the Hugging Face cache and the hub cannot be reached ({reason}); "
            f"run `hf download {repo}` where there is a network, or name a local folder"
        ) from None
    return ResolvedModel(wanted.model, found.open(folder, wanted), found.kind)


def _to_download(files: list[str], wanted: Wanted) -> tuple[WeightFormat, list[str]]:
    """The format in which a repository is fetched, and patterns of those of its ``files`` that it takes."""
    for one in reversed(FORMATS):
        patterns = one.to_download(files, wanted)
        if patterns is not None:
            return one, patterns
    raise ModelNotFoundError(
        f"{wanted.model}: the repository holds neither safetensors with a config.json nor GGUF files"
    )


def _connection_errors() -> tuple[type[Exception], ...]:
    """What a failing network raises; the hub's library has changed its HTTP library more than once."""
    found: list[type[Exception]] = [HfHubHTTPError, OSError]
    for name in ("httpx", "httpx2"):
        try:
            found.append(importlib.import_module(name).HTTPError)
        except ModuleNotFoundError:
            continue
    return tuple(found)


def _progress_class(progress: Progress | None) -> type[Any]:
    """A silent bar class for the hub's library that reports bytes to ``progress``."""
    lock = threading.Lock()

    class SilentBar(tqdm):  # type: ignore[type-arg]
        """Counts without drawing; only bars of bytes report."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})
            self.n = kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                self.n += n or 0
                if progress is not None and self.counts_bytes and self.total:
                    progress("download", int(min(self.n, self.total)), int(self.total))
            return None

    return SilentBar
