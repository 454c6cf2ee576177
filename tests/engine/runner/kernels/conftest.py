from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from engine.runner.kernels import paged_attention, rows_matmul
from tests.engine.runner.kernels import text_on_host
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host

TextKernels = Callable[..., dict[str, text_on_host.HostKernel]]


@pytest.fixture
def host_products(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    """Products of few rows run on this machine's CPU; gives the kernels by name."""
    return kernels_on_host(monkeypatch, kernel_folder, rows_matmul)


@pytest.fixture(params=["metal", "cuda"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def text_kernels(dialect: str, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TextKernels:
    """Kernels of this machine's CPU in place of the GPU's that some modules make; gives them by name."""
    made: dict[str, text_on_host.HostKernel] = {}

    def make(
        name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = ""
    ) -> text_on_host.HostKernel:
        kernel = text_on_host.HostKernel(dialect, name, inputs, outputs, source, header, kernel_folder)
        return made.setdefault(name, kernel)

    monkeypatch.setattr(paged_attention, "joins_in_launch", lambda: dialect == "cuda")

    def replace(*modules: ModuleType) -> dict[str, text_on_host.HostKernel]:
        for module in modules:
            monkeypatch.setattr(module, "make_kernel", make)
        return made

    return replace
