"""What a library needs, occupies and survives: as a program on a board uses it."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from ctypes import c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc import reference
from mpqc.build import Built
from mpqc.data import open_data
from mpqc.errors import UsageError
from mpqc.graph import Graph, Precision
from mpqc.model_source import Form
from mpqc.passes.find_layers import find_integer_layers
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.rounding import Accuracy
from mpqc.runtime import CompiledModel, load
from mpqc.target import TARGETS, find_target, native
from tests.arm_emulator import cross_compiler
from tests.c_programs import call, compiled, library, needs
from tests.graph_runner import feeds, parse
from tests.test_lowering import CHAIN, RESIDUAL

OK, INVALID, BUSY, WRONG_SIZE, WRONG_MACHINE = 0, 1, 3, 5, 6
GRAPH = parse(RESIDUAL.replace("5,5]", "20,20]"))
FEEDS = feeds(GRAPH)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return library(GRAPH, tmp_path_factory.mktemp("shared") / "model.so")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("bare")
    return library(GRAPH, folder / "model.so", Form(static=True, bare=True))


def expected(graph: Graph = GRAPH) -> list[Any]:
    return list(reference.run(graph, feeds(graph)).values())


def undefined(library: Path) -> set[str]:
    listing = call([needs("nm"), "-D", "--undefined-only", str(library)])
    return {line.split()[-1].partition("@")[0] for line in listing.splitlines()}


# What it needs -------------------------------------------------------------------------------


def test_a_bare_library_needs_memory_functions_alone(bare: Built) -> None:
    assert undefined(bare.library) <= {"memcpy", "memset", "memmove", "memcmp"}


def test_a_library_with_threads_has_no_startup_code(shared: Built) -> None:
    assert not {name for name in undefined(shared.library) if name.startswith(("_ITM", "__gmon"))}


def test_a_bare_library_runs_in_python_too(bare: Built) -> None:
    with load(bare.library) as model:
        assert model.about.most_threads == 1
        for got, wanted in zip(model.run(FEEDS).values(), expected(), strict=True):
            np.testing.assert_array_equal(got, wanted)
        with pytest.raises(Exception, match="thread count out of range"):
            load(bare.library, threads=2)


def test_numpy_is_all_that_python_needs(shared: Built, tmp_path: Path) -> None:
    """A process in which no other package can be imported."""
    np.savez(tmp_path / "x.npz", x=FEEDS["x"])
    script = f"""
import sys
class Deny:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in sys.stdlib_module_names | {{"numpy", "mpqc"}}:
            raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Deny())
import mpqc, numpy
model = mpqc.load({str(shared.library)!r})
with numpy.load({str(tmp_path / "x.npz")!r}) as x:
    got = model.run(dict(x))
