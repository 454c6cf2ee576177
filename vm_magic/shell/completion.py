"""Tab completion of our magics, as IPython takes it."""

import re
from collections.abc import Callable

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

MATCHER_ID = "vm_magic"
_OURS = re.compile(r"(?:^|.*[\s=(])(%%?)(vllm_metal|chat)[ \t](.*)$", re.DOTALL)
Matcher = Callable[[CompletionContext], SimpleMatcherResult]


def make_matcher(owns_chat: bool) -> Matcher:
    """IPython's v2 matcher for our magics; ``%%chat`` only where that name is ours."""

    @context_matcher(identifier=MATCHER_ID)  # type: ignore[untyped-decorator]
    def vm_matcher(context: CompletionContext) -> SimpleMatcherResult:
        line = context.full_text.split("\n")[context.cursor_line][: context.cursor_position]
        found = _OURS.match(line)
        if not found or (found[2] == "chat" and not (owns_chat and found[1] == "%%")):
            return {"completions": []}
        from vm_magic.commands.table import candidates

        words = found[3] if found[2] == "vllm_metal" else f"chat {found[3]}"
        fragment = re.split(r"\s", words)[-1]
        before = words[: len(words) - len(fragment)].split()
        options = candidates(before, fragment, cell=found[1] == "%%")
        completions = [SimpleCompletion(text=o, type="param") for o in options if o.startswith(fragment)]
        return {"completions": completions, "suppress": bool(completions), "matched_fragment": fragment}

    matcher: Matcher = vm_matcher
    return matcher
