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
REQUEST_SECONDS = 30.0
STALLED_SECONDS = 120.0
MAX_NUM_QUEUED_REQS = 2048
MAX_NUM_QUEUED_TOKENS = 4 * 1024 * 1024

QUEUE_OPTIONS = ("max_num_queued_reqs", "max_num_queued_tokens")
_POSITIVE = ("keep_alive_seconds", "max_body_bytes", "request_seconds", "stalled_seconds", *QUEUE_OPTIONS)
LIMITS = (*_POSITIVE, "max_connections")
"""The options that are limits."""


@dataclass(frozen=True)
class ServerOptions:
    """How the port behaves. ``api_keys`` empty leaves it open (loopback only).

    ``keep_alive_seconds`` is the longest silence on a stream before a comment line is sent,
    ``max_body_bytes`` the longest request body, ``request_seconds`` the longest wait for a request that has begun (a
    long body has more), ``stalled_seconds`` that for a client to read. ``max_connections`` 0: what is left of the
    process's files decides. ``max_num_queued_reqs`` bounds the completions under way, those that wait included,
    ``max_num_queued_tokens`` the tokens of prompts that wait.
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
    request_seconds: float = REQUEST_SECONDS
    stalled_seconds: float = STALLED_SECONDS
    max_connections: int = 0
    max_num_queued_reqs: int = MAX_NUM_QUEUED_REQS
    max_num_queued_tokens: int = MAX_NUM_QUEUED_TOKENS

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
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                flag = f"--{name.replace('_', '-')}" if name in QUEUE_OPTIONS else name
                raise ConfigError(f"{flag} must be greater than 0", flag=name, value=getattr(self, name))
        if self.max_connections < 0:
            raise ConfigError("--max-connections must not be negative", flag="max_connections")


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
