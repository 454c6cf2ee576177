"""A recorded request, sent once more with its recorded values. It joins no conversation, and calls no functions."""

from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.outputs import Reply
from vm_magic.chat.generation import ChatOptions, Generation
from vm_magic.show.reply_text import ReplyReader
from vm_magic.show.reply_view import SilentView
from vm_magic.state.record import Record, Recorder
from vm_magic.state.record_file import sampling_of
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from engine.chat.request import ChatRequest, PromptRequest
    from engine.llm import LLM

SOURCE = "record"
"""What ``explain`` calls the origin of a rerun's values."""


def repeat(session: Session, record: Record) -> Record:
    """Ask for ``record``'s reply again; the record of the new one. Raises RequestError for what cannot be asked here.

    ■ aborts the request and raises Interrupted.
    """
    generation = _remote(session, record) if session.remote is not None else _local(session, record)
    before = session.last_reply
    try:
        reply: Reply = generation.follow(SilentView())
    finally:
        session.last_reply = before
    assert reply.record is not None, "a rerun is recorded"
    return reply.record


def _local(session: Session, record: Record) -> Generation:
    llm, asked = session.require(), record["request"]
    request = _request(llm, record)
    if asked.get("tools") and not llm.takes_tools:
        raise RequestError("the record has tools, and this model's chat template has no form for them", param="tools")
    prepared = llm.prepare(request)
    stream = llm.submit(prepared)
    recorder = Recorder.of_local(llm, request, prepared, stream, asked.get("schema"))
    reader = ReplyReader(prepared.new_parser(), llm.tokenizer)
    return Generation(
        session, stream, asked.get("messages") or [], None, reader, options=ChatOptions(), recorder=recorder
    )


def _request(llm: "LLM", record: Record) -> "ChatRequest | PromptRequest":
    from engine.chat.request import ChatRequest, PromptRequest, TemplateOptions
    from engine.params.sampling_params import SamplingParams
    from engine.params.structured_outputs import StructuredOutput

    asked = record["request"]
    values = sampling_of(record)
    if record.get("where") == "server":  # what it did not say, that server's defaults decided, which nobody knows here
        sampling = llm.defaults.resolve({"n": 1, **values}, SOURCE)
    else:
        sampling = SamplingParams(**values, sources=dict.fromkeys(values, SOURCE))
    common: dict[str, Any] = {
        "sampling": sampling,
        "structured_outputs": StructuredOutput.from_schema(asked.get("schema")),
        "source": SOURCE,
    }
    if asked.get("messages") is None:
        return PromptRequest(prompt=asked["prompt"], **common)
    return ChatRequest(
        messages=asked["messages"],
        tools=asked.get("tools"),
        tool_choice=asked.get("tool_choice"),
        thinking_token_budget=asked.get("thinking_token_budget"),
        template=TemplateOptions(kwargs=asked.get("template_kwargs") or {}),
        **common,
    )


def _remote(session: Session, record: Record) -> Generation:
    remote, asked = session.remote_llm(), record["request"]
    sampling = {name: value for name, value in sampling_of(record).items() if value is not None and name != "n"}
    stream: Any
    if asked.get("messages") is None:
        if not isinstance(asked["prompt"], str):
            raise RequestError(
                "the record's prompt is token ids, which only this kernel's model can take", param="prompt"
            )
        stream = remote.submit_completion(asked["prompt"], sampling, schema=asked.get("schema"))
    else:
        stream = remote.submit_chat(
            asked["messages"],
            sampling,
            thinking_token_budget=asked.get("thinking_token_budget"),
            schema=asked.get("schema"),
            tools=asked.get("tools"),
            tool_choice=asked.get("tool_choice"),
            template_kwargs=asked.get("template_kwargs"),
        )
    known = {name: value for name, value in asked.items() if name != "sha256"}
    recorder = Recorder.of_remote(remote, known, stream, {**remote.settings.snapshot(), **sampling})
    messages, reader = asked.get("messages") or [], ReplyReader()
    return Generation(session, stream, messages, None, reader, options=ChatOptions(), recorder=recorder)
