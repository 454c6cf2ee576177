"""A chat on a model with recurrent layers: later turns start from the state that the one before left."""

from collections.abc import Iterator

import numpy as np
import pytest

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from tests.conftest import TinyModelDir

TEXT_CONFIG = {
    "model_type": "qwen3_5_text", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": 49152,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "full_attention_interval": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "rope_parameters": {
        "rope_type": "default", "type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1]},
}  # fmt: skip
STRIPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
KEEPS_THOUGHTS = STRIPS_THOUGHTS.replace(".split('</think>')[-1].lstrip()", "")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
QUESTION = "Tell me how the old lighthouse keeper spent the long winter evenings, and what he wrote down. " * 4
SYSTEM = "You keep the lighthouse's books. You answer from them, and say so where they are silent. " * 8
BLOCK = 16
GENERATION_PROMPT = 8


@pytest.fixture
def llm(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    folder = tiny_model_dir("qwen3_5", text_config=TEXT_CONFIG)
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.1, chat_template=STRIPS_THOUGHTS) as llm:
        yield llm


@pytest.mark.parametrize("template", [STRIPS_THOUGHTS, KEEPS_THOUGHTS], ids=["thoughts stripped", "thoughts kept"])
@pytest.mark.parametrize(
    "question", ["What is the capital of France, and which river runs through it?", QUESTION], ids=["short", "long"]
)
def test_the_second_turn_of_a_chat_hits_and_answers_as_if_cold(
    tiny_model_dir: TinyModelDir, template: str, question: str
) -> None:
    folder = tiny_model_dir("qwen3_5", text_config=TEXT_CONFIG)
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.1, chat_template=template) as llm:
        messages = [{"role": "user", "content": question}]
        first = llm.chat(messages, GREEDY, use_tqdm=False)[0]
        reply = {"role": "assistant", "content": f"He was tired.</think>{first.outputs[0].text}"}
        messages = [*messages, reply, {"role": "user", "content": "And in summer?"}]
        second = llm.chat(messages, GREEDY, use_tqdm=False)[0]
        prompt_end = (len(first.prompt_token_ids) - GENERATION_PROMPT) // BLOCK * BLOCK
        assert second.num_cached_tokens >= prompt_end > 0
        llm.reset_prefix_cache()
        cold = llm.chat(messages, GREEDY, use_tqdm=False)[0]
        assert cold.num_cached_tokens == 0
        assert cold.outputs[0].token_ids == second.outputs[0].token_ids


def test_n_completions_share_the_state_before_the_prompts_end(tiny_model_dir: TinyModelDir) -> None:
    folder = tiny_model_dir("qwen3_5", text_config=TEXT_CONFIG)
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.1) as llm:
        three = llm.generate(
            QUESTION, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, n=3), use_tqdm=False
        )
        assert len({tuple(output.token_ids) for output in three[0].outputs}) == 1
        stats = llm.stats()
        assert stats.num_used_blocks == 0


def test_short_questions_behind_one_system_prompt_start_where_they_part(llm: LLM) -> None:
    wish = "? Please answer in one long sentence that my friends would like to read aloud."
    questions = [f"{what}{wish}" for what in ("Who wrote Faust", "How many legs has a spider", "What is it", "Why so")]
    chats = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}] for question in questions]
    found = [llm.chat(chat, GREEDY, use_tqdm=False)[0] for chat in chats]
    parted = _common([output.prompt_token_ids for output in found[:2]])
    assert [output.num_cached_tokens for output in found] == [0, 0, *[parted // BLOCK * BLOCK] * 2]
    assert "go on only from a checkpoint, and none is within them" in llm.explain(3).cache.reason
    assert "blocks of 16 tokens are reused" in llm.explain(1).cache.reason
    llm.reset_prefix_cache()
    cold = llm.chat(chats[-1], GREEDY, use_tqdm=False)[0]
    assert cold.num_cached_tokens == 0
    assert cold.outputs[0].token_ids == found[-1].outputs[0].token_ids


def test_a_turn_that_repeats_the_reply_starts_within_it(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 40000, 50).tolist()
    params = SamplingParams(temperature=0, max_tokens=70, ignore_eos=True)
    start = 0
    for _ in range(3):
        reply = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]
        assert reply.num_cached_tokens == start
        start = (len(tokens) + 70 - 1) // BLOCK * BLOCK
        assert start > len(tokens)
        tokens = [*tokens, *reply.outputs[0].token_ids, *rng.integers(100, 40000, 5).tolist()]
    warm = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]
    assert warm.num_cached_tokens == start
    llm.reset_prefix_cache()
    cold = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids


def _common(prompts: list[list[int]]) -> int:
    """How many leading tokens two prompts have in common."""
    return next(i for i, pair in enumerate(zip(*prompts, strict=False)) if len(set(pair)) > 1)
