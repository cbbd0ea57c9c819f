"""What all tests share: the real models and data, where they are."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# a loaded machine is no failure, and a failure must come again
settings.register_profile("mpqc", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mpqc")

# a suite in the background of a shell is deaf to interrupts, and so would be what it starts
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real {name} live outside the repository, in {folder}: not there")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine's user has measured must not decide what the tests compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPQC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of trained ONNX models; skips where it is missing."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real pictures and labels (.npz); skips where it is missing."""
    return _shared("data")
