"""A request's body as JSON that can also be written again: Python's own reader takes more than JSON has."""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

_MAY_CUT = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where a text may hold half of a surrogate pair: UTF-8 itself cannot."""


class JSONRequest(Request):
    """One whose body has no NaN, no number beyond a float's, and no half of a character."""

    async def json(self) -> Any:
        """The body. Raises ValueError in a line for what is not JSON, or cannot be written as JSON."""
        if not hasattr(self, "_json"):
            self._json = read_json_body(await self.body())
        return self._json


class JSONRoute(APIRoute):
    """A route whose bodies :class:`JSONRequest` reads."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind our reader."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JSONRequest(request.scope, request.receive))

        return handle_json


def read_json_body(body: bytes) -> Any:
    """What ``body`` says. Raises ValueError, and RecursionError where it is nested too deeply."""
    found = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
    if _MAY_CUT.search(body):
        _check_texts(found)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is larger than any number that can be kept")
    return value


def _check_texts(found: Any) -> None:
    left = [found]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += (*one, *one.values())
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str):
            _check_text(one)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair: it was cut inside of a character") from None
