"""What those who wait are told of an exception that was not meant for them."""

import logging

from engine.core.request import Request
from engine.errors import GenerationError, OutOfMemoryError, VMMagicError
from engine.runner.device.faults import device_failure
from engine.runner.device.memory import is_out_of_memory

logger = logging.getLogger("engine")
MEMORY_HELP = "free memory on this device, lower max_num_seqs, or load a smaller model"
NOT_FINITE = "the model gave no finite logits: its weights or element type are broken"
LEAVING = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a program or a load. Any other BaseException, such as a Rust library's panic, is a failure like others."""


def failure_of(what: str, error: BaseException) -> VMMagicError:
    """What a request is told that failed by ``error``, also in the log; errors meant for users stay as they are.

    Raises DeviceFailedError where nothing can go on, and what means to end the program.
    """
    if isinstance(error, LEAVING):
        raise error
    lasting = device_failure(error)
    if lasting is not None:
        raise lasting
    logger.error("%s: %s", what, one_line(error))
    if isinstance(error, VMMagicError):
        return error
    if is_out_of_memory(error):
        failure: VMMagicError = OutOfMemoryError(f"out of memory in this step ({one_line(error)}); {MEMORY_HELP}")
    else:
        failure = GenerationError(f"{what}: {one_line(error)}; the engine goes on without this request")
    failure.__cause__ = error.with_traceback(None)  # its frames hold the weights
    return failure


def no_token(request: Request) -> str:
    """Why a row gave no token."""
    if request.params.allowed_token_ids is not None:
        return "no token is left of allowed_token_ids that bad_words, logit_bias and min_tokens allow"
    if request.guide is not None and request.guide.waits:
        return "no token is left that the grammar and the request's bad_words, logit_bias and min_tokens all allow"
    return NOT_FINITE


def one_line(error: BaseException) -> str:
    """At most 200 characters of ``error``."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200] if isinstance(error, VMMagicError) else f"{type(error).__name__}: {text}"[:200]
