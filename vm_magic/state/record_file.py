"""Records in a notebook's file: read, checked, never run. The file may be anybody's."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from engine.params.sampling_params import CONSTRAINTS, PARAMETERS
from vm_magic.state.record import FORMAT, KEY, Record

MAX_BYTES = 200_000_000
"""Largest notebook that is read."""
_MARKDOWN = "text/markdown"
_KINDS: dict[str, tuple[type, ...]] = {
    "tools": (list,),
    "tool_choice": (str, Mapping),
    "schema": (Mapping, bool),
    "template_kwargs": (Mapping,),
    "thinking_token_budget": (int,),
}
"""What a record's request may have, and as what."""
_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"))
"""Names that no template variable of a request may have."""


@dataclass(frozen=True)
class RecordedCell:
    """A cell's records: one for each turn of the model. ``count`` is the cell's number as the notebook shows it."""

    count: int | None
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """``[3]``, as beside the cell."""
        return f"[{' ' if self.count is None else self.count}]"


def recorded_cells(path: Path) -> list[RecordedCell]:
    """The cells of the notebook at ``path`` that have records, in order. Raises RequestError in one line."""
    try:
        path = path.expanduser()
        status = os.stat(path)
    except (OSError, ValueError, RuntimeError) as error:  # ~name of nobody is a RuntimeError
        raise RequestError(f"{path.name}: cannot be read ({_why(error)})", param="file") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
        raise RequestError(f"{path.name}: is no file", param="file")
    if status.st_size > MAX_BYTES:
        raise RequestError(f"{path.name}: larger than {MAX_BYTES // 10**6} MB; is it a notebook?", param="file")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path.name}: cannot be read ({_why(error)})", param="file") from None
    except (ValueError, RecursionError):
        raise RequestError(f"{path.name}: is no notebook (not JSON)", param="file") from None
    cells = notebook.get("cells") if isinstance(notebook, Mapping) else None
    if not isinstance(cells, list):
        raise RequestError(f"{path.name}: is no notebook of format 4 (it has no cells)", param="file")
    found = []
    for cell in cells:
        if isinstance(cell, Mapping) and (kept := list(_kept(cell))):
            count = cell.get("execution_count")
            found.append(RecordedCell(count if isinstance(count, int) else None, tuple(kept)))
    return found


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _kept(cell: Mapping[str, Any]) -> Iterator[Record]:
    outputs = cell.get("outputs")
    for output in outputs if isinstance(outputs, list) else ():
        metadata = output.get("metadata") if isinstance(output, Mapping) else None
        if not isinstance(metadata, Mapping):
            continue
        for place in (metadata, metadata.get(_MARKDOWN)):
            found = place.get(KEY) if isinstance(place, Mapping) else None
            if isinstance(found, Mapping) and "records" in found:
                records = found["records"]
                yield from (checked(one) for one in (records if isinstance(records, list) else [records]))


def checked(record: Any) -> Record:
    """``record`` if it is one that can be repeated. Raises RequestError naming what is wrong."""
    if not isinstance(record, Mapping):
        raise RequestError("the record is not an object", param="record")
    if record.get("format") != FORMAT:
        newer = f"its format is {record.get('format')!r}, and this version reads {FORMAT}"
        raise RequestError(f"the record cannot be read: {newer}", param="record")
    for name in ("request", "sampling", "reply", "model", "engine", "versions"):
        if not isinstance(record.get(name), Mapping):
            raise RequestError(f"the record cannot be read: its {name!r} is missing or no object", param="record")
    unknown = [name for name in record["sampling"] if name not in PARAMETERS or name in CONSTRAINTS]
    if unknown:
        raise RequestError(f"the record cannot be read: {unknown[0]!r} is no sampling value", param="record")
    request, reply = record["request"], record["reply"]
    wrong = [name for name in ("text", "reasoning") if not isinstance(reply.get(name) or "", str)]
    lists = all(isinstance(reply.get(name) or [], list) for name in ("token_ids", "tool_calls"))
    if wrong or not lists:
        raise RequestError("the record cannot be read: its reply is not text", param="record")
    for name, kinds in _KINDS.items():
        if name in request and not isinstance(request[name], kinds):
            raise RequestError(f"the record cannot be read: its {name!r} has the wrong form", param="record")
    reserved = _RESERVED.intersection(request.get("template_kwargs", ()))
    if reserved or not all(isinstance(tool, Mapping) for tool in request.get("tools", ())):
        raise RequestError("the record cannot be read: its tools or template_kwargs are wrong", param="record")
    messages, prompt = request.get("messages"), request.get("prompt")
    is_chat = isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages)
    if not is_chat and not isinstance(prompt, str | list):
        if request.get("too long to keep"):
            raise RequestError("the record cannot be repeated: its messages were too long to keep", param="record")
        raise RequestError("the record cannot be read: it has neither messages nor a prompt", param="record")
    return dict(record)


def sampling_of(record: Record) -> dict[str, Any]:
    """Sampling values of ``record`` as :class:`SamplingParams` takes them."""
    values = dict(record["sampling"])
    bias = values.get("logit_bias")
    if isinstance(bias, Mapping):
        try:
            values["logit_bias"] = {int(token): float(value) for token, value in bias.items()}
        except (TypeError, ValueError):
            raise RequestError("the record cannot be read: its logit_bias is wrong", param="logit_bias") from None
    values.setdefault("max_tokens", None)
    reply = record["reply"]
    if reply.get("finish_reason") == "abort" and isinstance(reply.get("tokens"), int) and reply["tokens"] > 0:
        values["max_tokens"] = reply["tokens"]  # it was stopped there
        values["min_tokens"] = min(values.get("min_tokens") or 0, reply["tokens"])
    return values
