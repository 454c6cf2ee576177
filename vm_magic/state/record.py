"""What ``--record`` keeps of a reply: enough to ask again and to say what differs. Plain JSON, without paths or keys.

In a saved notebook it is ``metadata.vm_magic`` of the cell's output, ``{"format": 1, "records": […]}``: a record for
each turn of the model, one unless it called functions. ``Reply.record`` is the last turn's. The messages are kept in
full up to :data:`MAX_CHARACTERS`, since values that ``{{ }}`` filled in and the conversation before are in no cell.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from engine.model_card.identity import model_identity, plain_name
from engine.model_card.privacy import shareable
from engine.outputs import Reply, RequestOutput
from engine.params.sampling_params import CONSTRAINTS, PARAMETERS, SamplingParams

if TYPE_CHECKING:
    from engine.chat.request import ChatRequest, PreparedRequest, PromptRequest
    from engine.llm import LLM
    from vm_magic.remote.llm import RemoteLLM

FORMAT = 1
KEY = "vm_magic"
"""The name under which an output's metadata has the record."""
MAX_CHARACTERS = 200_000
"""Longest request and reply that are kept as text; of longer ones there is only the hash."""
MAX_TOKEN_IDS = 8_192
Record = dict[str, Any]
_PACKAGES = ("vm-magic", "mlx", "mlx-lm", "transformers", "tokenizers", "llguidance")
_ENGINE_FLAGS = (
    *("dtype", "kv_cache_dtype", "attention_backend", "use_paged_attention", "chat_template_content_format"),
    *("default_chat_template_kwargs", "override_generation_config", "reasoning_config"),
)
"""Engine arguments that may change tokens; those that name files are kept by what was read from them."""


def with_seed(params: SamplingParams) -> SamplingParams:
    """``params`` that give the same tokens once more: one that samples without a seed gets one drawn."""
    if params.greedy or params.seed is not None:
        return params
    return replace(params, seed=draw_seed(), sources={**params.sources, "seed": "drawn for --record"})


def draw_seed() -> int:
    """A seed, short enough to type."""
    return secrets.randbits(31)


@dataclass(frozen=True)
class Recorder:
    """What is known of a request when it is sent; :meth:`finished` adds what came of it."""

    record: Record
    stream: Any
    sent: SamplingParams
    given: Mapping[str, Any] | None = None
    """Sampling values that were sent, where a server's defaults decide the others."""

    @classmethod
    def of_local(
        cls, llm: "LLM", request: "ChatRequest | PromptRequest", prepared: "PreparedRequest", stream: Any, schema: Any
    ) -> Self:
        """For a request that this kernel's engine runs as ``stream``."""
        template = {} if prepared.account.template is None else _merged(prepared.account.template)
        asked = {
            "messages": [dict(message) for message in getattr(request, "messages", ())] or None,
            "prompt": getattr(request, "prompt", None),
            "tools": list(request.tools) if request.tools else None,
            "tool_choice": request.tool_choice,
            "schema": schema,
            "thinking_token_budget": _budget(llm, request),
            "template_kwargs": template or None,
        }
        record = _begin(asked) | {
            "where": "kernel",
            "model": {"name": plain_name(llm.args.model), **model_identity(llm.resolved)},
            "engine": _engine(llm),
            "prompt": {"tokens": len(prepared.token_ids), "sha256": _hash_of_ids(prepared.token_ids)},
            "versions": versions(),
        }
        return cls(record, stream, request.sampling)

    @classmethod
    def of_remote(cls, remote: "RemoteLLM", asked: Mapping[str, Any], stream: Any, given: Mapping[str, Any]) -> Self:
        """For a request that the connected server runs; what it does not tell is not in the record."""
        length = {} if remote.served.max_model_len is None else {"max_model_len": remote.served.max_model_len}
        version = remote.version()
        record = _begin(asked) | {
            "where": "server",
            "model": {"name": shareable(remote.model)},
            "engine": length,
            "versions": versions() | ({} if version is None else {"server": shareable(version)}),
            "not known": ["the server's weights, chat template, defaults and packages"],
        }
        return cls(record, stream, stream.params, {name: one for name, one in given.items() if name != "n"})

    def finished(self, output: RequestOutput, reply: Reply) -> Record:
        """The whole record. Sampling values are those that held at the end: live settings may have changed them."""
        params, sent = self.stream.params, self.sent
        values = {name: getattr(params, name) for name in PARAMETERS if name not in CONSTRAINTS}
        values["skip_special_tokens"] = sent.skip_special_tokens  # the parser of the output may have turned it off
        values = values if self.given is None else dict(self.given)
        token_ids = [token for token in output.outputs[0].token_ids if token >= 0]
        ended: Record = {
            "text": reply.text,
            "reasoning": reply.reasoning,
            "tool_calls": [call["function"] for call in reply.tool_calls] or None,
            "finish_reason": reply.finish_reason,
            "tokens": reply.usage.completion_tokens,
            "token_ids": token_ids if 0 < len(token_ids) <= MAX_TOKEN_IDS else None,
            "sha256": text_hash(reply.text),
        }
        if _length(ended) > MAX_CHARACTERS:
            ended = {name: ended[name] for name in ("finish_reason", "tokens", "sha256")} | {"too long to keep": True}
        whole = self.record | {"sampling": _given(values), "reply": _given(ended)}
        if any(getattr(params, name) != getattr(sent, name) for name in _LIVE):
            whole["changed while it ran"] = True
        made: Record = plain_json(whole)
        return made


