"""What the tokenizers library raises while texts and tokens pass, as errors of ours.

It raises plain ``Exception``, and a panic of its Rust code is a ``BaseException``, which would end a thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import GenerationError, RequestError, error_line, is_panic

_FIX = "the model's tokenizer files may be damaged: fetch them again, or give another with --tokenizer"


@contextmanager
def encoding() -> Iterator[None]:
    """A text becomes tokens here. Raises RequestError."""
    try:
        yield
    except TypeError:
        raise RequestError("The text is not valid Unicode: it holds half of a surrogate pair.") from None
    except BaseException as error:
        if not of_library(error):
            raise
        raise RequestError(f"The tokenizer cannot read this text ({error_line(error)}); {_FIX}.") from None


@contextmanager
def decoding() -> Iterator[None]:
    """Tokens become a text here. Raises GenerationError."""
    try:
        yield
    except BaseException as error:
        if not of_library(error):
            raise
        raise not_decoded(error) from None


def not_decoded(error: BaseException) -> GenerationError:
    """What to raise where ``error`` came of decoding."""
    return GenerationError(f"the tokenizer cannot decode what the model wrote ({error_line(error)}); {_FIX}")


def of_library(error: BaseException) -> bool:
    """Whether ``error`` is about the tokens: any Exception, and Rust's panics."""
    return isinstance(error, Exception) or is_panic(error)
