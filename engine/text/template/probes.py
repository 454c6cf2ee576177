"""What a chat template wants and what it refuses: found out by rendering small conversations, not by reading it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.text.template.chat_messages import MessageForm, normalise_messages

Render = Callable[[Mapping[str, Any]], str]
"""Renders a template with variables; raises whatever it raises."""

_NAMED_TOKENS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A probe."}}},
    },
}
_VALUE, _THOUGHT, _TEXT = "probe-value", "probe-thought", "probe-text"
_CALL = {
    "id": "probe0001",  # Mistral's templates take only ids of nine letters and digits
    "type": "function",
    "function": {"name": "probe_tool", "arguments": {"probe_key": _VALUE}},
}
_QUESTION = {"role": "user", "content": "A question"}
_ANSWER = {"role": "assistant", "content": "An answer."}
_RESULT = {"role": "tool", "tool_call_id": "probe0001", "name": "probe_tool", "content": "A result."}

SystemPlace = Literal["anywhere", "first", "nowhere"]
"""Where a template shows system messages: wherever they stand, only one at the beginning, or not at all."""


@dataclass(frozen=True)
class Probes:
    """Probes of one template. ``render`` runs it, ``base`` is what was read from it already."""

    render: Render
    base: MessageForm

    def call_form(self) -> MessageForm:
        """The form in which the template shows calls as they are, the usual one if it can be told from none."""
        forms = [
            replace(self.base, call_content=content, arguments_as_text=as_text)
            for content in ("", None)
            for as_text in (False, True)
        ]
        chosen = next((form for form in forms if self._shows_call(form)), self.base)
        if self._text_with_call(chosen, _THOUGHT) is None and self._text_with_call(chosen, None) is not None:
            chosen = replace(chosen, thought_beside_text=False)
        return chosen

    def system_place(self, *, with_tools: bool) -> SystemPlace:
        """Where it shows system messages; one that it drops silently is refused as well."""
        tools = (_TOOL,) if with_tools else None
        if self._rendered([_QUESTION], self.base, tools) is None:
            return "anywhere"  # something else is wrong: the template's own word says what
        first, behind_user, behind_answer = (
            {"role": "system", "content": f"probe-system-{number}"} for number in range(3)
        )
        messages = [first, _QUESTION, behind_user, _ANSWER, _QUESTION, _ANSWER, behind_answer, _QUESTION]
        for place, shown in (("anywhere", messages), ("first", [first, _QUESTION])):
            text = self._rendered(shown, self.base, tools)
            systems = [message for message in shown if message["role"] == "system"]
            if text is not None and all(message["content"] in text for message in systems):
                return place  # type: ignore[return-value]
        return "nowhere"

    def _shows_call(self, form: MessageForm) -> bool:
        """Whether the call's argument is there, neither as a string in JSON nor as Python writes it, and no "None"."""
        call = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
        text = self._rendered([_QUESTION, call, _RESULT], form)
        if text is None or _VALUE not in text:
            return False
        without_call = self._rendered([_QUESTION], form) or ""
        return not any(mark in text and mark not in without_call for mark in ('\\"probe_key', "'probe_key'", "None"))

    def _text_with_call(self, form: MessageForm, thought: str | None) -> str | None:
        message = {"role": "assistant", "content": _TEXT, "reasoning": thought, "tool_calls": [_CALL]}
        return self._rendered([_QUESTION, message, _RESULT], form)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        form: MessageForm,
        tools: Sequence[Mapping[str, Any]] | None = (_TOOL,),
    ) -> str | None:
        """The prompt, None where the template fails or refuses."""
        variables = {
            **_NAMED_TOKENS,
            "messages": normalise_messages(messages, form),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self.render(variables)
        except Exception:  # noqa: BLE001 - a template is a program: it can fail with any of Python's errors
            return None
