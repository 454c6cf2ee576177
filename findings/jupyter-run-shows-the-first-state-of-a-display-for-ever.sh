#!/usr/bin/env bash
# jupyter run prints what a display was at first and drops all that it became.
#
# jupyter_client 8.10.0, ipykernel 7.4.0, ipython 9.18.1, Python 3.11 or newer. jupyter-console 6.6.3 and qtconsole
# have no handler for update_display_data either.
# One would guess: a client that shows display_data shows an update of it too: in its place where it can, else as a new
# line, since the message holds all that is to be shown.
# Seen: of display("waiting …") updated to "the answer", only "waiting …" is printed; nothing tells that more came.
# Why it matters: a kernel cannot ask what its front end handles. What streams into one place, as a language model's
# reply does, is never seen there; it must be printed for such clients, which have to be told apart by other signs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'jupyter-client==8.10.0' 'ipykernel==7.4.0' 'ipython==9.18.1'
cat > "$work/cell.py" <<'PYTHON'
from IPython.display import Pretty, display

place = display(Pretty("waiting"), display_id=True)
place.update(Pretty("the answer"))
print("the cell ended")
PYTHON
export IPYTHONDIR="$work/ipython" JUPYTER_DATA_DIR="$work/data" JUPYTER_RUNTIME_DIR="$work/runtime" JUPYTER_PLATFORM_DIRS=1
export JUPYTER_CONFIG_DIR="$work/config"
"$work/venv/bin/python" -m ipykernel install --prefix "$work/venv" >/dev/null 2>&1
printed=$("$work/venv/bin/jupyter-run" "$work/cell.py" 2>"$work/errors.txt") || { cat "$work/errors.txt"; exit 1; }
echo "printed: $printed"
grep -q "waiting" <<<"$printed"
grep -q "the cell ended" <<<"$printed"
if grep -q "the answer" <<<"$printed"; then
    echo "the update is shown now"
    exit 1
fi
