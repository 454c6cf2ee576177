"""Calls in every form, written as a model writes them, then damaged: words cut out, doubled, swapped, put in.

``write(name, calls)`` is a valid text of ``calls``; ``damaged(name, number)`` a text with one or two random edits, the
same for the same number.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from engine.text.parse.reasoning_parsers import REASONING_PARSERS
from engine.text.parse.tool_parsers import TOOL_PARSERS

Call = tuple[str, dict[str, Any]]
PARAMETERS = {
    "type": "object",
    "properties": {"command": {"type": "string"}, "count": {"type": "integer"}, "items": {"type": "array"}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("Bash", "look_up")]
THOUGHTS = {
    **dict.fromkeys(("hermes", "qwen3_coder"), "qwen3"),
    **{
        name: name
        for name in ("glm45", "gemma4", "mistral", "minimax_m2", "seed_oss", "granite", "kimi_k3", "muse_spark")
    },
    "deepseek_v31": "deepseek_r1",
    "kimi_k2": "kimi_k2",
    "openai": "openai_gptoss",
}
"""The reasoning parser that reads a form's replies; the others are read without one."""
_PIECE = re.compile(r"<[^<>\s]+>|\w+|[ \t]*\n|\s+|[^\w\s]")
_PROSE = ("Now quickly.", "I list the zebras:", "é 🎉")
WORDS = ("lsblk", "echoes", "wörld", "quickly", "zebras", "Firstly", "Lastly", "wherefore")
"""Words of thoughts, texts and values, which no mark has."""
_WRONG = (
    *(
        '{"command": "lsblk -l"}',
        '{"name": "Bash", "arguments": {"command": "lsblk"}}',
        "<x>",
        "</x>",
        "<command>lsblk</command>",
    ),
    *(
        "<tool_call>",
        "</tool_call>",
        "<function=Bash>",
        "</function>",
        "<parameter=command>",
        "</parameter>",
        "</think>",
    ),
    *("{", "}", "[", "]", '"', "'", "\\", "<", ">", ",", ":", "\n", "```", "null", "-", "(", ")", "="),
)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _objects(key: str = "arguments", name: str = "name") -> Callable[[Call], str]:
    return lambda call: _json({name: call[0], key: call[1]})


def _each(begin: str, end: str, body: Callable[[Call], str]) -> Callable[[Sequence[Call]], str]:
    """One mark and its end for each call."""
    return lambda calls: "\n".join(begin + body(call) + end for call in calls)


def _all(begin: str, end: str, body: Callable[[Call], str], between: str = "") -> Callable[[Sequence[Call]], str]:
    """One mark and its end around all calls."""
    return lambda calls: begin + between.join(map(body, calls)) + end


def _tags(function: str, close: str, parameter: str, value_end: str) -> Callable[[Call], str]:
    def write(call: Call) -> str:
        values = [parameter % (key, _text(value)) + value_end for key, value in call[1].items()]
        return function % call[0] + "".join(values) + close

    return write


def _dsml(call: Call) -> str:
    values = "".join(
        f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">{_text(value)}'
        "</｜DSML｜parameter>\n"
        for key, value in call[1].items()
    )
    return f'<｜DSML｜invoke name="{call[0]}">\n{values}</｜DSML｜invoke>\n'


def _kimi_k3(call: Call) -> str:
    kinds = {str: "string", int: "integer", list: "array"}
    values = "".join(
        f'<|open|>argument key="{key}" type="{kinds[type(value)]}"<|sep|>{_text(value)}<|close|>argument<|sep|>'
        for key, value in call[1].items()
    )
    return f'<|open|>call tool="{call[0]}" index="1"<|sep|>{values}<|close|>call<|sep|>'


