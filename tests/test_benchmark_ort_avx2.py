import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import layers, ort_avx2
from mpqc.errors import UsageError
from mpqc.target import host_flags
from tests.c_programs import needs

ROOT = Path(__file__).parents[1]
SOURCE = """
#include <cpuid.h>
unsigned features(int which) {
  unsigned r[4];
  __cpuid_count(7, 0, r[0], r[1], r[2], r[3]);
  return r[which];
}
"""
AVX512 = {1: [16, 17, 21, 28, 30, 31], 2: [1, 6, 11, 12, 14], 3: [2, 3, 8, 22, 23, 24, 25]}
CHILD = """
import ctypes, sys
from benchmarks import c_code, ort_avx2
library, places = sys.argv[1], [int(word) for word in sys.argv[2:]]
array = (ctypes.c_size_t * len(places))(*places)
assert c_code.load("hide_avx512").hide_avx512(array, len(places)) == 0
features = ctypes.CDLL(library).features
features.restype = ctypes.c_uint32
print(*(features(i) for i in range(4)), flush=True)
if places[0] == 0:
    raise SystemExit("unreachable")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not host_flags() & {"avx2"}:
        pytest.skip("not an x86 processor with AVX2")
    folder = tmp_path_factory.mktemp("cpuid")
    (folder / "features.c").write_text(SOURCE)
    command = [needs("cc"), "-O1", "-shared", "-fPIC", "features.c", "-o", "features.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "features.so"


def features(library: Path) -> list[int]:
    function = ctypes.CDLL(str(library)).features
    function.restype = ctypes.c_uint32
    return [function(index) for index in range(4)]


def child(library: Path, places: list[int]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(library), *map(str, places)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_patched_library_sees_a_processor_without_avx512(library: Path) -> None:
    needs("objdump")
    places = ort_avx2.cpuid_places(library)
    copy = library.with_name("patched.so")
    copy.write_bytes(ort_avx2.patched(library.read_bytes(), places))
    real = features(library)
    seen = [int(word) for word in child(copy, places).stdout.split()]
    for index, hidden in {0: [], **AVX512}.items():
        assert seen[index] == real[index] & ~sum(1 << bit for bit in hidden)
    assert seen[1] & 1 << 5  # AVX2


def test_a_trap_elsewhere_kills_as_it_would(library: Path) -> None:
    needs("objdump")
    copy = library.with_name("other.so")
    copy.write_bytes(ort_avx2.patched(library.read_bytes(), ort_avx2.cpuid_places(library)))
    result = child(copy, [0])
    assert result.returncode == -4  # SIGILL
    assert result.stdout == ""


def test_only_cpuid_is_replaced(library: Path) -> None:
    needs("objdump")
    (place,) = ort_avx2.cpuid_places(library)
    content = library.read_bytes()
    changed = ort_avx2.patched(content, [place])
    assert sum(a != b for a, b in zip(content, changed, strict=True)) == 1
    with pytest.raises(UsageError, match="no cpuid at"):
        ort_avx2.patched(content, [place + 1])
    with pytest.raises(UsageError, match="not in the library"):
        ort_avx2.patched(content, [1 << 40])


def test_the_instruction_set_is_chosen_before_onnxruntime_is_loaded() -> None:
    with pytest.raises(UsageError, match="unknown instruction set 'sse'"):
        ort_avx2.use_isa("sse")
    ort_avx2.use_isa("native")
    if "avx512f" in host_flags():
        import onnxruntime  # noqa: F401

        with pytest.raises(UsageError, match="must be chosen before"):
            ort_avx2.use_isa("avx2")


def test_onnxruntime_leaves_avx512_alone_when_it_is_hidden(tmp_path: Path) -> None:
    if "avx512f" not in host_flags():
        pytest.skip("this processor has no AVX-512 to hide")
    needs("objdump")
    needs("cc")
    model = tmp_path / "layer.onnx"
    model.write_bytes(layers.network(layers.Convolution(64, 14, 64, 3), 2))
    command = [sys.executable, "-m", "benchmarks.ort_avx2", str(model)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [(line.split()[:2], "leaves" in line) for line in found.splitlines()]
    assert rows == [
        (["native", "float"], False),
        (["native", "int8"], False),
        (["avx2", "float"], True),
        (["avx2", "int8"], True),
    ]
