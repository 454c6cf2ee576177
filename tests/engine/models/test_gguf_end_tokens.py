"""Which ids end a reply of a GGUF file, where its keys name few of them."""

from pathlib import Path
from typing import Any

import pytest

from engine.models.gguf_file import GGUFFile

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
ENDS = {
    "gpt-oss": ("<|endoftext|> <|return|> <|call|>", "<|start|> <|channel|> <|message|> <|constrain|> <|end|>"),
    "solar open": ("<|endoftext|> <|flush|> <|calls|>", "<|begin|> <|content|> <|think|> <|end|>"),
    "phi 3": ("<|endoftext|> <|end|>", "<|system|> <|user|> <|assistant|> <|placeholder1|>"),
    "granite": ("<|end_of_text|>", "<|start_of_role|> <|end_of_role|> <|tool_call|>"),
    "deepseek": ("<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c> <\uff5cAssistant\uff5c>"),
    "minimax": ("[e~[", "]~b] ]~!b[ ]!p~[ <minimax:tool_call>"),
    "glm": ("<|endoftext|> <|user|> <|observation|>", "<|system|> <|assistant|> [gMASK] <sop>"),
    "gemma 3": ("<eos> <end_of_turn>", "<bos> <pad> <start_of_turn>"),
    "gemma 4": ("<eos> <turn|> <|tool_response>", "<bos> <|turn> <|tool_call> <tool_call|> <tool_response|>"),
    "llama 3": ("<|end_of_text|> <|eom_id|> <|eot_id|>", "<|begin_of_text|> <|start_header_id|> <|end_header_id|>"),
    "llama 4": ("<|end_of_text|> <|eom|> <|eot|>", "<|begin_of_text|> <|header_start|> <|header_end|>"),
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_RESPONSE|> <|END_ACTION|>"),
    "lfm 2": ("<|im_end|> <|endoftext|>", "<|startoftext|> <|im_start|> <|tool_call_end|>"),
    "exaone": ("[|endofturn|]", "[|user|] [|assistant|] [|system|]"),
    "kimi": ("[EOS] [EOT] <|im_end|>", "[BOS] [PAD] <|im_user|> <|im_middle|> <|tool_calls_section_end|>"),
}
"""Of models: control tokens that end a reply by the authors' generation settings or chat format, and others."""


def file_of(tokens: list[str], types: list[int], **keys: Any) -> GGUFFile:
    values = {"tokens": tokens, "token_type": types, **keys}
    return GGUFFile(Path("m.gguf"), {f"tokenizer.ggml.{key}": value for key, value in values.items()}, {})


@pytest.mark.parametrize("model", ENDS)
def test_tokens_that_end_a_turn_end_replies_and_other_control_tokens_do_not(model: str) -> None:
    ends, others = (texts.split() for texts in ENDS[model])
    tokens = [*others, *ends]
    found = file_of(tokens, [CONTROL] * len(tokens), eos_token_id=tokens.index(ends[0])).end_token_ids()
    assert {tokens[index] for index in found} == set(ends)


def test_what_separates_messages_of_one_reply_ends_none_even_where_a_key_says_so() -> None:
    file = file_of(["<|end|>", "<|return|>", "<|call|>"], [CONTROL] * 3, eos_token_id=1, eot_token_id=0)
    assert file.end_token_ids() == {1, 2}


def test_ordinary_text_that_looks_like_an_end_token_ends_nothing() -> None:
    assert file_of(["<eos>", "<|end|>", "</s>"], [NORMAL, NORMAL, CONTROL], eos_token_id=2).end_token_ids() == {2}


def test_damaged_keys_name_no_end_tokens() -> None:
    assert file_of(["<eos>"], [CONTROL, CONTROL], eos_token_id="</s>").end_token_ids() == {0}
