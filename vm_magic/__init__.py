"""A language model living inside the notebook: ``%load_ext vm_magic``, then ``%vllm_metal --help``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.llm import LLM
    from vm_magic.remote.llm import RemoteLLM

__all__ = ["current", "load_ipython_extension", "unload_ipython_extension"]


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
    from vm_magic.shell.extension import install

    install(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext vm_magic``: stops the port, frees the model, leaves nothing behind."""
    from vm_magic.shell.extension import uninstall

    uninstall(shell)
