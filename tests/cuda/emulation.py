"""Libraries for GPUs that run here: the generated CUDA source as C++, under a driver of our own."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mpqc.cuda import toolkit
from mpqc.target import gpu

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
_PREAMBLE = re.compile(r"^\s*#include <(cuda|mma|math_constants).*$", re.MULTILINE)
_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^;{]*\) \{', re.MULTILINE
)
_SHARED = re.compile(r"__shared__ (alignas\(\d+\)) ")
_WAITS = ("__syncthreads", "mpqc::product", "mpqc::vote")


def require_compiler() -> str:
    """The C++ compiler; skips where there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler to emulate a GPU with")
    return found


def translate(source: str) -> str:
    """Generated CUDA source to C++ with an entry for every kernel."""
    starts = [(match[1], match.start()) for match in _KERNEL.finditer(source)]
    entries = []
    for index, (name, start) in enumerate(starts):
        end = starts[index + 1][1] if index + 1 < len(starts) else len(source)
        waits = any(word in source[start:end] for word in _WAITS)
        entries.append(
            f'extern "C" void {name}__call(const unsigned* g, const unsigned* b, void** v) '
            f"{{ emulated::call({name}, g, b, v, {str(waits).lower()}); }}"
        )
    body = _SHARED.sub(r"\1 static ", _PREAMBLE.sub("", source))
    return "\n".join(['#include "emulated.h"', body, *entries, ""])


class Emulator:
    """Compiles kernels for this machine in place of nvcc.

    Args:
        folder: for the libraries.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = folder / "libcuda.so.1"
        self.sources: list[str] = []
        self._compile(HERE / "driver.cpp", self.driver, "-ldl")

    def _compile(self, source: Path, output: Path, *more: str) -> None:
        command = [
            require_compiler(),
            *FLAGS,
            "-I",
            str(HERE),
            str(source),
            "-o",
            str(output),
            *more,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    def fat_binary(self, source: str, _arch: str, _work: Path) -> bytes:
        """What ``toolkit.compile_fat_binary`` is replaced by."""
        self.sources.append(source)
        text = translate(source)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        library = self.folder / f"{name}.so"
        if not library.exists():
            (self.folder / f"{name}.cpp").write_text(text, "utf-8")
            self._compile(self.folder / f"{name}.cpp", library)
        return b"MPQC-EMULATED:" + str(library).encode() + b"\0"

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Until the patch is undone, libraries are made for and run on the emulated GPU."""
        patch.setattr(toolkit, "compile_fat_binary", self.fat_binary)
        patch.setenv("MPQC_CUDA_DRIVER", str(self.driver))
        gpu.cache_clear()
