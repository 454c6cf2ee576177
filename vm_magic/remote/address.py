"""Where the server is, which key it gets, and how its refusals read in one line."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from engine.errors import ConfigError, EngineClosedError, GenerationError, RequestError, UnknownModelError, VMMagicError
from engine.format.text import shortened
from engine.openai.http.options import DEFAULT_PORT

KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
RETRIED = (429, 502, 503, 504)
"""HTTP statuses of a server that is busy for the moment."""
_LONGEST_ERROR = 500
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RemoteConnectionError(EngineClosedError):
    """The server cannot be reached, or does not let us in: nothing will work until that changes."""


class RemoteReplyError(GenerationError):
    """The server failed at one request, or broke off its reply."""


@dataclass(frozen=True)
class Address:
    """``base_url`` ends in the API's path (``/v1``), without a slash. The key is never shown."""

    base_url: str
    key: str | None = field(default=None, repr=False)
    key_source: str = ""

    @classmethod
    def of(
        cls,
        url: str,
        key: str | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        key_source: str = "--api-key",
    ) -> "Address":
        """Read a URL as a user types it, ``/v1`` added where there is no path; the key from a variable if not given.

        Raises ConfigError for anything but http(s), and for user names or keys inside the URL.
        """
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
            hint = f"http://{url}" if "://" not in url and url else f"http://127.0.0.1:{DEFAULT_PORT}"
            raise ConfigError(f"connect {url!r}: give an http or https address, such as {hint}", flag="url")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError("connect: the address has a name, key or query in it; use --api-key", flag="url")
        path = parts.path.rstrip("/")
        for ending in ("/chat/completions", "/completions", "/models"):
            path = path.removesuffix(ending)
        base_url = f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
        if key:
            return cls(base_url, key, key_source)
        environment = os.environ if environment is None else environment
        name = next((name for name in KEY_VARIABLES if environment.get(name)), None)
        return cls(base_url, environment[name], name) if name else cls(base_url)

    @property
    def root(self) -> str:
        """The server's own address, where ``/metrics``, ``/version`` and ``/health`` are."""
        return self.base_url.removesuffix("/v1")

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine, so that no proxy is asked."""
        return urlsplit(self.base_url).hostname in _LOOPBACK

    def hidden(self, text: str) -> str:
        """``text`` in one line, without the key."""
        text = " ".join(text.split())
        text = text.replace(self.key, "•••") if self.key else text
        return shortened(text, _LONGEST_ERROR)

    def refusal(self, status: int, body: Any, *, location: str | None = None) -> VMMagicError:
        """The error for an HTTP status and what came with it (JSON or text)."""
        said = self.hidden(_message(body))
        if status in (401, 403):
            fix = (
                "give --api-key, or set VLLM_API_KEY"
                if self.key is None
                else f"the key from {self.key_source} is wrong"
            )
            return RemoteConnectionError(f"{self.base_url} refused the key (HTTP {status}): {fix}")
        if 300 <= status < 400:
            target = urlsplit(location or "")
            where = f" to {target.scheme}://{target.netloc}" if target.netloc else ""
            return RemoteConnectionError(f"{self.base_url} redirects{where}; connect to that address itself")
        if status == 404:
            return UnknownModelError(said or f"{self.base_url} has no such model or route (HTTP 404)", param="model")
        if 400 <= status < 500 and status not in RETRIED:
            return RequestError(said or f"{self.base_url} refused the request (HTTP {status})")
        return RemoteReplyError(f"{self.base_url} failed with HTTP {status}: {said or 'no reason given'}; try again")

    def unreachable(self, error: Exception) -> RemoteConnectionError:
        """The error for a connection that could not be made."""
        reason = self.hidden(str(error)) or type(error).__name__
        return RemoteConnectionError(f"cannot reach {self.base_url}: {reason}; is the server running there?")


def _has_port(parts: SplitResult) -> bool:
    """Whether the port is a number in range, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _message(body: Any) -> str:
    """The text of an error body: OpenAI's, vLLM's older form, FastAPI's, or plain text."""
    if isinstance(body, Mapping):
        error = body.get("error", body)
        found = (
            error
            if isinstance(error, str)
            else next(
                (error[name] for name in ("message", "detail") if isinstance(error, Mapping) and error.get(name)), body
            )
        )
        return found if isinstance(found, str) else str(found)
    return str(body or "")
