from pathlib import Path

import pytest

from engine.runner.kernels import rows_matmul
from tests.engine.runner.kernels.cuda_on_host import HostKernel


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled for this machine."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def host_products(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    """Products of few rows run on this machine's CPU; gives the kernels by name."""
    made: dict[str, HostKernel] = {}

    def make(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str) -> HostKernel:
        return made.setdefault(name, HostKernel(name, inputs, source, header, kernel_folder))

    monkeypatch.setattr(rows_matmul, "make_kernel", make)
    return made
