#!/usr/bin/env bash
# One Sphinx field whose type has more than one word makes docstring_parser lose every field of the docstring.
#
# docstring-parser 0.18.0, Python 3.11 or newer.
# One would guess: a field that cannot be read (":param list of int x:", ":param dict[str, int] x:" with its blank) is
# left out or taken whole, and the other fields of the same docstring are read.
# Seen: parse() with the style left to it gives no parameter at all; all fields, the good one too, land in the long
# description. Asked for the reST style by name it raises ParseError.
# Why it matters: tools for language models describe a function's arguments from such docstrings, and the model is told
# nothing of any of them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'docstring-parser==0.18.0'
"$work/venv/bin/python" - <<'PYTHON'
from docstring_parser import DocstringStyle, ParseError, parse

GOOD = "Add.\n\n:param int x: First.\n:param int y: Second."
for typed in ("list of int", "dict[str, int]"):
    mixed = GOOD.replace("int y", f"{typed} y")
    found = parse(mixed)
    print(f"{typed!r}:", [one.arg_name for one in found.params], "long description:", repr(found.long_description))
    assert found.params == []
    assert ":param int x: First." in found.long_description
    try:
        parse(mixed, style=DocstringStyle.REST)
    except ParseError as error:
        print("  by name:", error)
    else:
        raise AssertionError("the reST style reads it now")
assert [one.arg_name for one in parse(GOOD).params] == ["x", "y"]
PYTHON
