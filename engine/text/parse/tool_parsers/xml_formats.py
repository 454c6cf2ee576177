"""The formats of calls written as tags, each by its tags."""

from dataclasses import dataclass

from engine.text.parse.scan.output_sink import OutputSink
from engine.text.parse.scan.scanner import Scanner, Steps
from engine.text.parse.tool_parsers.base import FormatFacts, ToolSchemas, function_name
from engine.text.parse.tool_parsers.xml_calls import XmlCalls

QWEN3_CODER = XmlCalls(
    "<tool_call>",
    "</tool_call>",
    "<function=",
    (">", "\n"),
    "</function>",
    "<parameter=",
    (">",),
    "</parameter>",
    newlines=True,
    templates=(("<tool_call>", "<function="),),
)
SEED_OSS = XmlCalls(
    "<seed:tool_call>",
    "</seed:tool_call>",
    "<function=",
    (">",),
    "</function>",
    "<parameter=",
    (">",),
    "</parameter>",
    templates=(("<seed:tool_call>",),),
)
MINIMAX_M2 = XmlCalls(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=",
    (">",),
    "</invoke>",
    "<parameter name=",
    (">",),
    "</parameter>",
    quoted=True,
    templates=(("<minimax:tool_call>",),),
)
DEEPSEEK_V32 = XmlCalls(
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    "<｜DSML｜invoke name=",
    (">",),
    "</｜DSML｜invoke>",
    "<｜DSML｜parameter name=",
    (">",),
    "</｜DSML｜parameter>",
    quoted=True,
    templates=(("｜DSML｜",),),
)
DEEPSEEK_V4 = XmlCalls(
    "<｜DSML｜tool_calls>",
    "</｜DSML｜tool_calls>",
    "<｜DSML｜invoke name=",
    (">",),
    "</｜DSML｜invoke>",
    "<｜DSML｜parameter name=",
    (">",),
    "</｜DSML｜parameter>",
    quoted=True,
    templates=(("｜DSML｜", "'tool_calls>"),),
)
MINICPM5 = XmlCalls(
    "",
    "",
    "<function name=",
    (">",),
    "</function>",
    "<param name=",
    (">",),
    "</param>",
    quoted=True,
    cdata=True,
    templates=(('<function name="', '<param name="'),),
)
GLM45 = XmlCalls(
    "<tool_call>",
    "</tool_call>",
    "",
    ("\n", "<arg_key>", "</tool_call>", "{"),
    "",
    "<arg_key>",
    ("</arg_key>", "<arg_value>"),
    "</arg_value>",
    templates=(("<arg_key>",),),
)
LONGCAT = XmlCalls(
    "<longcat_tool_call>",
    "</longcat_tool_call>",
    "",
    ("\n", "<longcat_arg_key>", "</longcat_tool_call>", "{"),
    "",
    "<longcat_arg_key>",
    ("</longcat_arg_key>", "<longcat_arg_value>"),
    "</longcat_arg_value>",
    templates=(("<longcat_tool_call>",),),
)
KIMI_K3 = XmlCalls(
    "<|open|>tools<|sep|>",
    "<|close|>tools<|sep|>",
    "<|open|>call tool=",
    ("<|sep|>",),
    "<|close|>call<|sep|>",
    "<|open|>argument key=",
    ("<|sep|>",),
    "<|close|>argument<|sep|>",
    quoted=True,
    whole='<|open|>json type="object"<|sep|>',
    whole_end="<|close|>json<|sep|>",
    vocab=frozenset({"<|open|>", "<|close|>", "<|sep|>"}),
)
_ATEM = XmlCalls(
    "<atem:function_calls>",
    "</atem:function_calls>",
    "<atem:invoke name=",
    (">",),
    "</atem:invoke>",
    "<atem:parameter name=",
    (">",),
    "</atem:parameter>",
    quoted=True,
)


@dataclass(frozen=True)
class MuseCalls(FormatFacts):
    """Muse Spark's tags, in messages whose header names the tool: ``to=f<|message|><atem:function_calls>…``."""

    header: str = "to="
    starts: tuple[str, ...] = (_ATEM.start, "to=")
    ends: tuple[str, ...] = _ATEM.ends
    strays: tuple[str, ...] = _ATEM.strays
    bare: str = ""

    def read(self, scanner: Scanner, sink: OutputSink, tools: ToolSchemas, start: str) -> Steps[None]:
        """The functions of a section, after the message's header if one is there."""
        if start == self.header:
            function_name((yield from scanner.word("<\n")))
            yield from scanner.expect("<|message|>")
            yield from scanner.skip_space()
            start = yield from scanner.expect(_ATEM.start)
        yield from _ATEM.read(scanner, sink, tools, start)


MUSE_SPARK = MuseCalls(templates=((_ATEM.start,),))