def _python(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


def _gemma(quote: str) -> Callable[[Call], str]:
    def value(item: Any) -> str:
        if isinstance(item, list):
            return f"[{','.join(map(value, item))}]"
        return f"{quote}{item}{quote}" if isinstance(item, str) else _json(item)

    return lambda call: f"call:{call[0]}{{{','.join(f'{key}:{value(item)}' for key, item in call[1].items())}}}"


def _harmony(calls: Sequence[Call]) -> str:
    start = "<|start|>assistant<|channel|>commentary to=functions."
    text = "".join(f"{start}{name} <|constrain|>json<|message|>{_json(given)}<|call|>" for name, given in calls)
    return text.removeprefix("<|start|>assistant")


_ARGS = "<arg_key>%s</arg_key>\n<arg_value>%s"
_WRITERS: dict[str, Callable[[Sequence[Call]], str]] = {
    "hermes": _each("<tool_call>\n", "\n</tool_call>", _objects()),
    "qwen3_coder": _each(
        "<tool_call>\n",
        "\n</tool_call>",
        _tags("<function=%s>\n", "</function>", "<parameter=%s>\n%s", "\n</parameter>\n"),
    ),
    "seed_oss": _each(
        "<seed:tool_call>\n",
        "\n</seed:tool_call>",
        _tags("<function=%s>\n", "</function>", "<parameter=%s>%s", "</parameter>\n"),
    ),
    "minimax_m2": _all(
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
        _tags('<invoke name="%s">\n', "</invoke>\n", '<parameter name="%s">%s', "</parameter>\n"),
    ),
    "muse_spark": _all(
        " to=functions<|message|><atem:function_calls>\n",
        "</atem:function_calls>",
        _tags('<atem:invoke name="%s">\n', "</atem:invoke>\n", '<atem:parameter name="%s">%s', "</atem:parameter>\n"),
    ),
    "minicpm5": _each("", "", _tags('<function name="%s">', "</function>", '<param name="%s">%s', "</param>")),
    "glm45": _each("<tool_call>", "</tool_call>", _tags("%s\n", "", _ARGS, "</arg_value>\n")),
    "longcat": _each(
        "<longcat_tool_call>",
        "</longcat_tool_call>",
        _tags(
            "%s\n", "", _ARGS.replace("<", "<longcat_").replace("<longcat_/", "</longcat_"), "</longcat_arg_value>\n"
        ),
    ),
    "deepseek_v32": _all("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>", _dsml),
    "deepseek_v4": _all("<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>", _dsml),
    "kimi_k3": _all("<|open|>tools<|sep|>", "<|close|>tools<|sep|>", _kimi_k3),
    "pythonic": _all("<|tool_call_start|>[", "]<|tool_call_end|>", _python, ", "),
    "olmo3": _all("<function_calls>\n", "\n</function_calls>", _python, "\n"),
    "function_gemma": _each("<start_function_call>", "<end_function_call>", _gemma("<escape>")),
    "gemma4": _each("<|tool_call>", "<tool_call|>", _gemma('<|"|>')),
    "mistral": lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(given)}" for name, given in calls),
    "kimi_k2": _all(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        lambda call: (
            f"<|tool_call_begin|>functions.{call[0]}:0<|tool_call_argument_begin|>{_json(call[1])}<|tool_call_end|>"
        ),
    ),
    "deepseek_v3": _all(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        lambda call: (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call[0]}\n```json\n{_json(call[1])}\n```<｜tool▁call▁end｜>"
        ),
        "\n",
    ),
    "deepseek_v31": _all(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        lambda call: f"<｜tool▁call▁begin｜>{call[0]}<｜tool▁sep｜>{_json(call[1])}<｜tool▁call▁end｜>",
    ),
    "openai": _harmony,
    "cohere_command3": _all("<|START_ACTION|>[", "]<|END_ACTION|>", _objects("parameters", "tool_name"), ", "),
    "internlm": _each("<|action_start|><|plugin|>\n", "<|action_end|>", _objects("parameters")),
    "jamba": _all("<tool_calls>[", "]</tool_calls>", _objects(), ", "),
    "phi4_mini_json": _all("functools[", "]", _objects(), ", "),
    "granite": _all("<|tool_call|>[", "]", _objects(), ", "),
    "llama3_json": _all("<|python_tag|>", "", _objects("parameters"), "; "),
    "gigachat3": _each("function call<|role_sep|>\n", "", _objects()),
    "granite-20b-fc": _each("<function_call> ", "", _objects()),
    "xlam": _all("[TOOL_CALLS][", "]", _objects(), ", "),
}


def write(name: str, calls: Sequence[Call]) -> str:
    """``calls`` as a model of the form ``name`` writes them."""
    return _WRITERS[name](calls)


def forms() -> list[str]:
    """One name for each form of calls."""
    return list(_WRITERS)


def _random_call(chance: random.Random) -> Call:
    values: dict[str, Any] = {
        "command": chance.choice(
            ["lsblk", "echoes 'wörld' \"x\" > a.txt", "a\nb <b>", "", "if (x) { y[0] }", "12", "é🎉"]
        ),
        "count": chance.choice([0, -5, 12]),
        "items": chance.choice([[], [1, 2], ["a, b", "c]"]]),
    }
    names = chance.sample(list(values), chance.randint(0, 3))
    return chance.choice(["Bash", "look_up"]), {key: values[key] for key in names}


def _thought(name: str, chance: random.Random) -> str:
    parser = REASONING_PARSERS.get(THOUGHTS.get(name, ""))
    if parser is None or chance.random() < 0.5:
        return ""
    if name == "openai":
        return "<|channel|>analysis<|message|>Hm, wherefore?<|end|><|start|>assistant"
    return f"{parser.start}\nHm, wherefore?\n{parser.end}\n\n"


def intact(name: str, chance: random.Random) -> str:
    """A reply: perhaps a thought, perhaps text, one or two calls, perhaps text behind them."""
    calls = write(name, [_random_call(chance) for _ in range(chance.randint(1, 2))])
    before, behind = (chance.choice(["", text]) for text in ("Firstly this. ", "\nLastly that."))
    if name == "openai":
        final = "<|start|>assistant<|channel|>final<|message|>"
        before = f"{final.removeprefix('<|start|>assistant')}{before}<|end|><|start|>assistant" if before else ""
        behind = final + behind if behind else ""
    return _thought(name, chance) + before + calls + behind


def pieces_of(text: str) -> list[str]:
    """``text`` cut about as a tokenizer cuts it."""
    return _PIECE.findall(text)


def damaged(name: str, number: int) -> tuple[str, list[str]]:
    """A reply with one or two edits, and its pieces as tokens may cut them."""
    chance = random.Random(f"{name} {number}")
    pieces = pieces_of(intact(name, chance))
    marks = [*TOOL_PARSERS[name].starts, *TOOL_PARSERS[name].strays]
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(len(pieces))
        match chance.randrange(6):
            case 0:
                del pieces[at : at + chance.randint(1, 3)]
            case 1:
                pieces.insert(at, pieces[at])
            case 2:
                other = chance.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 3:
                pieces.insert(at, chance.choice([*marks, *_WRONG]))
            case 4:
                pieces.insert(at, chance.choice(_PROSE))
            case 5:
                pieces[at] = chance.choice([*marks, *_WRONG, *_PROSE])
        pieces = pieces or [" "]
    text = "".join(pieces)
    cut: list[str] = []
    place = 0
    while place < len(text):
        size = chance.choice([1, 1, 2, 3, 5, 8, 20])
        cut.append(text[place : place + size])
        place += size
    return text, cut
