"""How models mark their thoughts: vLLM's parser names, their markers, and which of them a template uses."""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningParser:
    """A thought stands between ``start`` and ``end``.

    ``anywhere``: a thought may also begin in the middle of an answer. ``implicit``: without a known prompt,
    output begins inside the thought; ``unopened``: also behind a prompt that opens none. ``wrappers`` are marks
    around answers, left out of them. ``prose``: the marks are words, and an end without a start may be an answer's.
    """

    start: str
    end: str
    anywhere: bool = False
    implicit: bool = False
    unopened: bool = False
    wrappers: tuple[str, ...] = ()
    prose: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, as the output holds them."""
        return (self.start, self.end, *self.wrappers)

    def begins_inside(self, prompt_suffix: str) -> bool | None:
        """Whether output begins inside a thought behind this prompt; None where only the output can tell.

        A prompt that marks no thought leaves it to the model's custom, unless it ends in a tool's result.
        """
        if not prompt_suffix:
            return self.implicit or (False if self.prose else None)
        mark, turn = self._open_turn(prompt_suffix)
        start, end = turn.rfind(_START), turn.rfind(_END)
        if start == end:
            return self.unopened and mark is not None and "tool" not in mark and len(turn.split()) <= _ROLE
        return start > end

    def begins_behind(self, prompt_suffix: str) -> bool:
        """Whether the prompt ends with a thought that is over (thinking switched off)."""
        return self._open_turn(prompt_suffix)[1].rstrip().endswith(_END)

    def _open_turn(self, prompt_suffix: str) -> tuple[str | None, str]:
        """The last mark of a turn and what stands behind it."""
        text = prompt_suffix.replace(self.start, _START).replace(self.end, _END)
        marks = list(_TURN_MARK.finditer(text))
        return (marks[-1].group(), text[marks[-1].end() :]) if marks else (None, text)


_START, _END = "\x00start\x00", "\x00end\x00"
_ROLE = 1
"""Words that a turn begins with: the speaker's role. More of them are an answer that is continued."""
_TURN_MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|</?tool_response>|</?seed:(?:bos|eos)>|\]~[!b]?\]|\[e~\["
)
"""What separates turns in the chat formats at hand: a thought that a message quotes ends with its turn."""

_THINK = ReasoningParser("<think>", "</think>")
_IMPLICIT_THINK = ReasoningParser("<think>", "</think>", implicit=True)

HARMONY = ReasoningParser("<|channel|>analysis<|message|>", "<|end|>", anywhere=True)
"""gpt-oss: read by :mod:`engine.text.parse.harmony`, tool calls included."""

REASONING_PARSERS: dict[str, ReasoningParser] = {
    **dict.fromkeys(("qwen3", "glm45", "deepseek_v3", "olmo3", "holo2", "kimi_k2", "exaone4"), _THINK),
    **dict.fromkeys(("minimax_m2", "step3", "step3p5", "nemotron_v3"), _IMPLICIT_THINK),
    "deepseek_r1": ReasoningParser("<think>", "</think>", implicit=True, unopened=True),
    "gemma4": ReasoningParser("<|channel>thought", "<channel|>", anywhere=True),
    "openai_gptoss": HARMONY,
    "mistral": ReasoningParser("[THINK]", "[/THINK]"),
    "seed_oss": ReasoningParser("<seed:think>", "</seed:think>"),
    "granite": ReasoningParser("Here is my thought process:", "Here is my response:", prose=True),
    "hunyuan_a13b": ReasoningParser("<think>", "</think>", wrappers=("<answer>", "</answer>")),
    "ernie45": ReasoningParser("<think>", "</think>", wrappers=("<response>", "</response>")),
    "longcat": ReasoningParser("<longcat_think>", "</longcat_think>"),
    "cohere2": ReasoningParser(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        wrappers=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    "kimi_k3": ReasoningParser(
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        wrappers=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
    ),
    "muse_spark": ReasoningParser(
        "to=self<|message|>",
        "<|eom|>",
        anywhere=True,
        wrappers=("<|start|>assistant", "to=user<|message|>", "to=commentary<|message|>", "<|eot|>"),
    ),
}
"""vLLM's names, and names in their manner for forms that mlx-lm reads."""


def reasoning_markers(name: str) -> tuple[str, str]:
    """The texts that begin and end a thought, for budgets and for grammars that wait for its end."""
    parser = REASONING_PARSERS[name]
    return parser.start, parser.end


_BY_MARK = (
    ("<|channel>", "gemma4"),
    ("<|channel|>", "openai_gptoss"),
    ("<seed:think>", "seed_oss"),
    ("<longcat_think>", "longcat"),
    ("<atem:function_calls>", "muse_spark"),
    ("[THINK]", "mistral"),
    ("<|START_THINKING|>", "cohere2"),
    ("Here is my thought process:", "granite"),
)


def detect_reasoning_parser(template: str | None, vocab: Collection[str]) -> str | None:
    """The parser for a model's chat template, else for the tokens that it has; None if it does not think."""
    template = template or ""
    for mark, name in _BY_MARK:
        if mark in template:
            return name
    if {"<|open|>", "<|close|>", "<|sep|>"} <= set(vocab):
        return "kimi_k3"
    if "<think>" not in template and "</think>" not in template:
        return None
    return _think_variant(template)


def _think_variant(template: str) -> str:
    """Which of the parsers for ``<think>`` a template belongs to."""
    if "<answer>" in template:
        return "hunyuan_a13b"
    if "<minimax:tool_call>" in template or "]~b]" in template:
        return "minimax_m2"
    if "<arg_key>" in template:
        return "glm45"
    if "<｜Assistant｜>" in template:
        return "deepseek_r1"
    if "<|tool_calls_section_begin|>" in template:
        return "kimi_k2"
    return "qwen3"
