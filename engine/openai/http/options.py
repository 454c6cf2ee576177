"""The server's options, with vLLM's names."""

import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import ConfigError

DEFAULT_PORT = 8000
"""The port of ``%vllm_metal serve`` (vLLM's default); ``LLM.serve`` takes a free one."""
KEEP_ALIVE_SECONDS = 5.0
MAX_BODY_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class ServerOptions:
    """How the port behaves. ``api_keys`` empty leaves it open (loopback only).

    ``keep_alive_seconds`` is the longest silence on a stream before a comment line is sent,
    ``max_body_bytes`` the longest request body.
    """

    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    enable_request_id_headers: bool = False
    enable_log_requests: bool = False
    trust_request_chat_template: bool = False
    enable_force_include_usage: bool = False
    exclude_tools_when_tool_choice_none: bool = False
    enable_tokenizer_info_endpoint: bool = False
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    max_body_bytes: int = MAX_BODY_BYTES

    def __post_init__(self) -> None:
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"--no-api-key with --host {self.host}: without a key only this machine may connect; "
                "use --host 127.0.0.1 or give --api-key",
                flag="no_api_key",
                value=self.host,
            )
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(
                f"--root-path {self.root_path}: must start with /", flag="root_path", value=self.root_path
            )
        if self.keep_alive_seconds <= 0 or self.max_body_bytes < 1:
            raise ConfigError("keep_alive_seconds and max_body_bytes must be greater than 0")


def choose_api_keys(api_key: str | Sequence[str] | None, *, no_api_key: bool) -> tuple[str, ...]:
    """The keys that are valid: those given, else ``VLLM_API_KEY``, else a random one; none with ``no_api_key``."""
    given = (api_key,) if isinstance(api_key, str) else tuple(api_key or ())
    if any(not key.strip() or not key.isascii() for key in given):
        raise ConfigError("--api-key: a key must be ASCII text and not empty", flag="api_key")
    if no_api_key:
        if given:
            raise ConfigError("--no-api-key and --api-key exclude each other: leave one out", flag="no_api_key")
        return ()
    from_environment = os.environ.get("VLLM_API_KEY", "").strip()
    return given or ((from_environment,) if from_environment else (f"sk-{secrets.token_urlsafe(24)}",))


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    if host.strip("[]").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
