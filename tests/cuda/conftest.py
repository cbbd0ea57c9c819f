"""The emulated GPU that these tests share."""

from collections.abc import Iterator

import pytest

from mpqc.target import gpu as gpu_here
from tests.cuda.emulation import Emulator


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Compiled once; skips without a C++ compiler."""
    return Emulator(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def gpu(emulator: Emulator) -> Iterator[Emulator]:
    """What is built for GPUs meanwhile is built for, and runs on, the emulated one."""
    with pytest.MonkeyPatch.context() as patch:
        emulator.install(patch)
        yield emulator
    gpu_here.cache_clear()
