"""Every error a user can meet, as one tree.

VMMagicError                    one line, names the fix
├── ConfigError                 a flag, keyword or environment variable (also a ValueError)
│   └── UnsupportedOptionError  an option that vLLM has and this engine lacks
├── ModelNotFoundError          no such model here, and how to get it
├── ModelLoadError              the model is here but cannot be used
├── MemoryPlanError             the plan does not fit; the numbers are attributes (also a ValueError)
├── MemoryInUseError            less memory than running requests hold; they are attributes (also a ValueError)
├── RequestError                a request that is wrong: HTTP 400 (also a ValueError)
│   ├── ContextLengthError      prompt and output exceed max_model_len
│   ├── UnknownModelError       a model name that is not served: HTTP 404
│   └── UnknownResponseError    a response that is not stored (any more): HTTP 404
├── GenerationError             one request failed while running; the engine goes on
│   ├── GrammarError            what its output must be became too complex, or cannot be: HTTP 400
│   └── OutOfMemoryError        there was not enough memory for it
├── EngineClosedError           the engine was closed or its thread failed
│   └── DeviceFailedError       the GPU failed, and this process cannot use it any more
├── OwnThreadError              a call that would wait for the very thread it was made on (also a RuntimeError)
└── ServerError                 the port could not be opened
"""

from dataclasses import dataclass
from typing import Any

from engine.format.text import harmless_line


class VMMagicError(Exception):
    """Base of all errors meant for users. The message is one line and names the fix.

    What it quotes of a model, a file or a server does nothing to a terminal.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        super().__init__(harmless_line(str(message)), *more)


class ConfigError(VMMagicError, ValueError):
    """A setting has a value outside its range.

    ``flag`` is the option's name, ``value`` what was given, ``allowed`` the range in words.
    """

    def __init__(self, message: str, *, flag: str = "", value: object = None, allowed: str = "") -> None:
        super().__init__(message)
        self.flag = flag
        self.value = value
        self.allowed = allowed


class UnsupportedOptionError(ConfigError):
    """An option that vLLM has and this engine does not: refused by name, never ignored."""


class ModelNotFoundError(VMMagicError):
    """The model is not on this machine. The message says how to get it."""


class ModelLoadError(VMMagicError):
    """The model's files are here but cannot be loaded."""


class MemoryPlanError(VMMagicError, ValueError):
    """The memory plan does not fit.

    ``numbers`` holds every figure of the plan in bytes or counts (also reachable as attributes),
    ``flag`` the name under which the user set the fraction.
    """

    def __init__(self, message: str, *, flag: str = "", **numbers: Any) -> None:
        super().__init__(message)
        self.flag = flag
        self.numbers = numbers

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["numbers"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """What a request under way holds, over its completions."""

    request_id: str
    num_tokens: int
    num_blocks: int


class MemoryInUseError(VMMagicError, ValueError):
    """A live change leaves less memory than requests under way hold: :attr:`requests` must end first."""

    def __init__(self, message: str, *, requests: tuple[HeldMemory, ...] = ()) -> None:
        super().__init__(message)
        self.requests = requests


class RequestError(VMMagicError, ValueError):
    """A request that cannot be served as asked. ``param`` names the field, ``code`` the HTTP status."""

    code = 400
    type = "BadRequestError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """Prompt and requested output do not fit in ``max_model_len``.

    ``num_prompt``, ``asked`` and ``limit`` are token counts: the prompt's, those to be generated, and both at most.
    """

    def __init__(
        self, message: str, *, param: str | None = None, num_prompt: int = 0, asked: int = 0, limit: int = 0
    ) -> None:
        super().__init__(message, param=param)
        self.num_prompt = num_prompt
        self.asked = asked
        self.limit = limit


class UnknownModelError(RequestError):
    """A model name that this engine does not serve."""

    code = 404
    type = "NotFoundError"


class UnknownResponseError(RequestError):
    """A response id that the port does not hold, or no longer."""

    code = 404
    type = "NotFoundError"


class GenerationError(VMMagicError):
    """One request failed while it ran; the engine goes on serving others."""


class GrammarError(GenerationError):
    """What a request asks of its output met a limit that is known only while it is written: asking again is no help."""


class OutOfMemoryError(GenerationError):
    """One request needs more memory than there is, now that it runs; the engine goes on serving others."""


class EngineClosedError(VMMagicError):
    """The engine was closed, or its thread failed (``__cause__`` holds the reason)."""


class DeviceFailedError(EngineClosedError):
    """The GPU failed in a way that no later call recovers from: only a new process can use it."""


class OwnThreadError(VMMagicError, RuntimeError):
    """A call on the engine's own thread that would wait for that thread, for ever."""


class ServerError(VMMagicError):
    """The port could not be opened."""


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked: no Exception, of a class that cannot be imported."""
    return type(error).__name__ == "PanicException"


def error_line(error: BaseException, most: int = 160) -> str:
    """The type of ``error`` and what it says, at most ``most`` characters of it, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"