numpy.savez({str(tmp_path / "y.npz")!r}, **got)
"""
    call([sys.executable, "-c", script], cwd=ROOT)
    with np.load(tmp_path / "y.npz") as got:
        for name, wanted in reference.run(GRAPH, FEEDS).items():
            np.testing.assert_array_equal(got[name], wanted)


# What it says --------------------------------------------------------------------------------


def test_says_which_model_it_is(shared: Built) -> None:
    with load(shared.library, 2) as model:
        about = model.about
        assert (about.model, about.sha256, about.compiler) == ("net.onnx", "abc", "1.2.3")
        assert about.target == native().name
        assert about.most_threads == 64


def test_says_what_memory_it_uses(shared: Built) -> None:
    with load(shared.library) as one, load(shared.library, 3) as three:
        one.run(FEEDS)
        assert one.memory.scratch == one.scratch_bytes == shared.scratch_bytes
        assert three.memory.scratch > one.memory.scratch
        assert three.memory.arena == one.memory.arena < one.memory.scratch
        assert one.memory.weights == shared.weight_bytes
        assert one.memory.shared == shared.shared_bytes
        assert one.memory.workspace_peak <= one.memory.workspace


@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_header_says_the_same(bare: Built, tmp_path: Path, language: str) -> None:
    """Constants of model.h beside the library's answers; scratch memory is static."""
    folder = bare.library.parent
    program = """
#include "model.h"
#include <stdio.h>
#include <string.h>
_Alignas(MPQC_ALIGNMENT) static unsigned char scratch[MPQC_SCRATCH_BYTES(1)];
static MPQC_INPUT_0_TYPE x[MPQC_INPUT_0_ELEMENTS];
static MPQC_OUTPUT_0_TYPE a[MPQC_OUTPUT_0_ELEMENTS];
static MPQC_OUTPUT_1_TYPE b[MPQC_OUTPUT_1_ELEMENTS];
int main(void) {
  mpqc_tensor t;
  const int64_t shape[] = MPQC_OUTPUT_1_SHAPE;
  if (mpqc_input_count() != MPQC_INPUTS || mpqc_output_count() != MPQC_OUTPUTS) return 1;
  if (mpqc_describe_input(0, &t) || t.bytes != MPQC_INPUT_0_BYTES || t.bytes != sizeof x) return 2;
  if (strcmp(t.name, MPQC_INPUT_0_NAME) || strcmp(t.dtype, MPQC_INPUT_0_DTYPE)) return 3;
  if (mpqc_describe_output(1, &t) || t.rank != MPQC_OUTPUT_1_RANK || t.bytes != sizeof b) return 4;
  if (memcmp(shape, t.shape, sizeof shape)) return 5;
  if (mpqc_scratch_bytes(1) != MPQC_SCRATCH_BYTES(1)) return 6;
  mpqc_model* m;
  if (mpqc_create_in(1, scratch, sizeof scratch, &m)) return 7;
  if (fread(x, 1, sizeof x, stdin) != sizeof x) return 8;
  const void* in[] = {x};
  void* out[] = {a, b};
  if (mpqc_run(m, in, NULL, out, NULL)) return 9;
  mpqc_destroy(m);
  fwrite(a, 1, sizeof a, stdout);
  fwrite(b, 1, sizeof b, stdout);
  return 0;
}
"""
    if language == "c++":
        program = program.replace("_Alignas", "alignas").replace("(void)", "()")
    archive = folder / "model.a"
    built = compiled(
        program, tmp_path, "-I", str(folder), str(archive),
        language="c" if language == "c" else "cpp",
    )  # fmt: skip
    data = subprocess.run([str(built)], input=FEEDS["x"].tobytes(), capture_output=True, check=True)
    assert data.stdout == b"".join(array.tobytes() for array in expected())


def test_two_models_fit_into_one_program(tmp_path: Path) -> None:
    """Static libraries with names of their own; one with threads, one without."""
    other = parse(CHAIN)
    library(GRAPH, tmp_path / "first.so", Form(static=True, prefix="ada"))
    library(other, tmp_path / "second.so", Form(static=True, prefix="bob", bare=True))
    program = """
#include "ada.h"
#include "bob.h"
#include <stdio.h>
#include <stdlib.h>
static ADA_INPUT_0_TYPE x[ADA_INPUT_0_ELEMENTS];
static ADA_OUTPUT_0_TYPE y[ADA_OUTPUT_0_ELEMENTS];
static ADA_OUTPUT_1_TYPE z[ADA_OUTPUT_1_ELEMENTS];
static BOB_INPUT_0_TYPE u[BOB_INPUT_0_ELEMENTS];
static BOB_OUTPUT_0_TYPE v[BOB_OUTPUT_0_ELEMENTS];
int main(void) {
  ada_model* ada;
  bob_model* bob;
  void* memory = aligned_alloc(64, (BOB_SCRATCH_BYTES(1) + 63) / 64 * 64);
  if (ada_create(2, &ada)) return 1;
  if (bob_create_in(1, memory, BOB_SCRATCH_BYTES(1), &bob)) return 2;
  if (fread(x, 1, sizeof x, stdin) != sizeof x) return 3;
  if (fread(u, 1, sizeof u, stdin) != sizeof u) return 4;
  const void *in[] = {x}, *in2[] = {u};
  void *out[] = {y, z}, *out2[] = {v};
  if (ada_run(ada, in, NULL, out, NULL) || bob_run(bob, in2, NULL, out2, NULL)) return 5;
  ada_destroy(ada);
  bob_destroy(bob);
  free(memory);
  fwrite(y, 1, sizeof y, stdout);
  fwrite(z, 1, sizeof z, stdout);
  fwrite(v, 1, sizeof v, stdout);
  return 0;
}
"""
    built = compiled(
        program, tmp_path, str(tmp_path / "ada.a"), str(tmp_path / "bob.a"), "-lpthread", "-lm"
    )
    given_ = FEEDS["x"].tobytes() + feeds(other)["x"].tobytes()
    data = subprocess.run([str(built)], input=given_, capture_output=True, check=True)
    assert data.stdout == b"".join(a.tobytes() for a in (*expected(), *expected(other)))
    listing = call([needs("nm"), "--defined-only", "--extern-only", str(tmp_path / "bob.a")])
    symbols = {line.split()[-1] for line in listing.splitlines() if len(line.split()) == 3}
    assert symbols
    assert all(name.startswith("bob_") for name in symbols)


