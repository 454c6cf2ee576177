#!/usr/bin/env bash
# Ctrl-C on a cell that awaits, in a terminal: the prompt comes back and the coroutine's task stays pending.
#
# ipython 9.18.1, pexpect 4.9, Python 3.11 or newer, Linux.
# One would guess: as with asyncio.run, the interrupt cancels the task, so that its finally blocks run and what it waits
# for is given up (a connection, a request to a model).
# Seen: KeyboardInterrupt leaves loop.run_until_complete; the task is neither cancelled nor waited for. Its finally block
# has not run, and it goes on with the next cell that awaits.
# Why it matters: a request that a cell awaits goes on in an engine or at a server that nobody waits for any more.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'ipython==9.18.1' 'pexpect==4.9.0'
cat > "$work/waiting.py" <<'PYTHON'
import asyncio
import os
import signal
import threading

done, tasks = [], []


async def wait():
    tasks.append(asyncio.current_task())
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()  # what Ctrl-C sends
    try:
        await asyncio.sleep(600)
    finally:
        done.append("ended")
PYTHON
IPYTHONDIR="$work/ipython" PYTHONPATH="$work" "$work/venv/bin/python" - <<'PYTHON'
import os
import sys

import pexpect

PROMPT = r"In \[\d+\]: "
flags = ["-m", "IPython", "--no-banner", "--colors=NoColor", "--simple-prompt", "--no-confirm-exit"]
environment = {**os.environ, "TERM": "dumb"}
child = pexpect.spawn(sys.executable, flags, env=environment, encoding="utf-8", timeout=60, echo=False)


def said(code):
    child.sendline(code)
    child.expect(PROMPT)
    return child.before.replace("\r\n", "\n").strip()


child.expect(PROMPT)
said("from waiting import done, tasks, wait")
print("the cell:", said("await wait()").splitlines()[-1])
state = said("print(done, tasks[0].done(), tasks[0].cancelling())")
print("its finally block, whether it is done, requests to cancel it:", state)
assert state == "[] False 0"
PYTHON
