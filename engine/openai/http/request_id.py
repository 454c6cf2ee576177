"""The id of the HTTP request under way: its client's or one made here. Lines that the port logs name it."""

import logging
import re
import uuid
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

HEADER = "X-Request-Id"
MAX_LENGTH = 128
"""Characters of a client's id that are used."""
_UNSAFE = re.compile(r"[^\x21-\x7e]")
_current: ContextVar[str] = ContextVar("request_id", default="")


def begin_request(scope: Scope) -> None:
    """From now on this task is about the request of ``scope``. Each has a task, so nothing is put back."""
    _current.set(_clean(Headers(scope=scope).get(HEADER) or uuid.uuid4().hex))


def name_request(asked: str | None) -> None:
    """The request's body calls it ``asked``, if anything."""
    if asked:
        _current.set(_clean(asked))


def request_id() -> str:
    """The id as its client gave it, but that it can stand in any header and log; a new one outside of requests."""
    return _current.get() or uuid.uuid4().hex


def _clean(asked: str) -> str:
    return _UNSAFE.sub("_", asked[:MAX_LENGTH])


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    """Ends each line with the id of the request that it is about, where there is one."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """See :class:`logging.LoggerAdapter`. The id is a client's text: what is not part of a word becomes ``_``."""
        shown = "".join(char if char.isalnum() or char in "-_.:" else "_" for char in _current.get()[:MAX_LENGTH])
        return (f"{msg} (request {shown})" if shown else msg), kwargs


def request_logger(name: str) -> RequestLogger:
    """The logger ``name``, for lines about requests."""
    return RequestLogger(logging.getLogger(name), {})
