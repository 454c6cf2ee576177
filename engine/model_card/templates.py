"""A model's chat templates: where they stand, what they read, and the parsers that are chosen by them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from engine.errors import RequestError
from engine.model_card.card import Fact
from engine.model_card.model_files import ModelFiles
from engine.model_card.switches import EFFORTS, SWITCHES, default_of, own_variables
from engine.model_card.tokens import TokenizerFiles
from engine.models.weight_format import read_json
from engine.text.parse.parser_choice import ParserChoice
from engine.text.parse.reasoning_parsers import REASONING_PARSERS, detect_reasoning_parser
from engine.text.parse.tool_parsers import TOOL_PARSERS
from engine.text.template.chat_template import ChatTemplate, parse_template

_ALWAYS_GIVEN = frozenset(("bos_token", "eos_token", "unk_token", "pad_token", "documents"))
_CONFIG, _JSON, _JINJA, _MORE = (
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates",
)


_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<|return|>", "<end_of_turn>", "<turn|>", "<|end_of_text|>"),
    *("<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "[e~["),
)
"""Tokens with which chat formats end a turn."""


@dataclass(frozen=True)
class _Written:
    """A template as it is written in one place."""

    name: str
    text: str
    source: str


def templates(files: ModelFiles, read: TokenizerFiles, end_ids: Collection[int]) -> Iterator[Fact]:
    """Each template: where it stands, its variables, whether it shows tools, how thinking is switched.

    ``end_ids`` are the tokens that end a reply: a turn must end with one of them.
    """
    named = read.tokenizer.named_templates
    written = list(_written(read))
    given = files.args.chat_template is not None
    if given:
        used = ChatTemplate.of_model(files.args, read.tokenizer).source
        yield from _template(files, "", used or "", "--chat-template, in place of the model's own", read)
    for name, text in sorted(named.items(), key=lambda item: (item[0] != "default", item[0])):
        sources = [one.source for one in written if one.name == name and one.text == text]
        others = [one.source for one in written if one.name == name and one.text != text]
        source = "; ".join(sources) or read.file
        prefix = "" if name == "default" and not given else f"{name}: "
        yield from _template(files, prefix, text, source, read)
        if others:
            files.remark(f"{source} is used, and {', '.join(others)} has another template {name!r}")
    if not named and not given:
        files.remark("no chat template: chats need --chat-template, completions do without")
    elif "default" not in named and not given:
        files.remark(
            f"none of the templates is the default: name one with --chat-template ({', '.join(sorted(named))})"
        )
    _note_endless_turns(files, read, end_ids)


def _note_endless_turns(files: ModelFiles, read: TokenizerFiles, end_ids: Collection[int]) -> None:
    """Where a template ends turns with a token that ends no reply, the model would go on to speak for the user."""
    text = ChatTemplate.of_model(files.args, read.tokenizer).source or ""
    ids = {mark: read.tokenizer.hf.token_to_id(mark) for mark in _TURN_ENDS if mark in text}
    marks = {mark: token_id for mark, token_id in ids.items() if token_id is not None}
    if marks and not set(marks.values()) & set(end_ids):
        files.problem(
            f"the chat template ends turns with {', '.join(marks)}, which is no end token: replies would go on"
        )


def parsers(files: ModelFiles, read: TokenizerFiles) -> Iterator[Fact]:
    """The parsers of thoughts and of tool calls that a load would choose, and why these."""
    template = ChatTemplate.of_model(files.args, read.tokenizer)
    chosen = ParserChoice.of_model(files.args, template, read.tokenizer)
    vocab = {token.content for token in read.tokenizer.hf.get_added_tokens_decoder().values()}
    for_tools = template.chosen(None, with_tools=True).source
    reasoning, calls = chosen.reasoning_parser, chosen.tool_call_parser
    found = (
        ("reasoning", files.args.reasoning_parser, reasoning, REASONING_PARSERS.get(reasoning or ""), template.source),
        ("tool calls", files.args.tool_call_parser, calls, TOOL_PARSERS.get(calls or ""), for_tools),
    )
    for kind, given, name, parser, text in found:
        if given is not None:
            yield Fact(kind, given, "--reasoning-parser" if kind == "reasoning" else "--tool-call-parser")
        elif parser is None:
            yield Fact(kind, "none", "neither the template nor the added tokens show a known format")
        else:
            yield Fact(kind, str(name), _reason(parser, text or "", vocab))
    if for_tools and chosen.tool_call_parser is None and _reads_tools(for_tools):
        files.remark("the template shows tools, and no parser for their calls was recognised: name --tool-call-parser")


def _template(files: ModelFiles, prefix: str, text: str, source: str, read: TokenizerFiles) -> Iterator[Fact]:
    """The facts of one template; one that is not valid Jinja is a problem."""
    try:
        tree = parse_template(text)
    except jinja2.TemplateSyntaxError as error:
        files.problem(f"{source}: the chat template is not valid Jinja (line {error.lineno}: {error.message})")
        return
    template = ChatTemplate(text)
    yield Fact(f"{prefix}template", f"{len(text)} characters", source)
    usual = _ALWAYS_GIVEN | read.tokenizer.named_tokens.keys() | own_variables(tree)
    more = tuple(sorted(template.variables - usual))
    yield Fact(f"{prefix}variables", more or "none but messages", source)
    yield Fact(f"{prefix}tools", template.takes_tools, source)
    switched = False
    for name in SWITCHES:
        given = files.args.default_chat_template_kwargs.get(name)
        default = default_of(tree, name) if given is None else given
        if name not in template.variables or (name not in EFFORTS and not isinstance(default, bool | None)):
            continue  # not there, or a variable of the template's own that happens to be called so
        switched = True
        flag = source if given is None else "--default-chat-template-kwargs"
        yield Fact(f"{prefix}thinking", f"{name}, {_switched(default)} unless set", flag)
    if not switched:
        thinks = detect_reasoning_parser(text, ()) is not None
        yield Fact(f"{prefix}thinking", "yes, without a switch" if thinks else "no", source)


def _reads_tools(text: str) -> bool:
    """Whether a template shows tools; one that is not valid Jinja was noted before."""
    try:
        return ChatTemplate(text).takes_tools
    except RequestError:
        return False


def _switched(default: Any) -> str:
    if default is None:
        return "as the template decides"
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else repr(default)


def _reason(parser: Any, template: str, vocab: Collection[str]) -> str:
    """What the parser was recognised by: marks in the template, or tokens that the model has."""
    for marks in parser.templates:
        if all(mark in template for mark in marks):
            return f"the template has {', '.join(mark.strip() for mark in marks if mark)}"
    if parser.in_vocab(vocab):
        return f"the tokenizer has {', '.join(sorted(parser.vocab))}"
    return "the template"


def _written(read: TokenizerFiles) -> Iterator[_Written]:
    """Every template in every place where one may stand, used or not."""
    if read.folder is None:
        key = "tokenizer.chat_template"
        for name, text in read.tokenizer.named_templates.items():
            yield _Written(name, text, f"{read.file}: {key}" if name == "default" else f"{read.file}: {key}.{name}")
        return
    folder: Path = read.folder
    for file in (folder / _JINJA, *sorted((folder / _MORE).glob("*.jinja"))):
        if file.is_file():
            name = "default" if file.name == _JINJA and file.parent == folder else file.stem
            yield _Written(name, file.read_text(encoding="utf-8"), str(file.relative_to(folder)))
    for name in (_JSON, _CONFIG):
        template = read_json(folder / name).get("chat_template")
        entries = template if isinstance(template, list) else [{"name": "default", "template": template}]
        for entry in entries:
            if isinstance(entry, Mapping) and isinstance(entry.get("template"), str):
                yield _Written(str(entry.get("name")), str(entry["template"]), f"{name}: chat_template")
