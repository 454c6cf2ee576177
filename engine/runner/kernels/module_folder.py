"""The folder in which MLX looks for compiled code before it compiles or loads a module.

A kernel given to MLX as machine code is hashed at every launch, 10 µs for 70 kB. MLX names the module after that hash
and looks for a file of that name first, so a short token in place of the code, with the code in that file, launches
at once. That is no documented promise: :mod:`kernel_cache` tries it before relying on it.
"""

import ctypes
import hashlib
import os
import stat
import tempfile
from importlib import metadata
from pathlib import Path

from engine.runner.kernels.kernel_store import make_private, replace_file

_VARIABLE = "MLX_PTX_CACHE_DIR"
_SEED = 0xC70F6907
"""Of ``std::hash<std::string>`` in libstdc++."""


class ModuleFolder:
    """Where MLX looks, if only this user may write there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handed_over: dict[bytes, tuple[bytes, str]] = {}

    def token(self, symbol: str, code: bytes) -> bytes | None:
        """What stands for ``code``, which MLX finds from now on; None where that is not possible."""
        token, path = self._handed_over.get(code, (None, ""))
        # Folders for temporary files are cleaned now and then.
        if token is None or not os.path.exists(path):
            token = self._hand_over(symbol, code)
        return token

    def _hand_over(self, symbol: str, code: bytes) -> bytes | None:
        token = hashlib.sha256(code).digest()
        module = self.folder / f"{symbol}_{standard_hash(token):x}.ptx"
        names = f"{symbol}\t{symbol}\n".encode()
        # Always anew: what a process before left there may be torn or altered.
        if not replace_file(module.with_suffix(".txt"), names) or not replace_file(module, code):
            return None
        self._handed_over[code] = token, str(module)
        return token


def module_folder(own: Path) -> ModuleFolder | None:
    """The folder of this process's MLX. Where others may write to that, or it is theirs, MLX is sent to ``own``.

    It heeds that only before it has compiled anything.
    """
    given = os.environ.get(_VARIABLE)
    folder = Path(given) if given else Path(tempfile.gettempdir()) / "mlx" / metadata.version("mlx") / "ptx"
    if _only_ours(folder, up_to=folder.parent if given else folder.parents[2]):
        return ModuleFolder(folder)
    if given or not make_private(own):
        return None
    os.environ[_VARIABLE] = str(own)
    return ModuleFolder(own)


def standard_hash(content: bytes) -> int:
    """``std::hash<std::string>`` of the C++ library that MLX is linked with; OSError, AttributeError: of another."""
    function = ctypes.CDLL("libstdc++.so.6")["_ZSt11_Hash_bytesPKvmm"]
    function.restype = ctypes.c_size_t
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t)
    return int(function(content, len(content), _SEED))


def _only_ours(folder: Path, *, up_to: Path) -> bool:
    """Whether only this user may write to ``folder`` (made where it is missing) and what it lies in below ``up_to``."""
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        while folder != up_to:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return False
            folder = folder.parent
    except OSError:
        return False
    return True
