"""How models mark their reasoning: vLLM's parser names, their markers, and which of them a template uses."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from engine.text.template.recognition import Recognised


@dataclass(frozen=True)
class ReasoningParser(Recognised):
    """A thought is enclosed in ``start`` and ``end``.

    ``anywhere``: a thought may also begin in the middle of an answer. ``implicit``: without a known prompt,
    output begins inside the thought; ``unopened``: also after a prompt that does not open one. ``wrappers`` are marks
    around answers and not part of them. ``prose``: the marks are words, and an end without a start may be an answer's.
    ``answers`` is written behind ``end`` where a thought is ended from outside, so that the answer follows.
    """

    start: str
    end: str
    anywhere: bool = False
    implicit: bool = False
    unopened: bool = False
    wrappers: tuple[str, ...] = ()
    prose: bool = False
    answers: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, as the output holds them."""
        return (self.start, self.end, *self.wrappers)

    def begins_inside(self, prompt_suffix: str) -> bool | None:
        """Whether output begins inside a thought after this prompt; None where only the output can tell.

        After a prompt without a thought, ``unopened`` decides, unless the prompt ends in a tool's result.
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
        """The last mark of a turn and the text after it: looked for in more and more of the prompt's end."""
        size = _NEAR
        while True:
            text = prompt_suffix[-size:].replace(self.start, _START).replace(self.end, _END)
            marks = list(_TURN_MARK.finditer(text))
            if marks:
                return marks[-1].group(), text[marks[-1].end() :]
            if size >= len(prompt_suffix):
                return None, text
            size *= 8


_START, _END = "\x00start\x00", "\x00end\x00"
_NEAR = 1024
"""Characters at a prompt's end in which its last turn most often begins."""
_ROLE = 1
"""Number of words at the beginning of a turn that name its speaker. More words are an answer to be continued."""
_TURN_MARK = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|</?tool_response>|</?seed:(?:bos|eos)>|\]~[!b]?\]|\[e~\["
)
"""What separates turns in the known chat formats: a thought that a message quotes ends with its turn."""


def _think_templates(*marks: str) -> tuple[tuple[str, ...], ...]:
    """Templates with either of ``<think>`` and ``</think>``, and with one of ``marks``."""
    return tuple((mark, tag) for mark in marks or ("",) for tag in ("<think>", "</think>"))


_THINK = ReasoningParser("<think>", "</think>")
_IMPLICIT_THINK = ReasoningParser("<think>", "</think>", implicit=True)

HARMONY = ReasoningParser(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    anywhere=True,
    answers="<|start|>assistant<|channel|>final<|message|>",
    templates=(("<|channel|>",),),
)
"""gpt-oss: read by :mod:`engine.text.parse.harmony`, tool calls included."""

REASONING_PARSERS: dict[str, ReasoningParser] = {
    "gemma4": ReasoningParser("<|channel>thought", "<channel|>", anywhere=True, templates=(("<|channel>",),)),
    "openai_gptoss": HARMONY,
    "seed_oss": ReasoningParser("<seed:think>", "</seed:think>", templates=(("<seed:think>",),)),
    "longcat": ReasoningParser("<longcat_think>", "</longcat_think>", templates=(("<longcat_think>",),)),
    "muse_spark": ReasoningParser(
        "to=self<|message|>",
        "<|eom|>",
        anywhere=True,
        wrappers=("<|start|>assistant", "to=user<|message|>", "to=commentary<|message|>", "<|eot|>"),
        templates=(("<atem:function_calls>",),),
    ),
    "mistral": ReasoningParser("[THINK]", "[/THINK]", templates=(("[THINK]",),)),
    "cohere2": ReasoningParser(
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        wrappers=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        templates=(("<|START_THINKING|>",),),
    ),
    "granite": ReasoningParser(
        "Here is my thought process:",
        "Here is my response:",
        prose=True,
        templates=(("Here is my thought process:",),),
    ),
    "kimi_k3": ReasoningParser(
        "<|open|>think<|sep|>",
        "<|close|>think<|sep|>",
        wrappers=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
        vocab=frozenset({"<|open|>", "<|close|>", "<|sep|>"}),
    ),
    "hunyuan_a13b": replace(_THINK, wrappers=("<answer>", "</answer>"), templates=_think_templates("<answer>")),
    "minimax_m2": replace(_IMPLICIT_THINK, templates=_think_templates("<minimax:tool_call>", "]~b]")),
    "glm45": replace(_THINK, templates=_think_templates("<arg_key>")),
    "deepseek_r1": replace(_IMPLICIT_THINK, unopened=True, templates=_think_templates("<｜Assistant｜>")),
    "kimi_k2": replace(_THINK, templates=_think_templates("<|tool_calls_section_begin|>")),
    "qwen3": replace(_THINK, templates=_think_templates()),
    **dict.fromkeys(("deepseek_v3", "olmo3", "holo2", "exaone4"), _THINK),
    **dict.fromkeys(("step3", "step3p5", "nemotron_v3"), _IMPLICIT_THINK),
    "ernie45": replace(_THINK, wrappers=("<response>", "</response>")),
}
"""vLLM's names, and similar names for formats that only mlx-lm reads. A model's template and tokens are matched in this
order, and the first parser that recognises itself is chosen."""


def detect_reasoning_parser(template: str | None, vocab: Collection[str]) -> str | None:
    """The parser for a model's chat template, or for the tokens that it has; None if it does not think."""
    for name, parser in REASONING_PARSERS.items():
        if parser.in_template(template or "") or parser.in_vocab(vocab):
            return name
    return None
