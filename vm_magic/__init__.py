"""A language model living inside the notebook: ``%load_ext vm_magic``, then ``%vllm_metal --help``.

From Python, ``from vm_magic import LLM, SamplingParams``: all that :mod:`engine` gives, loaded when first used.
"""

from typing import TYPE_CHECKING, Any

from vm_magic.shell.shadowed_engine import check_engine

if TYPE_CHECKING:
    from engine import *  # noqa: F403 - each name of engine is one of ours
    from engine.llm import LLM
    from vm_magic.remote.llm import RemoteLLM
    from vm_magic.summaries.registry import describe as describe

check_engine()
if not TYPE_CHECKING:  # type checkers see the names through the import above; they could not read a computed list
    import engine

    __all__ = [*engine.__all__, "current", "describe", "load_ipython_extension", "unload_ipython_extension"]

    def __getattr__(name: str) -> Any:
        if name in engine.__all__:
            return getattr(engine, name)
        if name == "describe":
            from vm_magic.summaries.registry import describe

            return describe
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


def current() -> "LLM | RemoteLLM | None":
    """The notebook's model, or None: cells, magics and the port share this one engine.

    After ``%vllm_metal connect`` it is the :class:`vm_magic.remote.llm.RemoteLLM` (``map``, ``settings``,
    ``models()``, ``submit_chat``), until ``connect --close``.
    """
    from vm_magic.state.session import peek_session

    session = peek_session()
    return None if session is None else session.remote or session.loaded


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext vm_magic``: registers the magics; imports no model code."""
    check_engine()
    from vm_magic.shell.extension import install

    install(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext vm_magic``: stops the port, frees the model, leaves nothing behind."""
    from vm_magic.shell.extension import uninstall

    uninstall(shell)
