"""Right requests of every API with every kind of item that it reads, to be spoilt at any place."""

from typing import Any

_PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
_FUNCTION = {"name": "f", "description": "Does f.", "parameters": _PARAMETERS, "strict": False}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
_CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi", "name": "me"},
        {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "done"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "So"}, {"type": "refusal", "refusal": "no"}]},
    ],
    "tools": [{"type": "function", "function": _FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "max_tokens": 8,
    "stop": ["x"],
    "logit_bias": {"5": 1.0},
    "chat_template_kwargs": {"enable_thinking": False},
}
_STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_ECHO: dict[str, Any] = {
    **{key: value for key, value in _CHAT.items() if key not in ("tools", "tool_choice")},
    "echo": True,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _PARAMETERS}},
    "structured_outputs": None,
    "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 2},
}
_COMPLETION: dict[str, Any] = {
    "prompt": ["Hi", "you"], "max_tokens": 4, "n": 1, "stop": ["x"], "stop_token_ids": [3], "logprobs": 1,
    "logit_bias": {"5": 1}, "bad_words": ["bad"], "allowed_token_ids": [1, 2, 3], "seed": 3, "priority": 0,
    "response_format": {"type": "json_object"},
}  # fmt: skip
_RESPONSE: dict[str, Any] = {
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_text", "text": "you"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}],
         "content": [{"type": "reasoning_text", "text": "Hm."}], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "namespace": None},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "done"}]},
        {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "y"},
        {"type": "tool_search_call", "call_id": "c3", "arguments": {"query": "q"}},
        {"type": "tool_search_output", "call_id": "c3", "tools": [{"type": "function", **_FUNCTION}]},
        {"type": "local_shell_call", "id": "c4", "call_id": "c4", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "c4", "output": "o"},
        {"type": "apply_patch_call", "call_id": "c5", "operation": {"type": "create_file", "path": "a", "diff": "+"}},
        {"type": "apply_patch_call_output", "call_id": "c5", "output": "o"},
        {"type": "additional_tools", "tools": [{"type": "custom", "name": "h"}]},
        {"type": "item_reference", "id": "none"},
    ],
    "tools": [
        {"type": "function", **_FUNCTION},
        {"type": "custom", "name": "g", "description": "d",
         "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}},
        {"type": "namespace", "name": "ns", "description": "d", "tools": [{"type": "function", **_FUNCTION}]},
        {"type": "tool_search", "execution": "client"},
        {"type": "web_search", "filters": {"allowed_domains": ["a"]}},
    ],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": _PARAMETERS}, "verbosity": "low"},
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"a": "b"},
    "max_output_tokens": 8,
    "include": ["reasoning.encrypted_content"],
    "store": False,
}  # fmt: skip
_RESPONSE["input"].pop()  # nothing is stored under that id
_MESSAGE: dict[str, Any] = {
    "max_tokens": 8,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "Hi"},
            {"type": "document", "title": "t", "context": "c", "source": {"type": "text", "data": "d"}},
            {"type": "search_result", "title": "t", "source": "s", "content": [{"type": "text", "text": "x"}]},
        ]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "s"},
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "q"}},
            {"type": "web_search_tool_result", "tool_use_id": "s1",
             "content": [{"type": "web_search_result", "title": "t", "url": "u"}]},
            {"type": "text", "text": "So", "citations": None},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "b"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "done"}]},
            {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "later"}},
            {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "later"}},
            {"type": "text", "text": "Go on"},
        ]},
    ],
    "tools": [
        {"name": "f", "description": "d", "input_schema": _PARAMETERS},
        {"name": "later", "input_schema": _PARAMETERS, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search"},
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"format": {"type": "json_schema", "schema": _PARAMETERS}},
    "metadata": {"user_id": "me"},
    "stop_sequences": ["x"],
}  # fmt: skip
_SUMMED = {
    "max_tokens": 8,
    "messages": [
        {"role": "user", "content": [
            {"type": "compaction", "content": "It was so.", "tool_changes": [
                {"type": "tool_addition", "tool": {"type": "definition", "definition": {
                    "name": "g", "input_schema": _PARAMETERS}}}]},
            {"type": "text", "text": "Go on"}]},
    ],
}  # fmt: skip
_TOKENS = {"messages": _CHAT["messages"], "tools": _CHAT["tools"], "chat_template_kwargs": {"a": 1}}

RICH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {**_CHAT, **_STREAM, "tool_choice": "auto"}),
    ("/v1/chat/completions", _ECHO),
    ("/v1/chat/completions/render", _CHAT),
    ("/v1/chat/completions/batch", {**_CHAT, "messages": [_CHAT["messages"]]}),
    ("/v1/completions", {**_COMPLETION, **_STREAM}),
    ("/v1/responses", _RESPONSE),
    ("/v1/responses", {**_RESPONSE, "stream": True}),
    ("/v1/messages", _MESSAGE),
    ("/v1/messages", _SUMMED),
    ("/v1/messages/count_tokens", {key: _MESSAGE[key] for key in ("system", "messages", "tools")}),
    ("/tokenize", _TOKENS),
    ("/detokenize", {"tokens": [1, 2, 3]}),
)


def spoilt(value: Any, odd: Any) -> list[Any]:
    """Copies of ``value``, each with one place replaced by ``odd``, or with one more entry named by it."""
    found = [odd]
    if isinstance(value, dict):
        found += [{**value, key: one} for key, inner in value.items() for one in spoilt(inner, odd)]
        found += [{other: one for other, one in value.items() if other != key} for key in value]
        if isinstance(odd, str):
            found.append({**value, odd: 1})
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            found += [[*value[:place], one, *value[place + 1 :]] for one in spoilt(inner, odd)]
    return found