def test_prefixes_are_c_names() -> None:
    for prefix in ("Two", "2nd", "a-b", ""):
        with pytest.raises(UsageError, match="--prefix wants a C name"):
            Form(static=True, prefix=prefix)
    with pytest.raises(UsageError, match="add --static"):
        Form(prefix="net")


# What it survives ----------------------------------------------------------------------------


class C:
    """A library as a C program sees it."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.mpqc_scratch_bytes.restype = c_size_t
        self.library.mpqc_create_in.argtypes = (c_int, c_void_p, c_size_t, c_void_p)
        self.library.mpqc_run.argtypes = (c_void_p,) * 5
        self.library.mpqc_destroy.argtypes = (c_void_p,)
        self.library.mpqc_read.argtypes = (c_void_p, c_size_t, c_void_p, c_size_t)

    def create(self, threads: int = 1) -> tuple[int, c_void_p, Any]:
        size = self.library.mpqc_scratch_bytes(threads)
        memory = np.empty(size + 64, np.uint8)
        start = memory.ctypes.data + -memory.ctypes.data % 64
        handle = c_void_p()
        status = self.library.mpqc_create_in(threads, start, size, ctypes.byref(handle))
        return status, handle, memory


SIZES = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 25600, 25599, 25601, 12800]),
)


def test_any_size_but_the_right_one_is_an_error(shared: Built) -> None:
    c = C(shared.library)
    status, handle, memory = c.create()
    assert status == OK
    x = np.ascontiguousarray(FEEDS["x"])
    results = [np.zeros_like(a) for a in expected()]
    inputs = (c_void_p * 1)(x.ctypes.data)
    outputs = (c_void_p * 2)(*[a.ctypes.data for a in results])
    right = ([x.nbytes], [a.nbytes for a in results])

    @given(SIZES, SIZES, SIZES)
    def fuzz(a: int, b: int, d: int) -> None:
        sizes = (c_size_t * 1)(a), (c_size_t * 2)(b, d)
        found = c.library.mpqc_run(handle, inputs, sizes[0], outputs, sizes[1])
        assert found == (OK if ([a], [b, d]) == right else WRONG_SIZE)

    @given(SIZES, SIZES)
    def fuzz_read(offset: int, size: int) -> None:
        space = ctypes.create_string_buffer(memory.nbytes)
        arena = load(shared.library).memory.arena
        found = c.library.mpqc_read(handle, offset, space, size)
        assert found == (OK if offset + size <= arena else INVALID)

    @given(SIZES)
    def fuzz_scratch(size: int) -> None:
        needed = c.library.mpqc_scratch_bytes(1)
        space = np.empty(needed + 64, np.uint8)
        start = space.ctypes.data + -space.ctypes.data % 64
        other = c_void_p()
        found = c.library.mpqc_create_in(1, start, min(size, needed), ctypes.byref(other))
        assert found == (OK if size >= needed else WRONG_SIZE)
        c.library.mpqc_destroy(other)

    fuzz()
    fuzz_read()
    fuzz_scratch()
    assert c.library.mpqc_run(handle, inputs, None, outputs, None) == OK
    c.library.mpqc_destroy(handle)


@pytest.mark.parametrize("form", [Form(), Form(bare=True)], ids=["threads", "bare"])
def test_first_instances_made_at_once_share_their_weights(form: Form, tmp_path: Path) -> None:
    """Whoever comes first widens the weights; the others wait for them."""
    original = library(GRAPH, tmp_path / "model.so", form)
    assert original.shared_bytes > 0
    wrong: list[Path] = []
    for attempt in range(5):  # each copy is a library of its own, with weights still narrow
        path = tmp_path / f"copy{attempt}.so"
        shutil.copy(original.library, path)
        start = threading.Barrier(6)

        def work(path: Path = path, start: threading.Barrier = start) -> None:
            start.wait()
            with CompiledModel(path) as model:
                for _ in range(5):
                    got = list(model.run(FEEDS).values())
                    if not all(map(np.array_equal, got, expected())):
                        wrong.append(path)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_one_bare_instance_refuses_a_second_caller(bare: Built) -> None:
    c = C(bare.library)
    _, handle, _memory = c.create()
    x = np.ascontiguousarray(FEEDS["x"])
    outcomes: list[int] = []
    start = threading.Barrier(2)

    def work() -> None:
        results = [np.zeros_like(a) for a in expected()]
        inputs = (c_void_p * 1)(x.ctypes.data)
        outputs = (c_void_p * 2)(*[a.ctypes.data for a in results])
        start.wait()
        for _ in range(400):
            status = c.library.mpqc_run(handle, inputs, None, outputs, None)
            outcomes.append(status)
            if status == OK:
                assert all(map(np.array_equal, results, expected()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 800
    assert set(outcomes) <= {OK, BUSY}
    c.library.mpqc_destroy(handle)


CYCLES = """
#include "model.h"
#include <stdio.h>
static MPQC_INPUT_0_TYPE x[MPQC_INPUT_0_ELEMENTS];
static MPQC_OUTPUT_0_TYPE y[MPQC_OUTPUT_0_ELEMENTS];
static MPQC_OUTPUT_1_TYPE z[MPQC_OUTPUT_1_ELEMENTS];
int main(void) {
  const void* in[] = {x};
  void* out[] = {y, z};
  for (int i = 0; i < 1000; i++) {
    mpqc_model* m;
    if (mpqc_create(1 + i % 2, &m) || mpqc_run(m, in, NULL, out, NULL)) return 1;
    mpqc_destroy(m);
  }
  puts("done");
  return 0;
}
"""


def test_a_thousand_lives_leak_nothing(tmp_path: Path) -> None:
    valgrind = needs("valgrind")
    if native().arch != "x86_64":
        pytest.skip("built for a processor that valgrind is known to emulate: x86-64-v3")
    graph = parse(RESIDUAL)
    library(graph, tmp_path / "model.so", Form(static=True), TARGETS["x86-64-v3"])
    program = compiled(CYCLES, tmp_path, str(tmp_path / "model.a"), "-lpthread", "-lm")
    result = subprocess.run(
        [valgrind, "--leak-check=full", "--show-leak-kinds=all", "--error-exitcode=9",
         "--errors-for-leak-kinds=all", "--fair-sched=yes", str(program)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-3000:]
    assert "All heap blocks were freed -- no leaks are possible" in result.stderr
    allocations = re.search(r"total heap usage: ([\d,]+) allocs", result.stderr)
    assert allocations is not None
    assert int(allocations[1].replace(",", "")) >= 1000  # valgrind saw the instances


@pytest.mark.parametrize(
    ("target", "cpu", "runs"),
    [("x86-64-v2", "Nehalem", True), ("x86-64-v2", "core2duo", False),
     ("x86-64-v3", "max", True), ("x86-64-v3", "Nehalem", False),
     ("x86-64-v4", "max", False), ("x86-64-v4-vnni", "max", False)],
)  # fmt: skip
def test_a_processor_without_the_instructions_is_refused(
    target: str, cpu: str, runs: bool, tmp_path: Path
) -> None:
    """Under an emulator, which has no AVX-512."""
    if native().arch != "x86_64":
        pytest.skip("programs for x86-64")
    emulator = shutil.which("qemu-x86_64-static") or needs("qemu-x86_64")
    graph = parse(RESIDUAL)
    library(graph, tmp_path / "model.so", Form(static=True, bare=True), TARGETS[target])
    program = compiled(
        "#include \"model.h\"\n"
        "_Alignas(MPQC_ALIGNMENT) static unsigned char scratch[MPQC_SCRATCH_BYTES(1)];\n"
        "static MPQC_INPUT_0_TYPE x[MPQC_INPUT_0_ELEMENTS];\n"
        "static MPQC_OUTPUT_0_TYPE y[MPQC_OUTPUT_0_ELEMENTS];\n"
        "static MPQC_OUTPUT_1_TYPE z[MPQC_OUTPUT_1_ELEMENTS];\n"
        "int main(void) {\n"
        "  mpqc_model* m;\n"
        "  int status = mpqc_create_in(1, scratch, sizeof scratch, &m);\n"
        "  const void* in[] = {x};\n"
        "  void* out[] = {y, z};\n"
        "  return status ? status : mpqc_run(m, in, NULL, out, NULL);\n"
        "}\n",
        tmp_path, str(tmp_path / "model.a"), "-static",
    )  # fmt: skip
    result = subprocess.run([emulator, "-cpu", cpu, str(program)], capture_output=True, check=False)
    assert result.returncode == (OK if runs else WRONG_MACHINE)


# What it occupies ----------------------------------------------------------------------------


def test_weights_take_the_bits_that_they_need(shared: Built, tmp_path: Path) -> None:
    ready = library(GRAPH, tmp_path / "model.so", Form(ready=True))
    assert ready.shared_bytes == 0
    assert ready.weight_bytes > shared.weight_bytes
    with load(ready.library) as model:
        for got, wanted in zip(model.run(FEEDS).values(), expected(), strict=True):
            np.testing.assert_array_equal(got, wanted)


def compile_real(
    model: Path,
    bits: str,
    output: Path,
    form: Form,
    target: str = "native",
    accuracy: Accuracy = Accuracy(),  # noqa: B008 - frozen
    dims: Mapping[str, int] | None = None,
) -> Any:
    graph = import_model(model, dims)
    generator = np.random.default_rng(0)
    samples = {
        name: generator.uniform(-1, 1, kind.shape).astype(kind.dtype)
        if kind.dtype.startswith("float")
        else generator.integers(0, 256, kind.shape).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }
    options = Options(
        find_target(target), max_samples=4, form=form, latencies=None, accuracy=accuracy
    )
    if find_integer_layers(graph):  # it has widths of its own
        return compile_model(model, output, options, dims=dims)
    return compile_model(
        model, output, options, bits=Precision.parse(bits), data=open_data(samples, graph),
        dims=dims,
    )  # fmt: skip


NEAREST = Accuracy(rounding="nearest", clipping="mse")  # faster, and sizes are the same
OPEN_DIMS = {"ppocr_v2_angle_cls": {"x:2": 48, "x:3": 192}}


@pytest.mark.parametrize(
    "name",
    [
        "ad01_autoencoder",
        "mnist_cnn",
        "cifar10_resnet8",
        "mobilenet_v1_0.25_224",
        "magika_standard_v3_3",
        *(pytest.param(name, marks=pytest.mark.slow)
          for name in ("TFC_2W2A", "cifar10_resnet8_int8_qdq", "cifar10_resnet20",
                       "espcn_x2_float", "espcn_x2_qonnx", "ppocr_v2_angle_cls",
                       "ultraface_rfb320", "squeezenet1.0_sparse", "mobilenet_v2_1.0_224")),
    ],
)  # fmt: skip
def test_scratch_memory_is_near_the_least(name: str, shared_models: Path, tmp_path: Path) -> None:
    form, model_file = Form(static=True, bare=True), shared_models / f"{name}.onnx"
    artifact = compile_real(
        model_file, "w2a2", tmp_path / "net", form, accuracy=NEAREST, dims=OPEN_DIMS.get(name)
    )
    with load(artifact.library) as model:
        memory = model.memory
        model.run({n: np.zeros(k.shape, k.dtype) for n, k in model.inputs.items()})
        assert memory.scratch <= 1.2 * memory.arena_least
        assert model.memory.workspace_peak <= memory.workspace
        report = json.loads((artifact.folder / "report.json").read_text("utf-8"))
        assert report["bytes"]["scratch"] == memory.scratch
    assert undefined(artifact.library) <= {"memcpy", "memset", "memmove", "memcmp"}
    assert {"model.h", "model.a"} <= {path.name for path in artifact.folder.iterdir()}


@pytest.mark.parametrize(
    "target",
    [
        "x86-64-v3", "rpi4",
        *(pytest.param(name, marks=pytest.mark.slow)
          for name in ("x86-64-v2", "x86-64-v4-vnni", "rpi3", "rpi5", "aarch64", "armv7")),
    ],
)  # fmt: skip
def test_a_two_bit_mobilenet_is_small(shared_models: Path, tmp_path: Path, target: str) -> None:
    if find_target(target).arch != native().arch:
        cross_compiler(find_target(target))
    model = shared_models / "mobilenet_v1_0.25_224.onnx"
    artifact = compile_real(model, "w2a2", tmp_path / "net", Form(), target, NEAREST)
    assert artifact.library.stat().st_size < 450_000


def test_threads_that_share_a_core_give_way(tmp_path: Path) -> None:
    """On a busy machine whoever is waited for may need the waiter's core."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be bound to a core here")
    graph = parse(RESIDUAL.replace("5,5]", "56,56]"))
    built = library(graph, tmp_path / "model.so")
    fed = feeds(graph)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with CompiledModel(built.library, 1) as one, CompiledModel(built.library, 2) as two:
            alone = min(one.seconds(fed, 50))
            shared = min(two.seconds(fed, 50))
    finally:
        os.sched_setaffinity(0, before)
    assert shared < 2 * alone + 20e-6