_LIVE = tuple(name for name, known in PARAMETERS.items() if known.live)


def kept(records: Iterable[Record]) -> Record:
    """What an output's metadata gets."""
    return {"format": FORMAT, "records": list(records)}


@cache
def versions() -> dict[str, str]:
    """Of the packages that tokens depend on, of Python, of the system and of the device; no host name."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


@cache
def _device() -> str:
    from engine.runner.device.devices import describe_device

    device = describe_device()
    return f"{device.name} ({device.kind})"


def _begin(asked: Mapping[str, Any]) -> Record:
    request = _given(asked)
    kind = "chat" if "messages" in request else "complete"
    digest = text_hash(json.dumps(plain_json(request), sort_keys=True))
    if _length(request) > MAX_CHARACTERS:
        request = {"too long to keep": True}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": FORMAT, "kind": kind, "date": date, "request": request | {"sha256": digest}}


def _engine(llm: "LLM") -> Record:
    """What of the engine may change tokens, as it was resolved."""
    from engine.runner.kv.attention_path import describe

    args, template = llm.args, llm.preparer.template.source
    found: Record = {name: getattr(args, name) for name in _ENGINE_FLAGS}
    found |= {
        "max_model_len": llm.plan.max_model_len,
        "reasoning_parser": llm.reasoning_parser,
        "tool_call_parser": llm.tool_call_parser,
        "chat_template": None if template is None else text_hash(template),
        "attention": describe(llm.attention_paths),
        "device": _device(),
        "notes": [shareable(note) for note in llm.notes],
    }
    if args.tokenizer is not None:
        found["tokenizer"] = plain_name(args.tokenizer)
    return {name: value for name, value in found.items() if value not in (None, {}, [])}


def _budget(llm: "LLM", request: "ChatRequest | PromptRequest") -> int | None:
    """The thinking budget that holds: the request's own, else the live setting's where the model thinks."""
    if request.thinking_token_budget is not None or llm.reasoning_parser is None:
        return request.thinking_token_budget
    budget: int | None = llm.settings.thinking().get("thinking_token_budget")
    return budget


def _merged(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Record:
    """What the template was given beside the model's own defaults."""
    merged: Record = {}
    for _, values in layers[1:]:
        merged |= values
    return merged


def _given(values: Mapping[str, Any]) -> Record:
    return {name: value for name, value in values.items() if value is not None and value != () and value != {}}


def _length(values: Mapping[str, Any]) -> int:
    return len(json.dumps(plain_json(values), ensure_ascii=False))


def text_hash(text: str) -> str:
    """The beginning of a text's SHA-256: enough to tell two apart."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _hash_of_ids(token_ids: Sequence[int]) -> str:
    return text_hash(",".join(map(str, token_ids)))


def plain_json(value: Any) -> Any:
    """``value`` as strict JSON has it: keys are texts, numbers are finite."""
    if isinstance(value, Mapping):
        return {str(name): plain_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | bool | int | float) else shareable(str(value))
