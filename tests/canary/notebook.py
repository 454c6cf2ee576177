"""Seams of IPython, ipykernel, comm and ipywidgets."""

import importlib.metadata

from tests.canary.probe import Seam, expect, named


def transforms() -> None:
    from IPython.core.inputtransformer2 import TransformerManager, cell_magic

    manager = TransformerManager()
    known = (*manager.cleanup_transforms, *manager.line_transforms)
    expect(cell_magic in known, "cell magics are made calls elsewhere")
    for name in ("line_transforms", "do_token_transforms", "do_one_token_transform"):
        expect(hasattr(manager, name), f"a TransformerManager has no {name}")


def shells() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    for name in ("events", "displayhook", "display_pub", "Completer", "input_transformer_manager", "magics_manager"):
        expect(name in InteractiveShell.class_trait_names() or hasattr(InteractiveShell, name) or name in _made(), name)


def _made() -> set[str]:
    """What a shell has once it is made; without making one, which would take the place of the running one."""
    import inspect

    from IPython.core import interactiveshell

    text = inspect.getsource(interactiveshell.InteractiveShell)
    names = ("events", "displayhook", "display_pub", "Completer", "input_transformer_manager", "magics_manager")
    return {name for name in names if f"self.{name} = " in text}


def matchers() -> None:
    from IPython.core.completer import IPCompleter

    completer = IPCompleter()
    expect(isinstance(completer.custom_matchers, list), "a completer has no list of custom_matchers")
    expect(completer.custom_matchers is completer.custom_matchers, "its list is made anew each time")


def _names(kind: type) -> set[str]:
    return {name for one in vars(kind).values() if hasattr(one, "__code__") for name in one.__code__.co_names}


def errors_of_their_own() -> None:
    from IPython.core import interactiveshell

    expect("_render_traceback_" in _names(interactiveshell.InteractiveShell), "errors are not asked how they look")


def widgets_and_subshells() -> None:
    import ipywidgets

    for name in ("open", "close", "hold_sync", "send_state", "comm"):
        expect(hasattr(ipywidgets.Widget, name), f"a widget has no {name}")
    from ipykernel.comm import Comm

    version = tuple(int(part) for part in importlib.metadata.version("ipykernel").split(".")[:2])
    if version >= (7, 4):
        told = "comms find their subshell otherwise: see answer_on_any_subshell"
        expect(hasattr(Comm, "_reply_subshell_for"), told)


def shown_tracebacks() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    expect("_showtraceback" in _names(InteractiveShell), "tracebacks are shown by another method than _showtraceback")


def parent_headers() -> None:
    from ipykernel.zmqshell import ZMQInteractiveShell

    expect(hasattr(ZMQInteractiveShell, "parent_header"), "a kernel's shell has no parent_header")


def managers_of_comms() -> None:
    import comm
    import comm.base_comm as base

    expect(hasattr(base, "CommManager") and callable(comm.get_comm_manager), "comm has no manager of its own")


NOTEBOOK = (
    Seam("ipython", "transforms of input", "vm_magic/shell/hooks.py", transforms),
    Seam("ipython", "parts of a shell", "vm_magic/shell/extension.py", shells),
    Seam("ipython", "custom_matchers", "vm_magic/shell/extension.py", matchers),
    Seam("ipython", "_render_traceback_", "vm_magic/show/errors.py", errors_of_their_own),
    Seam(
        "ipython",
        "values of cells",
        "vm_magic/commands/base.py",
        named(
            "IPython.core.displayhook",
            "DisplayHook.update_user_ns",
            "DisplayHook.fill_exec_result",
            "CapturingDisplayHook",
        ),
    ),
    Seam(
        "ipython",
        "reload_extension",
        "vm_magic/shell/extension.py",
        named("IPython.core.extensions", "ExtensionManager.reload_extension.__code__"),
    ),
    Seam(
        "ipython",
        "publishers of displays",
        "vm_magic/show/front_end.py",
        named("IPython.core.displaypub", "DisplayPublisher", "CapturingDisplayPublisher"),
    ),
    Seam("ipython", "_showtraceback", "vm_magic/state/cell_record.py", shown_tracebacks),
    Seam("ipykernel", "parent_header", "vm_magic/show/front_end.py", parent_headers),
    Seam(
        "ipykernel",
        "get_connection_file",
        "vm_magic/show/front_end.py",
        named("ipykernel.connect", "get_connection_file"),
    ),
    Seam("ipywidgets", "widgets, and comms on subshells", "vm_magic/panel/panel.py", widgets_and_subshells),
    Seam("comm", "managers of comms", "vm_magic/commands/front_end_check.py", managers_of_comms),
)
