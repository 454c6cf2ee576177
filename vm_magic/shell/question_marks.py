"""Lets a line such as ``%vllm_metal chat What is 2+2?`` end in a question mark.

IPython reads a trailing ``?`` as a call for help before it looks at the magic. This transform turns such
lines into plain calls first; ``%vllm_metal?`` and ``%vllm_metal chat?`` still show help.
"""

import re

_QUESTION = re.compile(r"^(\s*(?:[^\W\d]\w*\s*=\s*)?)%vllm_metal[ \t]+((?:chat|complete)[ \t]+\S.*\?)\s*$")


def keep_questions(lines: list[str]) -> list[str]:
    """Rewrite question lines of a cell. Runs after cell magics have become calls, before IPython's own ``?``."""
    result: list[str] = []
    open_quotes = {'"""': False, "'''": False}
    for line in lines:
        found = None if any(open_quotes.values()) else _QUESTION.match(line)
        if found:
            line = f"{found[1]}get_ipython().run_line_magic('vllm_metal', {found[2]!r})\n"
        else:
            for quote in open_quotes:
                open_quotes[quote] ^= line.count(quote) % 2 == 1
        result.append(line)
    return result
