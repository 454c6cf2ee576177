"""``export``: the ``vllm serve`` command that does the same as this kernel, or what a client of the port needs."""

import argparse
import dataclasses
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineClosedError
from engine.params.engine_args import ENGINE_FLAGS, EngineArgs, Flag
from engine.params.kv_dtype import VLLM_NAMES
from engine.params.sampling_defaults import GENERATION_CONFIG_NAMES
from engine.params.sampling_params import names_of
from engine.runner.device.placement import VISIBLE, cuda_name
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.cards import CodeText
from vm_magic.state.clients import CLIENTS, Endpoint, snippets
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from engine.openai.server import ServerHandle

HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma3-270m": "google/gemma-3-270m"}
"""Our short names, and the same model on the hub."""
HUB_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
BY_VARIABLE = ("attention_backend", "device")
"""Engine flags whose values vLLM's flag of that name does not know: written as variables."""
OURS_ALONE = ("no_api_key", "allowed_hosts", "max_connections")
"""Server options that vLLM does not have."""
_VLLM_DEFAULTS = names_of(lambda known: known.server_default)
"""Sampling values that vLLM takes as a server's defaults; others come with each request."""


class Export(LineCommand):
    """Writes the same as a command for a shell, or as what a client needs."""

    help = "the same as a vllm serve command, or what a client needs (--client)"

    def add_arguments(self, parser: CommandParser) -> None:
        """For which client, and whether with the key."""
        parser.add_argument("--client", choices=CLIENTS, help="what this client needs to use the open port")
        parser.add_argument(
            "--show-key", action="store_true", help="write the key out (a saved notebook then holds it)"
        )

    def execute(self, context: Context, parsed: argparse.Namespace) -> CodeText:
        """The text to copy."""
        if parsed.client is None:
            return _export_server(context.session, show_key=parsed.show_key)
        return _export_client(context.session, parsed.client, show_key=parsed.show_key)


def _export_server(session: Session, *, show_key: bool) -> CodeText:
    """The ``vllm serve`` command for the loaded model and its port. Raises EngineClosedError without a model."""
    if session.remote is not None and session.loaded is None:
        raise EngineClosedError(
            f"export writes the command of a model loaded in this kernel, and the notebook is connected to "
            f"{session.remote.base_url}; export --client openai gives what a client of that server needs"
        )
    llm = session.require()
    server = session.server
    options = dict(session.server_options)
    if server is not None:
        options["port"] = server.port
    chosen = {name: getattr(llm, name, None) for name in ("reasoning_parser", "tool_call_parser")}
    served = Served(
        llm.args,
        options,
        llm.settings.snapshot(),
        {name: value for name, value in chosen.items() if value},
        session.pasted_environment,
        server.api_key if server is not None and show_key else None,
    )
    return CodeText(serve_command(served))


def _export_client(session: Session, client: str, *, show_key: bool) -> CodeText:
    """What ``client`` needs to talk to the server connected to, else to the open port.

    Raises ConfigError if no port is open, and for the llm tool, whose entry is for a port of this kernel.
    """
    remote = session.remote
    if remote is not None and client != "llm":
        return snippets(Endpoint.of_remote(remote, show_key=show_key))[client]
    return snippets(Endpoint.of(open_port(session), show_key=show_key))[client]


def open_port(session: Session) -> "ServerHandle":
    """The port of this kernel. Raises ConfigError if none is open."""
    session.require()
    server = session.server
    if server is None:
        raise ConfigError("no port is open for clients; %vllm_metal serve opens it", flag="serve")
    return server


@dataclass(frozen=True)
class Served:
    """What there is to export. ``settings`` are live sampling values, ``parsers`` those chosen at load."""

    args: EngineArgs
    server_options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    parsers: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    """The key to write out; None leaves a name for it."""


def serve_command(served: Served) -> str:
    """Environment, remarks and the command, each flag on a line of its own, quoted for a POSIX shell."""
    lines = [*(f"export {name}={shlex.quote(value)}" for name, value in _environment(served))]
    if "no_api_key" not in served.server_options:
        lines.append(_key_line(served.api_key))
    lines += [f"# {remark}" for remark in _remarks(served)]
    model = HUB_NAMES.get(served.args.model, served.args.model)
    words = [f"vllm serve {shlex.quote(model)}", *_engine_flags(served), *_server_flags(served.server_options)]
    return "\n".join([*lines, " \\\n  ".join(words)]) + "\n"


