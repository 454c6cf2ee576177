"""Download from the Hugging Face hub, with its own library; every failure becomes one line."""

import importlib
import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from engine.errors import ModelNotFoundError
from engine.models.local import Part, ResolvedModel, hub_cache, pick_gguf
from engine.models.pypi import Progress

_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model"]
_PATTERNS: dict[Part, list[str]] = {
    "weights": [*_TOKENIZER_PATTERNS, "model*.safetensors", "*.py"],
    "config": ["config.json", "generation_config.json", "model.safetensors.index.json"],
    "tokenizer": _TOKENIZER_PATTERNS,
}


def download(
    model: str, repo: str, quant: str, revision: str | None, part: Part, progress: Progress | None
) -> ResolvedModel:
    """Bring ``part`` of ``repo`` into the Hugging Face cache. Raises :class:`ModelNotFoundError`."""
    try:
        files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
        patterns = _patterns(model, files, quant, part)
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
            f"{model} is not in the Hugging Face cache and the hub cannot be reached ({reason}); "
            f"run `hf download {repo}` where there is a network, or name a local folder"
        ) from None
    if patterns[0].endswith(".gguf"):
        return ResolvedModel(model, folder / patterns[0], "gguf")
    return ResolvedModel(model, folder, "folder")


def _patterns(model: str, files: list[str], quant: str, part: Part) -> list[str]:
    """Which of a repository's ``files`` to download: the model's, or one GGUF file."""
    ggufs = [name for name in files if name.endswith(".gguf")]
    has_weights = any(name.startswith("model") and name.endswith(".safetensors") for name in files)
    if not quant and part == "tokenizer" and any(name.startswith("tokenizer") for name in files):
        return _PATTERNS[part]
    if not quant and "config.json" in files and (has_weights or part == "config"):
        return _PATTERNS[part]
    if quant or ggufs:
        return [pick_gguf(model, ggufs, quant)]
    raise ModelNotFoundError(f"{model}: the repository holds neither safetensors with a config.json nor GGUF files")


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
