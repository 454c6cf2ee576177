"""What is said below a reply about its end: why it stopped early, how fast it was."""

from typing import TYPE_CHECKING, Union

from engine.outputs import Reply
from vm_magic.chat.generation import Generation
from vm_magic.show.cards import speed_text

if TYPE_CHECKING:
    from vm_magic.chat.tool_loop import ToolLoop


def end_notes(
    reply: Reply, generation: Union[Generation, "ToolLoop"], *, stats: bool, max_tool_rounds: int
) -> tuple[str, ...]:
    """A line for each thing to say; none for a reply that the model ended by itself, unless ``stats`` asks for it."""
    notes = []
    if reply.finish_reason == "length":
        notes.append(_out_of_tokens(reply, generation))
    if reply.parse_error:
        notes.append(f"parsed is None: {reply.parse_error}")
    if reply.finish_reason == "repetition":
        notes.append("Stopped because it repeated itself.")
    if generation.stopped_at_limit:
        rounds = f"{max_tool_rounds} round{'s' * (max_tool_rounds > 1)}"
        notes.append(f"Stopped after {rounds} of tool calls. Raise it with --max-tool-rounds.")
    if stats:
        notes.append(speed_text(*generation.earlier_replies, reply))
    return tuple(notes)


def _out_of_tokens(reply: Reply, generation: Union[Generation, "ToolLoop"]) -> str:
    limit = generation.stream.params.max_tokens
    if limit is not None and reply.usage.completion_tokens >= limit:
        return f"Stopped at max_tokens ({limit}). Raise it with --max-tokens."
    fix = "Shorten the prompt" if generation.conversation is None else "Start anew with --new"
    return f"The context is full. {fix}, or load the model with a larger --max-model-len."
