"""What to paste into other programs so that they talk to the open port."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from vm_magic.show.cards import CodeText

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle
    from vm_magic.remote.llm import RemoteLLM

KEY_VARIABLE = "VLLM_API_KEY"
_MESSAGES = 'messages = [{"role": "user", "content": "Hello!"}]\n'


@dataclass(frozen=True)
class Endpoint:
    """Where clients connect. ``api_key`` is written out if given; else they read :data:`KEY_VARIABLE`."""

    base_url: str
    model: str
    needs_key: bool
    api_key: str | None = field(default=None, repr=False)
    key_place: str = "server.api_key in the notebook"
    """Where the reader finds the key."""
    max_model_len: int | None = None
    """The context's length, if it is known."""

    @classmethod
    def of(cls, server: "ServerHandle", *, show_key: bool = False) -> Self:
        """The port behind a handle; its key only where that may be shown."""
        key = server.api_key if show_key else None
        return cls(server.base_url, server.model, server.api_key is not None, key, max_model_len=server.max_model_len)

    @classmethod
    def of_remote(cls, remote: "RemoteLLM", *, show_key: bool = False) -> Self:
        """The server that the notebook is connected to."""
        key = remote.address.key
        shown = key if show_key else None
        length = remote.served.max_model_len
        return cls(remote.base_url, remote.model, key is not None, shown, "that of connect", length)

    @property
    def root_url(self) -> str:
        """The address without ``/v1``."""
        return self.base_url.removesuffix("/v1")

    def python_key(self) -> str:
        """A Python expression for the key."""
        if not self.needs_key:
            return '"none"'
        return f'os.environ["{KEY_VARIABLE}"]' if self.api_key is None else repr(self.api_key)

    def python_import(self) -> str:
        """The import that :meth:`python_key` needs."""
        return "import os\n\n" if self.needs_key and self.api_key is None else ""

    def note(self) -> str:
        """What the reader must do for the key."""
        if not self.needs_key or self.api_key is not None:
            return ""
        return f"Set {KEY_VARIABLE} to the key ({self.key_place}), or add --show-key."


def _openai(endpoint: Endpoint) -> CodeText:
    text = (
        f"{endpoint.python_import()}from openai import OpenAI\n\n"
        f"client = OpenAI(base_url={endpoint.base_url!r}, api_key={endpoint.python_key()})\n"
        f"{_MESSAGES}reply = client.chat.completions.create(model={endpoint.model!r}, messages=messages)\n"
        "print(reply.choices[0].message.content)\n"
    )
    return CodeText(text, "python", endpoint.note())


def _anthropic(endpoint: Endpoint) -> CodeText:
    text = (
        f"{endpoint.python_import()}from anthropic import Anthropic\n\n"
        f"client = Anthropic(base_url={endpoint.root_url!r}, api_key={endpoint.python_key()})\n"
        f"{_MESSAGES}reply = client.messages.create(model={endpoint.model!r}, max_tokens=1024, messages=messages)\n"
        "print(reply.content[-1].text)\n"
    )
    return CodeText(text, "python", endpoint.note())


def _curl(endpoint: Endpoint) -> CodeText:
    key = f"${KEY_VARIABLE}" if endpoint.api_key is None else endpoint.api_key
    header = f'  -H "Authorization: Bearer {key}" \\\n' if endpoint.needs_key else ""
    text = (
        f"curl {endpoint.base_url}/chat/completions \\\n{header}"
        '  -H "Content-Type: application/json" \\\n'
        f'  -d \'{{"model": "{endpoint.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n'
    )
    return CodeText(text, "bash", endpoint.note())


def _llm(endpoint: Endpoint) -> CodeText:
    text = f"llm -m {model_id(endpoint.model)} 'Hello!'\n"
    return CodeText(text, "bash", "%vllm_metal llm writes the entry and the key that this needs.")


def _codex(endpoint: Endpoint) -> CodeText:
    # Codex takes the context of a model that it does not know for 272000 tokens, and shortens its history too late.
    length = f"model_context_window = {endpoint.max_model_len}\n" if endpoint.max_model_len else ""
    text = (
        f'model = "{endpoint.model}"\nmodel_provider = "vm-magic"\n{length}web_search = "disabled"\n\n'
        f'[model_providers.vm-magic]\nname = "vm-magic"\nbase_url = "{endpoint.base_url}"\n'
        'wire_api = "responses"\n' + (f'env_key = "{KEY_VARIABLE}"\n' if endpoint.needs_key else "")
    )
    key = f"; {KEY_VARIABLE} must hold the key" if endpoint.needs_key else ""
    return CodeText(text, "toml", f"This goes into ~/.codex/config.toml{key}.")


CLIENTS: Mapping[str, Callable[[Endpoint], CodeText]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "llm": _llm,
    "curl": _curl,
    "codex": _codex,
}
"""Clients by name, and what each needs."""


def model_id(model: str) -> str:
    """A short name for a model: the last part of a path or hub id."""
    return model.rstrip("/").rpartition("/")[2] or model


def snippets(endpoint: Endpoint) -> dict[str, CodeText]:
    """All clients' texts."""
    return {name: make(endpoint) for name, make in CLIENTS.items()}
