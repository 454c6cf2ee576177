"""The loaded model and its port: asked as a client on this machine would, with its key and without any proxy."""

import http.client
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.checkup.findings import Finding
from engine.checkup.subject import Model

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle

_PATIENCE = 2.0
"""Seconds that a port on this machine has for an answer."""


def check_model(model: Model) -> Iterator[Finding]:
    """Whether the model serves, and what it is doing."""
    private = (model.name,)
    if model.closed:
        fix = "%vllm_metal logs says why, if it failed; %vllm_metal load loads it again"
        yield Finding("model", "engine", f"{model.name}: its engine is closed, or failed", "problem", fix, private)
        return
    doing = f"{model.num_running} running, {model.num_waiting} waiting"
    yield Finding("model", "engine", f"{model.name} ({model.kind}): {doing}", private=private)


def check_port(model: Model) -> Iterator[Finding]:
    """Whether the port is open, and answers with its key."""
    server = model.server
    if server is None:
        yield Finding("port", "server", "closed (%vllm_metal serve opens it)")
        return
    private = (server.base_url, model.name, *([server.api_key] if server.api_key else []))
    again = "%vllm_metal stop, then %vllm_metal serve"
    try:
        status = _ask(server)
    except (OSError, http.client.HTTPException) as error:
        text = f"{server.base_url} does not answer ({type(error).__name__})"
        yield Finding("port", "server", text, "problem", again, private)
        return
    if status == http.client.OK:
        key = "with its key" if server.api_key else "and asks for no key"
        yield Finding("port", "server", f"{server.base_url} answers {key}", private=private)
    else:
        text = f"{server.base_url} answers {status} to a question with its own key"
        yield Finding("port", "server", text, "problem", again, private)


def _ask(server: "ServerHandle") -> int:
    """The status of its list of models."""
    place, _, path = server.base_url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(place, timeout=_PATIENCE)
    try:
        headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
        connection.request("GET", f"/{path}/models", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()
