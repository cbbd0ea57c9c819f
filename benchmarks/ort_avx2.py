"""ONNX Runtime as it runs on a processor without AVX-512, on one that has it.

    python -m benchmarks.ort_avx2 model.onnx

ONNX Runtime chooses its kernels by `cpuid`, and no option changes its mind. So a patched copy of
its native library is loaded: each `cpuid` is overwritten by `ud2`, which is as long and traps, and
the handler of the trap answers what the processor says less AVX-512, AVX-VNNI and AMX. All of this
happens while the library is loaded; afterwards the code runs at full speed, unchanged.

Whether that worked is not taken on trust: processors tell which registers hold data (XINUSE), and
after a run on a patched copy the AVX-512 registers hold none (``used_avx512``); this program shows
it. Linux on x86-64 alone, for benchmarks alone: the package itself never does such things.
"""

import argparse
import atexit
import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import c_code
from mpqc.errors import EnvironmentLacks, UsageError
from mpqc.target import host_flags

ISAS = ("native", "avx2")
CPUID, UD2 = b"\x0f\xa2", b"\x0f\x0b"
_NATIVE_LIBRARY = "onnxruntime_pybind11_state*.so"
_LOAD = 1  # type of a segment that is mapped
_HEADER, _SEGMENT = 64, 56  # bytes, of ELF64
# The C library's own string functions must leave the registers alone while XINUSE is looked at.
_PLAIN_LIBC = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ"

_kept: list[Any] = []  # what the handler reads


def use_isa(isa: str) -> None:
    """Have ONNX Runtime use at most this instruction set; call before it is imported.

    Args:
        isa: "native" leaves it alone; "avx2" hides everything beyond.

    Raises:
        UsageError: ONNX Runtime is loaded already, or the instruction set is unknown.
        EnvironmentLacks: not Linux on x86-64, or objdump, a C compiler or ONNX Runtime is missing.
    """
    if isa not in ISAS:
        raise UsageError(f"unknown instruction set {isa!r}; choose one of {', '.join(ISAS)}")
    if isa == "native" or "avx512f" not in host_flags():
        return
    if "onnxruntime" in sys.modules:
        raise UsageError("ONNX Runtime is loaded: its instruction set must be chosen before")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise EnvironmentLacks("AVX-512 can be hidden on Linux on x86-64 alone")
    folder = Path(tempfile.mkdtemp(prefix="mpqc-onnxruntime-"))
    atexit.register(shutil.rmtree, folder)  # parts of the package are imported later
    places = _patched_copy(folder)
    array = (ctypes.c_size_t * len(places))(*places)
    _kept.append(array)
    if c_code.load("hide_avx512").hide_avx512(array, len(places)):
        raise EnvironmentLacks("no handler of SIGILL can be set")
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module("onnxruntime")
    finally:
        sys.path.remove(str(folder))


def used_avx512(run: Callable[[], Any]) -> bool:
    """Whether AVX-512 registers hold data after a run on this thread."""
    library = c_code.load("hide_avx512")
    library.clear_avx512()
    run()
    return bool(library.used_avx512())


def _patched_copy(folder: Path) -> list[int]:
    """A package ``onnxruntime`` of links, its native library patched; where it was patched."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        raise EnvironmentLacks("onnxruntime is missing: pip install onnxruntime")
    package = Path(found.origin).parent
    libraries = list(package.glob(f"capi/{_NATIVE_LIBRARY}"))
    if len(libraries) != 1:
        raise EnvironmentLacks(f"{package} does not hold one {_NATIVE_LIBRARY}")
    copy = folder / "onnxruntime"
    shutil.copytree(package, copy, copy_function=os.symlink)
    target = copy / libraries[0].relative_to(package)
    places = cpuid_places(libraries[0])
    target.unlink()
    target.write_bytes(patched(libraries[0].read_bytes(), places))
    return places


def cpuid_places(library: Path) -> list[int]:
    """Addresses of the ``cpuid`` instructions in a library.

    Raises:
        EnvironmentLacks: no objdump, or it finds none.
    """
    tool = shutil.which("objdump")
    if tool is None:
        raise EnvironmentLacks("finding instructions needs objdump: apt install binutils")
    command = [tool, "-d", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = [
            int(line.partition(":")[0], 16)
            for line in process.stdout
            if re.match(r"\s*[0-9a-f]+:\s+cpuid\b", line)
        ]
    if not found:
        raise EnvironmentLacks(f"objdump finds no cpuid in {library}")
    return found


def patched(library: bytes, places: Sequence[int]) -> bytes:
    """The library with ``ud2`` at the addresses.

    Raises:
        UsageError: there is no ``cpuid`` at one of them.
    """
    (table,) = struct.unpack_from("<Q", library, 32)
    (count,) = struct.unpack_from("<H", library, 56)
    segments = [
        struct.unpack_from("<IIQQQQQQ", library, table + _SEGMENT * index) for index in range(count)
    ]
    result = bytearray(library)
    for place in places:
        for kind, _, offset, address, _, size, _, _ in segments:
            if kind == _LOAD and address <= place < address + size:
                at = place - address + offset
                break
        else:
            raise UsageError(f"{place:#x} is not in the library")
        if result[at : at + 2] != CPUID:
            raise UsageError(f"there is no cpuid at {place:#x}")
        result[at : at + 2] = UD2
    return bytes(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a model, float and int8, on the instruction set; say how fast, and with what."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--isa", choices=ISAS, action="append", help="default: each in turn")
    options = parser.parse_args(arguments)
    isas = options.isa or ISAS
    if len(isas) > 1 or os.environ.get("GLIBC_TUNABLES") != _PLAIN_LIBC:
        environment = {**os.environ, "GLIBC_TUNABLES": _PLAIN_LIBC}
        for isa in isas:
            command = [sys.executable, "-m", "benchmarks.ort_avx2", str(options.model)]
            subprocess.run([*command, "--isa", isa], env=environment, check=True)
        return 0
    use_isa(isas[0])

    from mpqc import pipeline
    from mpqc.ort import Session, quantize_static
    from mpqc.verify import random_feeds

    feeds = random_feeds(pipeline.import_model(options.model).inputs, 2)
    for name, source in (
        ("float", options.model.read_bytes()),
        ("int8", quantize_static(options.model, feeds)),
    ):
        session = Session(source, optimise=True)
        best = min(session.seconds(feeds[0], 20))
        used = used_avx512(lambda: session.run(feeds[0]))  # noqa: B023 - called at once
        words = "uses AVX-512" if used else "leaves the AVX-512 registers alone"
        print(f"{isas[0]:6s} {name:5s} {best * 1e3:8.3f} ms, {words}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
