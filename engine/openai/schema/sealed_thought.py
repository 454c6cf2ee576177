"""Thoughts as ``encrypted_content``: opaque to clients, which send it back, and readable again here.

Nothing in it is secret, since the thought is sent in full beside it: there is no key, and a server that was started
anew reads it too. The check tells a damaged text, and one of another server, from one of ours.
"""

import base64
import binascii
import hashlib

_MARK = "vm1."
_CHECK_BYTES = 8


def seal(thought: str) -> str:
    """``thought`` for a client to keep."""
    data = thought.encode("utf-8", "replace")
    return _MARK + base64.urlsafe_b64encode(_check(data) + data).decode("ascii")


def unseal(sealed: object) -> str | None:
    """The thought of :func:`seal`; None for anything else."""
    if not isinstance(sealed, str) or not sealed.startswith(_MARK):
        return None
    try:
        whole = base64.b64decode(sealed.removeprefix(_MARK), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    check, data = whole[:_CHECK_BYTES], whole[_CHECK_BYTES:]
    try:
        return data.decode("utf-8") if check == _check(data) else None
    except UnicodeDecodeError:  # without a key anybody can make a check
        return None


def _check(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK_BYTES]