def _key_line(api_key: str | None) -> str:
    if api_key is None:
        return "# export VLLM_API_KEY=...  (the key that clients send; --show-key writes it out)"
    return f"export VLLM_API_KEY={shlex.quote(api_key)}"


def _environment(served: Served) -> Iterator[tuple[str, str]]:
    for name in HUB_VARIABLES:
        if value := served.environment.get(name) or os.environ.get(name):
            yield name, value
    args = served.args
    if args.memory_flag == "VLLM_METAL_MEMORY_FRACTION" and args.gpu_memory_utilization != "auto":
        yield "VLLM_METAL_MEMORY_FRACTION", str(args.gpu_memory_utilization)
    if not args.use_paged_attention:
        yield "VLLM_METAL_USE_PAGED_ATTENTION", "0"
    if args.attention_backend != "auto":
        yield "VLLM_METAL_ATTENTION_BACKEND", args.attention_backend
    if args.device.startswith("cuda:"):
        yield VISIBLE, cuda_name(args.device)


def _remarks(served: Served) -> Iterator[str]:
    if served.args.model in HUB_NAMES:
        yield f"{served.args.model} is a 4-bit GGUF of this model"
    for name in OURS_ALONE:
        if name in served.server_options:
            yield f"vLLM has no --{name.replace('_', '-')}"
    if served.args.device != "auto" and ":" not in served.args.device:
        yield f"where vLLM computes, its build decides: --device {served.args.device} is left out"
    per_request = [f"{name}={value}" for name, value in served.settings.items() if name not in _VLLM_DEFAULTS]
    if per_request:
        yield f"vLLM takes these with each request only: {' '.join(per_request)}"


def _engine_flags(served: Served) -> Iterator[str]:
    args = dataclasses.replace(served.args, override_generation_config=_generation_config(served))
    if served.args.model in HUB_NAMES and not args.served_model_name:
        args = dataclasses.replace(args, served_model_name=(served.args.model,))
    known = {one.name: one for one in dataclasses.fields(EngineArgs)}
    for flag in (one for one in ENGINE_FLAGS if one.field not in BY_VARIABLE):
        value, standard = getattr(args, flag.field), known[flag.field]
        default = standard.default_factory() if callable(standard.default_factory) else standard.default
        if flag.field in served.parsers and value is None:
            value = served.parsers[flag.field]
        from_environment = flag.field == "gpu_memory_utilization" and args.memory_flag == flag.env
        if flag.field == "kv_cache_dtype":
            value = VLLM_NAMES.get(value, value)
        if value is not None and value != default and not from_environment:
            yield _flag_text(flag, value)
    if "tool_call_parser" in served.parsers and not args.enable_auto_tool_choice:
        yield "--enable-auto-tool-choice"


def _flag_text(flag: Flag, value: Any) -> str:
    if flag.kind == "switch":
        return f"--{flag.name}" if value else f"--no-{flag.name}"
    if isinstance(value, Mapping):
        return f"--{flag.name} {shlex.quote(json.dumps(value))}"
    words = value if isinstance(value, tuple) else (str(value),)
    return shlex.join([f"--{flag.name}", *words])


def _generation_config(served: Served) -> dict[str, Any]:
    """The override that the user gave, with live settings over it, in Hugging Face's names."""
    theirs = {ours: name for name, ours in GENERATION_CONFIG_NAMES.items()}
    live = {theirs[name]: value for name, value in served.settings.items() if name in _VLLM_DEFAULTS}
    return {**served.args.override_generation_config, **live}


def _server_flags(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("api_key", *OURS_ALONE) or value is False:
            continue
        if value is True:
            yield flag
        elif isinstance(value, list | tuple):
            yield f"{flag} {shlex.quote(json.dumps(list(value)))}"
        else:
            yield shlex.join([flag, str(value)])
