#!/usr/bin/env bash
# apply_chat_template leaves out what is None in a message, and some templates show a call only where content is None.
#
# transformers 5.24.0, jinja2 3.1.6, trl 1.16.0, Python 3.11 or newer, Linux x86-64.
# One would guess: a message whose content is None reaches the template so, as OpenAI's API sends it with tool calls; at
# least one way of writing such a message works for each of the templates that trl brings for transformers.
# Seen: apply_chat_template drops every key of a message that is None. DeepSeek R1's distills ask `content is none`
# before they show a call. Without the key the template fails, with "" it renders and the call is lost. With None, as
# render_jinja_template (the function below apply_chat_template) still gives it, the call is there.
# Why it matters: with "" nothing fails, and the model reads a tool's result for a call that it never made.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0' 'jinja2==3.1.6'
"$work/venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" 'trl==1.16.0'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

(wheel,) = Path(sys.argv[1]).glob("trl-*.whl")
template = zipfile.ZipFile(wheel).read("trl/chat_templates/deepseek_r1_distill.jinja").decode()
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0}, unk_token="<s>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", chat_template=template)


def conversation(content):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    return [{"role": "user", "content": "Weather?"}, answer, {"role": "tool", "content": "rain"}]


def outcome(render, content):
    try:
        text = render(conversation(content))
    except Exception as error:
        return f"fails: {error}"
    return "the call is there" if "Oslo" in text else "the call is lost"


def apply(messages):
    return tokenizer.apply_chat_template(messages, tokenize=False)


def below(messages):
    return render_jinja_template([messages], chat_template=template, bos_token="<s>")[0][0]


print("apply_chat_template, content None:", outcome(apply, None))
print("apply_chat_template, content '':", outcome(apply, ""))
print("render_jinja_template, content None:", outcome(below, None))

assert outcome(apply, None).startswith("fails")
assert outcome(apply, "") == "the call is lost"
assert outcome(below, None) == "the call is there"
PYTHON
