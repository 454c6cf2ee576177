#!/usr/bin/env bash
# What IPython captures of a display that is updated: each of its states as an output of its own.
#
# ipython 9.18.1, Python 3.11 or newer.
# One would guess: capture_output() and %%capture hold one output for a display with an id, in its last state, as a
# notebook shows it (and as nbformat stores it); or the updates are marked so that show() can replace the first.
# Seen: display(…, display_id=…) and two update() calls give three outputs. The updates carry update=True and the same
# display id, but show() displays three texts below each other.
# Why it matters: a progress bar or a reply that grows in one place fills captured output with hundreds of its states.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'ipython==9.18.1'
cat > "$work/cell.py" <<'PYTHON'
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Pretty, display
from IPython.utils.capture import capture_output

shell = InteractiveShell.instance()
with capture_output() as kept:
    handle = display(Pretty("one"), display_id="place")
    handle.update(Pretty("one two"))
    handle.update(Pretty("one two three"))
states = [output.data["text/plain"] for output in kept.outputs]
print("outputs:", states)
print("updates:", [getattr(output, "update", None) for output in kept.outputs])
assert states == ["one", "one two", "one two three"]
with capture_output() as shown:
    kept.show()
print("show() gives", len(shown.outputs), "outputs")
assert len(shown.outputs) == 3
PYTHON
IPYTHONDIR="$work/ipython" "$work/venv/bin/python" "$work/cell.py"
